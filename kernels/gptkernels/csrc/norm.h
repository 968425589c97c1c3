// LayerNorm and RMSNorm, alone or after adding a residual. Each row is read once; a float copy stays in the first-level cache.
// The mathematics is in layer_norm/MATH.md and rms_norm/MATH.md.
#pragma once

#include "csrc/common.h"

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
  bool past;  // write out and summed with non-temporal stores
};

template <bool centred, bool add, typename T, typename R>
void norm_row(const NormForward<T, R>& a, int64_t i, float* buffer) {
  const int64_t n = a.columns;
  const float *weight = a.weight, *bias = a.bias;
  const bool past = a.past;
  const T* x = a.x + i * a.stride_x;
  const R* residual = add ? a.residual + i * a.stride_residual : nullptr;
  R* summed = add ? a.summed + i * n : nullptr;
  // The row as floats. It is copied to the buffer unless it is float and still in the cache.
  constexpr bool is_float = std::is_same_v<std::conditional_t<add, R, T>, float>;
  const bool copied = !is_float || (add && past);
  const float* row = buffer;
  if constexpr (is_float && add) row = copied ? buffer : summed;
  else if constexpr (is_float) row = x;
  Sum first, square;
  sweep(n, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    Vec v = load(x + j, lanes);
    __builtin_prefetch(x + a.stride_x + j);  // the next row, while this one is read several times
    if constexpr (add) {
      v = v + load(residual + j, lanes);
      __builtin_prefetch(residual + a.stride_residual + j);
      put(summed + j, v, lanes, past);
      if constexpr (!std::is_same_v<R, float>) v = rounded<R>(v);  // the value that the stream holds and the backward reads
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
    // The mean of the differences is the rounding error of the mean.
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

// Returns (out, summed, mean, rstd). Without a residual summed is x itself; for RMSNorm mean is empty.
template <bool centred>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  Tensor out = result_like(x);
  Tensor summed = residual ? empty(x.sizes(), residual->scalar_type()) : x;
  Tensor rstd = empty_floats(Shape(x.sizes().data(), x.dim() - 1));
  Tensor mean = centred ? result_like(rstd) : none_like(rstd);
  if (x.numel() == 0) return {out, summed, zeroed(mean), zeroed(rstd)};
  const Rows rows(x), residual_rows(residual ? *residual : x);
  const Parameter w(weight), b(bias);
  dispatch_stream(x.scalar_type(), summed.scalar_type(), [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    const NormForward<T, R> a{
        rows.data<T>(), residual ? residual_rows.data<R>() : nullptr, w.data, b.data,
        out.mutable_data_ptr<T>(), residual ? summed.mutable_data_ptr<R>() : nullptr,
        centred ? mean.mutable_data_ptr<float>() : nullptr, rstd.mutable_data_ptr<float>(),
        rows.columns, rows.stride, residual_rows.stride, static_cast<float>(eps),
        goes_past_caches(out) && (!residual || goes_past_caches(summed))};
    const int64_t grain = std::max<int64_t>(1, 8192 / rows.columns);
    parallel_for(0, rows.rows, grain, [&](int64_t begin, int64_t end) {
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
  const R* x;             // the forward's input, or its sum with the residual
  const R* grad_summed;   // null without a residual
  const float *weight, *mean, *rstd;
  R* grad_x;
  T* grad_branch;  // null if it has grad_x's dtype: grad_x then serves both
  int64_t columns, stride_out, stride_x, stride_summed;
  bool past;  // write the gradients with non-temporal stores
};

constexpr int kTogether = kLanes == 16 ? 4 : 2;  // rows whose sums fit the registers: AVX-512 has 32, AVX2 has 16

// Handles rows [i, i + count) together, so that the sums for weight and bias are loaded and stored once for all of them.
template <bool centred, int count, typename T, typename R>
void norm_rows_backward(const NormBackward<T, R>& a, int64_t i, float* grad_weight, float* grad_bias) {
  // Locals, because a vector store might alias the fields of `a`: the compiler would load them again after each store.
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

// Returns (grad_x, grad_branch, grad_weight, grad_bias); those that are not needed are empty.
template <bool centred>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad_out, const OptionalTensor& grad_summed, const Tensor& x, const OptionalTensor& weight,
    const Tensor& mean, const Tensor& rstd, bool need_weight, bool need_bias, bool need_branch) {
  const int64_t n = x.size(-1);
  const bool branch = need_branch && grad_out.scalar_type() != x.scalar_type();
  Tensor grad_x = result_like(x);
  Tensor grad_branch = branch ? empty(x.sizes(), grad_out.scalar_type()) : none_like(grad_out);
  Tensor grad_weight = empty_floats({need_weight ? n : 0}), grad_bias = empty_floats({need_bias ? n : 0});
  if (x.numel() == 0) return {grad_x, grad_branch, zeroed(grad_weight), zeroed(grad_bias)};
  const Rows out_rows(grad_out), rows(x), summed_rows(grad_summed ? *grad_summed : x);
  const Parameter w(weight);
  const Tensor means = as_contiguous(mean), deviations = as_contiguous(rstd);
  const int64_t blocks = sum_blocks(rows.rows), per_block = ceil_div(rows.rows, blocks);
  Tensor partial = zeroed(empty_floats({blocks, (need_weight ? n : 0) + (need_bias ? n : 0)}));
  const int64_t width = partial.size(1);
  float* sums = partial.mutable_data_ptr<float>();
  dispatch_stream(grad_out.scalar_type(), x.scalar_type(), [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    const NormBackward<T, R> a{
        out_rows.data<T>(), rows.data<R>(), grad_summed ? summed_rows.data<R>() : nullptr, w.data,
        centred ? means.const_data_ptr<float>() : nullptr, deviations.const_data_ptr<float>(),
        grad_x.mutable_data_ptr<R>(), branch ? grad_branch.mutable_data_ptr<T>() : nullptr,
        n, out_rows.stride, rows.stride, summed_rows.stride,
        goes_past_caches(grad_x) && (!branch || goes_past_caches(grad_branch))};
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
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
  if (need_weight) add_blocks(sums, blocks, width, n, grad_weight.mutable_data_ptr<float>());
  if (need_bias) add_blocks(sums + (need_weight ? n : 0), blocks, width, n, grad_bias.mutable_data_ptr<float>());
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

}  // namespace gptkernels
