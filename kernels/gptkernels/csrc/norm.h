// LayerNorm and RMSNorm, alone or after a residual sum: one read of each row, its float copy in the first-level cache.
// The mathematics is in layer_norm/MATH.md and rms_norm/MATH.md.
#pragma once

#include "common.h"

namespace gptkernels {

template <typename T, typename R>
struct NormForward {
  const T* x;
  const R* residual;  // null: normalise x itself
  const float *weight, *bias;
  T* out;
  R* summed;
  float *mean, *rstd;  // mean: null for RMSNorm
  int64_t columns, stride_x, stride_residual;
  float eps;
  bool past;  // out and summed go past the caches
};

template <bool centred, bool add, typename T, typename R>
void norm_row(const NormForward<T, R>& a, int64_t i, float* buffer) {
  const int64_t n = a.columns;
  const float *weight = a.weight, *bias = a.bias;
  const bool past = a.past;
  const T* x = a.x + i * a.stride_x;
  const R* residual = add ? a.residual + i * a.stride_residual : nullptr;
  R* summed = add ? a.summed + i * n : nullptr;
  // The row as floats: what was normalised, where that is float and in reach, else a copy.
  constexpr bool is_float = std::is_same_v<std::conditional_t<add, R, T>, float>;
  const bool copied = !is_float || (add && past);
  const float* row = buffer;
  if constexpr (is_float && add) row = copied ? buffer : summed;
  else if constexpr (is_float) row = x;
  Sum first, square;
  sweep(n, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    Vec v = load(x + j, lanes);
    __builtin_prefetch(x + a.stride_x + j);  // the next row, while this one is gone over again and again
    if constexpr (add) {
      v = v + load(residual + j, lanes);
      __builtin_prefetch(residual + a.stride_residual + j);
      put(summed + j, v, lanes, past);
      if constexpr (!std::is_same_v<R, float>) v = rounded<R>(v);  // what the stream, and the backward, will see
    }
    if (copied) store(buffer + j, v, lanes);
    if constexpr (centred) first.add(v, k);
    else square.add(v, v, k);
  });
  float mean = 0.f, variance;
  if constexpr (centred) {
    mean = first.total() / n;
    Sum rest;
    sweep(n, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
      Vec d = keep(load(row + j, lanes) - Vec(mean), lanes, 0.f);
      rest.add(d, k);
      square.add(d, d, k);
    });
    // The mean's own rounding error is the mean of what it leaves.
    const float correction = rest.total() / n;
    mean += correction;
    variance = std::max(square.total() / n - correction * correction, 0.f);
    a.mean[i] = mean;
  } else {
    variance = square.total() / n;
  }
  const float rstd = 1.f / std::sqrt(variance + a.eps);
  a.rstd[i] = rstd;
  T* out = a.out + i * n;
  sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
    Vec y = load(row + j, lanes);
    if constexpr (centred) y = y - Vec(mean);
    y = y * Vec(rstd);
    const Vec w = weight ? load(weight + j, lanes) : Vec(1.f), b = bias ? load(bias + j, lanes) : Vec(0.f);
    put(out + j, fmadd(y, w, b), lanes, past);
  });
}

// (out, summed, mean, rstd); summed is x itself without a residual, mean is undefined for RMSNorm.
template <bool centred>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor summed = residual ? at::empty(x.sizes(), residual->options()) : x;
  Tensor rstd = empty_floats(x.sizes().slice(0, x.dim() - 1));
  Tensor mean = centred ? at::empty_like(rstd) : Tensor();
  if (x.numel() == 0) {
    rstd.zero_();
    if (centred) mean.zero_();
    return {out, summed, mean, rstd};
  }
  const Rows rows(x), residual_rows(residual ? *residual : x);
  const Parameter w(weight), b(bias);
  dispatch_stream(x.scalar_type(), summed.scalar_type(), [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    const NormForward<T, R> a{
        rows.data<T>(), residual ? residual_rows.data<R>() : nullptr, w.data, b.data,
        out.data_ptr<T>(), residual ? summed.data_ptr<R>() : nullptr,
        centred ? mean.data_ptr<float>() : nullptr, rstd.data_ptr<float>(),
        rows.columns, rows.stride, residual_rows.stride, static_cast<float>(eps),
        goes_past_caches(out) && (!residual || goes_past_caches(summed))};
    const int64_t grain = std::max<int64_t>(1, 8192 / rows.columns);
    at::parallel_for(0, rows.rows, grain, [&](int64_t begin, int64_t end) {
      Scratch<float> row(rows.columns);
      for (int64_t i = begin; i < end; ++i) {
        if (residual) norm_row<centred, true>(a, i, row);
        else norm_row<centred, false>(a, i, row);
      }
      if (a.past) drain();
    });
  });
  return {out, summed, mean, rstd};
}

template <typename T, typename R>
struct NormBackward {
  const T* grad_out;
  const R* x;             // what was normalised
  const R* grad_summed;   // null without a residual
  const float *weight, *mean, *rstd;
  R* grad_x;
  T* grad_branch;  // null where grad_x serves both
  int64_t columns, stride_out, stride_x, stride_summed;
  bool past;  // the gradients go past the caches
};

constexpr int kTogether = kLanes == 16 ? 4 : 2;  // rows whose sums the registers hold, 32 with AVX-512 and else 16

