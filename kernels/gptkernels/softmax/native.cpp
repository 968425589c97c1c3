// softmax on the CPU. The exponentials of a row stay in the first-level cache between the sum and the division.
#include "csrc/common.h"

namespace gptkernels {
namespace {

// The number of columns that row `i` keeps: all, or with `causal` those up to its position; the last row keeps all.
int64_t kept_columns(bool causal, int64_t i, int64_t queries, int64_t columns) {
  return causal ? std::clamp<int64_t>(i % queries + 1 + columns - queries, 0, columns) : columns;
}

// Whether every score of a row is -inf: the row then gives zeros. False if one is NaN.
template <typename T>
bool nothing_to_sum(float top, const T* x, int64_t n) {
  return top == -kInfinity && std::none_of(x, x + n, [](T v) { return std::isnan(static_cast<float>(v)); });
}

// Prefetches the row at x + ahead meanwhile.
template <typename T>
void forward_row(const T* x, int64_t ahead, T* out, float* buffer, int64_t kept, int64_t n, float scale, bool past) {
  // Float rows need no buffer: the exponentials are stored where the result will be, unless that bypasses the caches.
  float* row = buffer;
  if constexpr (std::is_same_v<T, float>) row = past ? buffer : out;
  Vec top[4] = {Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity)};
  sweep(kept, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    const Vec v = keep(load(x + j, lanes), lanes, -kInfinity);
    __builtin_prefetch(x + ahead + j);
    if constexpr (!std::is_same_v<T, float>) store(row + j, v, lanes);
    top[k] = larger(v, top[k]);
  });
  const float highest = max(larger(larger(top[0], top[1]), larger(top[2], top[3])));
  if (nothing_to_sum(highest, x, kept)) {
    put_zeros(out, n, past);
    return;
  }
  Sum total;
  sweep(kept, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    Vec v;
    if constexpr (std::is_same_v<T, float>) v = load(x + j, lanes);
    else v = load(row + j, lanes);
    const Vec e = keep(exp((v - Vec(highest)) * Vec(scale)), lanes, 0.f);
    store(row + j, e, lanes);
    total.add(e, k);
  });
  const Vec inverse(1.f / total.total());
  sweep(kept, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
    put(out + j, load(row + j, lanes) * inverse, lanes, past);
  });
  put_zeros(out + kept, n - kept, past);
}

// Prefetches the rows at grad_out + ahead_out and y + ahead_y meanwhile.
template <typename T>
void backward_row(const T* grad_out, int64_t ahead_out, const T* y, int64_t ahead_y, T* grad_x, int64_t kept, int64_t n,
                  float scale, bool past) {
  Sum along;
  sweep(kept, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    __builtin_prefetch(grad_out + ahead_out + j), __builtin_prefetch(y + ahead_y + j);
    along.add(load(grad_out + j, lanes), load(y + j, lanes), k);
  });
  float mean = along.total();
  // The weights of a row sum to 1 except for rounding, and for a peaked row that error is all that is left of the gradient.
  // Subtracting the mean of the differences as well removes it.
  Sum rest;
  sweep(kept, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    rest.add(load(y + j, lanes), load(grad_out + j, lanes) - Vec(mean), k);
  });
  mean += rest.total();
  sweep(kept, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
    put(grad_x + j, load(y + j, lanes) * (load(grad_out + j, lanes) - Vec(mean)) * Vec(scale), lanes, past);
  });
  put_zeros(grad_x + kept, n - kept, past);
}

// A dimension that is not the last, (outer, n, inner) in memory: up to kColumns neighbouring columns at a time.
constexpr int64_t kColumns = 64;

template <typename T>
void forward_columns(const T* x, T* out, float* block, int64_t n, int64_t inner, int64_t width, float scale) {
  float highest[kColumns], total[kColumns];
  std::fill_n(highest, kColumns, -kInfinity);
  std::fill_n(total, kColumns, 0.f);
  for (int64_t i = 0; i < n; ++i)
    sweep(width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      store(highest + j, larger(load(x + i * inner + j, lanes), load(highest + j, lanes)), lanes);
    });
  for (int64_t j = 0; j < width; ++j) {
    bool any_nan = false;
    if (highest[j] == -kInfinity)
      for (int64_t i = 0; i < n; ++i) any_nan |= std::isnan(static_cast<float>(x[i * inner + j]));
    // exp(-inf - 0) is 0 everywhere, and the sum of 0 is replaced below.
    if (highest[j] == -kInfinity && !any_nan) highest[j] = 0.f;
  }
  for (int64_t i = 0; i < n; ++i)
    sweep(width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      const Vec e = exp((load(x + i * inner + j, lanes) - load(highest + j, lanes)) * Vec(scale));
      store(block + i * kColumns + j, e, lanes);
      store(total + j, load(total + j, lanes) + e, lanes);
    });
  for (int64_t j = 0; j < width; ++j) total[j] = total[j] == 0.f ? 0.f : 1.f / total[j];
  for (int64_t i = 0; i < n; ++i)
    sweep(width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      store(out + i * inner + j, load(block + i * kColumns + j, lanes) * load(total + j, lanes), lanes);
    });
}