// `count` rows from i on, together: the sums for weight and bias are then loaded and stored once for all of them.
template <bool centred, int count, typename T, typename R>
void norm_rows_backward(const NormBackward<T, R>& a, int64_t i, float* grad_weight, float* grad_bias) {
  // In locals: a store of a vector may alias the fields of `a`, which would be loaded again after each.
  const int64_t n = a.columns, ahead_out = count * a.stride_out, ahead_x = count * a.stride_x;
  const float* weight = a.weight;
  const bool past = a.past;
  float mean[count], rstd[count];
  const T* grad_out[count];
  const R* x[count];
  for (int r = 0; r < count; ++r) {
    mean[r] = centred ? a.mean[i + r] : 0.f, rstd[r] = a.rstd[i + r];
    grad_out[r] = a.grad_out + (i + r) * a.stride_out, x[r] = a.x + (i + r) * a.stride_x;
  }
  Vec along[count], total[count];
  for (int r = 0; r < count; ++r) along[r] = Vec(0.f), total[r] = Vec(0.f);
  sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
    const Vec w = weight ? load(weight + j, lanes) : Vec(1.f);
    Vec dw(0.f), db(0.f);
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
      const Vec dy = load(grad_out[r] + j, lanes);
      __builtin_prefetch(grad_out[r] + ahead_out + j), __builtin_prefetch(x[r] + ahead_x + j);
      Vec xhat = (load(x[r] + j, lanes) - Vec(mean[r])) * Vec(rstd[r]);
      const Vec g = dy * w;  // 0 beyond a tail, and with it every sum
      along[r] = fmadd(g, xhat, along[r]);
      if constexpr (centred) total[r] = total[r] + g;
      dw = fmadd(dy, xhat, dw);
      db = db + dy;
    }
    if (grad_weight) store(grad_weight + j, load(grad_weight + j, lanes) + dw, lanes);
    if (grad_bias) store(grad_bias + j, load(grad_bias + j, lanes) + db, lanes);
  });
  for (int r = 0; r < count; ++r) {
    const Vec c1(sum(along[r]) / n), c2(sum(total[r]) / n);
    R* grad_x = a.grad_x + (i + r) * n;
    T* grad_branch = a.grad_branch ? a.grad_branch + (i + r) * n : nullptr;
    const R* grad_summed = a.grad_summed ? a.grad_summed + (i + r) * a.stride_summed : nullptr;
    sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      const Vec w = weight ? load(weight + j, lanes) : Vec(1.f);
      const Vec xhat = (load(x[r] + j, lanes) - Vec(mean[r])) * Vec(rstd[r]);
      Vec g = load(grad_out[r] + j, lanes) * w - xhat * c1;
      if constexpr (centred) g = g - c2;
      g = g * Vec(rstd[r]);
      if (grad_summed) g = g + load(grad_summed + j, lanes);
      put(grad_x + j, g, lanes, past);
      if (grad_branch) put(grad_branch + j, g, lanes, past);
    });
  }
}

// (grad_x, grad_branch, grad_weight, grad_bias); what is not asked for is empty.
template <bool centred>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad_out, const OptionalTensor& grad_summed, const Tensor& x, const OptionalTensor& weight,
    const Tensor& mean, const Tensor& rstd, bool need_weight, bool need_bias, bool need_branch) {
  const int64_t n = x.size(-1);
  const bool branch = need_branch && grad_out.scalar_type() != x.scalar_type();
  Tensor grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_branch = branch ? at::empty(x.sizes(), grad_out.options()) : at::empty({0}, grad_out.options());
  Tensor grad_weight = empty_floats({need_weight ? n : 0}), grad_bias = empty_floats({need_bias ? n : 0});
  if (x.numel() == 0) return {grad_x, grad_branch, grad_weight.zero_(), grad_bias.zero_()};
  const Rows out_rows(grad_out), rows(x), summed_rows(grad_summed ? *grad_summed : x);
  const Parameter w(weight);
  const Tensor means = mean.defined() ? mean.contiguous() : mean, deviations = rstd.contiguous();
  const int64_t blocks = sum_blocks(rows.rows), per_block = ceil_div(rows.rows, blocks);
  Tensor partial = at::zeros({blocks, (need_weight ? n : 0) + (need_bias ? n : 0)}, at::kFloat);
  const int64_t width = partial.size(1);
  float* sums = partial.data_ptr<float>();
  dispatch_stream(grad_out.scalar_type(), x.scalar_type(), [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    const NormBackward<T, R> a{
        out_rows.data<T>(), rows.data<R>(), grad_summed ? summed_rows.data<R>() : nullptr, w.data,
        centred ? means.const_data_ptr<float>() : nullptr, deviations.const_data_ptr<float>(),
        grad_x.data_ptr<R>(), branch ? grad_branch.data_ptr<T>() : nullptr,
        n, out_rows.stride, rows.stride, summed_rows.stride,
        goes_past_caches(grad_x) && (!branch || goes_past_caches(grad_branch))};
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        float* dw = need_weight ? sums + block * width : nullptr;
        float* db = need_bias ? sums + block * width + (need_weight ? n : 0) : nullptr;
        int64_t i = block * per_block;
        const int64_t last = std::min(i + per_block, rows.rows);
        for (; i + kTogether <= last; i += kTogether) norm_rows_backward<centred, kTogether>(a, i, dw, db);
        for (; i < last; ++i) norm_rows_backward<centred, 1>(a, i, dw, db);
      }
      if (a.past) drain();
    });
  });
  if (need_weight) add_blocks(sums, blocks, width, n, grad_weight.data_ptr<float>());
  if (need_bias) add_blocks(sums + (need_weight ? n : 0), blocks, width, n, grad_bias.data_ptr<float>());
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

}  // namespace gptkernels