template <typename T>
void backward_columns(const T* grad_out, const T* y, T* grad_x, int64_t n, int64_t inner, int64_t width, float scale) {
  float along[kColumns];
  std::fill_n(along, kColumns, 0.f);
  for (int64_t i = 0; i < n; ++i)
    sweep(width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      const int64_t at = i * inner + j;
      store(along + j, fmadd(load(grad_out + at, lanes), load(y + at, lanes), load(along + j, lanes)), lanes);
    });
  float rest[kColumns];  // the mean of the differences, as in backward_row
  std::fill_n(rest, kColumns, 0.f);
  for (int64_t i = 0; i < n; ++i)
    sweep(width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      const int64_t at = i * inner + j;
      const Vec left = load(grad_out + at, lanes) - load(along + j, lanes);
      store(rest + j, fmadd(left, load(y + at, lanes), load(rest + j, lanes)), lanes);
    });
  for (int64_t j = 0; j < kColumns; ++j) along[j] += rest[j];
  for (int64_t i = 0; i < n; ++i)
    sweep(width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      const int64_t at = i * inner + j;
      store(grad_x + at, load(y + at, lanes) * (load(grad_out + at, lanes) - load(along + j, lanes)) * Vec(scale), lanes);
    });
}

struct Columns {
  int64_t outer = 1, n, inner = 1, blocks;
  Columns(const Tensor& x, int64_t dim) : n(x.size(dim)) {
    for (int64_t d = 0; d < dim; ++d) outer *= x.size(d);
    for (int64_t d = dim + 1; d < x.dim(); ++d) inner *= x.size(d);
    blocks = ceil_div(inner, kColumns);
  }
  int64_t offset(int64_t unit) const { return unit / blocks * n * inner + unit % blocks * kColumns; }
  int64_t width(int64_t unit) const { return std::min(kColumns, inner - unit % blocks * kColumns); }
};

Tensor softmax_forward(const Tensor& x, int64_t dim, double scale, bool causal) {
  Tensor out = result_like(x);
  if (x.numel() == 0) return out;
  dim = dim < 0 ? dim + x.dim() : dim;
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* y = out.mutable_data_ptr<T>();
    if (dim == x.dim() - 1) {
      const Rows rows(x);
      const int64_t n = rows.columns, queries = causal ? x.size(-2) : 1;
      const bool past = goes_past_caches(out);
      parallel_for(0, rows.rows, std::max<int64_t>(1, 8192 / n), [&](int64_t begin, int64_t end) {
        Scratch<float> row(n);
        for (int64_t i = begin; i < end; ++i)
          forward_row(rows.data<T>() + i * rows.stride, rows.stride, y + i * n, row.get(), kept_columns(causal, i, queries, n), n,
                      static_cast<float>(scale), past);
        if (past) drain();
      });
      return;
    }
    const Tensor whole = as_contiguous(x);
    const T* from = whole.const_data_ptr<T>();
    const Columns c(x, dim);
    parallel_for(0, c.outer * c.blocks, std::max<int64_t>(1, 8192 / (c.n * kColumns)), [&](int64_t begin, int64_t end) {
      Scratch<float> block(c.n * kColumns);
      for (int64_t u = begin; u < end; ++u)
        forward_columns(from + c.offset(u), y + c.offset(u), block.get(), c.n, c.inner, c.width(u),
                        static_cast<float>(scale));
    });
  });
  return out;
}

Tensor softmax_backward(const Tensor& grad_out, const Tensor& out, int64_t dim, double scale, bool causal) {
  Tensor grad_x = result_like(out);
  if (out.numel() == 0) return grad_x;
  dim = dim < 0 ? dim + out.dim() : dim;
  dispatch(out.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* gradient = grad_x.mutable_data_ptr<T>();
    if (dim == out.dim() - 1) {
      const Rows y(out), g(grad_out);
      const int64_t n = y.columns, queries = causal ? out.size(-2) : 1;
      const bool past = goes_past_caches(grad_x);
      parallel_for(0, y.rows, std::max<int64_t>(1, 8192 / n), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          backward_row(g.data<T>() + i * g.stride, g.stride, y.data<T>() + i * y.stride, y.stride, gradient + i * n,
                       kept_columns(causal, i, queries, n), n, static_cast<float>(scale), past);
        if (past) drain();
      });
      return;
    }
    const Tensor y = as_contiguous(out), g = as_contiguous(grad_out);
    const T *from_y = y.const_data_ptr<T>(), *from_g = g.const_data_ptr<T>();
    const Columns c(out, dim);
    parallel_for(0, c.outer * c.blocks, std::max<int64_t>(1, 8192 / (c.n * kColumns)), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        backward_columns(from_g + c.offset(u), from_y + c.offset(u), gradient + c.offset(u), c.n, c.inner, c.width(u),
                         static_cast<float>(scale));
    });
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("softmax_forward", TORCH_BOX(softmax_forward));
  m.impl("softmax_backward", TORCH_BOX(softmax_backward));
}

}  // namespace gptkernels
