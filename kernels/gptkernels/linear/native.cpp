// linear on the CPU. For a few rows, as in generation, the time is that of reading the weight: it is read once, without packing.
// More rows are a product of matrices (csrc/product.h).
#include "csrc/product.h"

namespace gptkernels {
namespace {

constexpr int64_t kFewRows = 16;  // up to so many rows share one reading of the weight

// Products of kX rows of x with kW rows of the weight, in eight accumulators: sums[w * kX + r]. With one row of x, kW is 1:
// memory delivers a single stream 1.5 times as fast as several. With many rows, kW is 2, because reading x limits the speed.
template <int kX, int kW, typename T>
ALWAYS_INLINE void dot_rows(const float* x, const T* weight, int64_t stride_w, int64_t depth, float* sums) {
  constexpr int kDeep = 8 / (kX * kW);
  constexpr int64_t kAhead = 1024 / sizeof(T);  // the CPU's own prefetcher stops at every page
  Vec part[kDeep][kW][kX];
#pragma GCC unroll 8
  for (int d = 0; d < kDeep; ++d)
#pragma GCC unroll 8
    for (int w = 0; w < kW; ++w)
#pragma GCC unroll 8
      for (int r = 0; r < kX; ++r) part[d][w][r] = Vec(0.f);
  const auto step = [&](int64_t k, auto lanes, int d) ALWAYS_INLINE_LAMBDA {
    Vec right[kW];
#pragma GCC unroll 8
    for (int w = 0; w < kW; ++w) right[w] = load(weight + w * stride_w + k, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kX; ++r) {
      const Vec left = load(x + r * depth + k, lanes);
#pragma GCC unroll 8
      for (int w = 0; w < kW; ++w) part[d][w][r] = fmadd(left, right[w], part[d][w][r]);
    }
  };
  int64_t k = 0;
  for (; k + kDeep * kLanes <= depth; k += kDeep * kLanes) {
#pragma GCC unroll 8
    for (int d = 0; d < kDeep; ++d) {
      for (int w = 0; w < kW; ++w) __builtin_prefetch(weight + w * stride_w + k + d * kLanes + kAhead);
      step(k + d * kLanes, All{}, d);
    }
  }
  for (; k + kLanes <= depth; k += kLanes) step(k, All{}, 0);
  if (k < depth) step(k, depth - k, kDeep - 1);
#pragma GCC unroll 8
  for (int w = 0; w < kW; ++w)
#pragma GCC unroll 8
    for (int r = 0; r < kX; ++r) {
      Vec total = part[0][w][r];
      for (int d = 1; d < kDeep; ++d) total = total + part[d][w][r];
      sums[w * kX + r] = sum(total);
    }
}

// out (rows, n) = x (rows, depth) weight (n, depth)^T + bias; x is contiguous.
template <typename T>
void few_rows(const float* x, const T* weight, int64_t stride_w, const float* bias, int64_t rows, int64_t n, int64_t depth, T* out) {
  constexpr int64_t kNear = 4096;  // so many floats of x leave room for the weight in the first-level cache
  const int64_t step = rows * depth > kNear ? 2 : 1, grain = std::max<int64_t>(1, 32768 / (step * std::max<int64_t>(depth, 1)));
  parallel_for(0, ceil_div(n, step), grain, [&](int64_t begin, int64_t end) {
    // kX rows of x from r on, and kW rows of the weight from j on.
    const auto run = [&](auto x_rows, auto w_rows, int64_t r, int64_t j) {
      constexpr int kX = decltype(x_rows)::value, kW = decltype(w_rows)::value;
      float sums[kW * kX];
      dot_rows<kX, kW>(x + r * depth, weight + j * stride_w, stride_w, depth, sums);
      for (int w = 0; w < kW; ++w)
        for (int i = 0; i < kX; ++i) out[(r + i) * n + j + w] = static_cast<T>(sums[w * kX + i] + (bias ? bias[j + w] : 0.f));
    };
    using std::integral_constant;
    const auto all_rows = [&](auto w_rows, int64_t j) {
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) run(integral_constant<int, 4>{}, w_rows, r, j);
      for (; r + 2 <= rows; r += 2) run(integral_constant<int, 2>{}, w_rows, r, j);
      if (r < rows) run(integral_constant<int, 1>{}, w_rows, r, j);
    };
    for (int64_t j = begin * step; j < std::min(end * step, n); j += step) {
      if (step == 2 && j + 1 < n) all_rows(integral_constant<int, 2>{}, j);
      else all_rows(integral_constant<int, 1>{}, j);
    }
  });
}

Tensor linear_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t n = weight.size(0), depth = weight.size(1);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  Tensor out = empty(shape, x.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t m = out.numel() / n;
  const Parameter b(bias);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* y = out.mutable_data_ptr<T>();
    if (m <= kFewRows && (depth <= 1 || weight.stride(1) == 1)) {
      const Tensor floats = converted(x, ScalarType::Float);
      few_rows(floats.const_data_ptr<float>(), weight.const_data_ptr<T>(), weight.stride(0), b.data, m, n, depth, y);
      return;
    }
    const Tensor left = as_matrix(x, depth), right = as_matrix(weight, depth);
    product_to(m, n, depth, Matrix<T>(left), Matrix<T>(right).t(), b.data, y);
  });
  return out;
}

// Returns (grad_x, grad_weight, grad_bias); those that are not needed are empty.
std::tuple<Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight, bool need_bias) {
  const int64_t n = weight.size(0), depth = weight.size(1);
  Tensor grad_x = need_x ? result_like(x) : none_like(x);
  Tensor grad_weight = need_weight ? empty_floats(weight.sizes()) : empty_floats({0});
  Tensor grad_bias = need_bias ? zeroed(empty_floats({n})) : empty_floats({0});
  if (grad_out.numel() == 0) return {zeroed(grad_x), zeroed(grad_weight), grad_bias};
  const int64_t m = grad_out.numel() / n;
  const Tensor g = as_matrix(grad_out, n), left = as_matrix(x, depth), w = as_matrix(weight, depth);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Matrix<T> gradient(g);
    if (need_x) product_to(m, depth, n, gradient, Matrix<T>(w), nullptr, grad_x.mutable_data_ptr<T>());
    if (need_weight) product_to_floats(n, depth, m, gradient.t(), Matrix<T>(left), false, grad_weight.mutable_data_ptr<float>());
    if (need_bias) {
      const Rows rows(grad_out);
      add_column_sums(rows.data<T>(), rows.stride, m, n, grad_bias.mutable_data_ptr<float>());
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

bool multiplies(ScalarType dtype) {
  bool result = false;
  dispatch(dtype, [&](auto t) { result = torch_multiplies<decltype(t)>(); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gptkernels_native, m) {
  m.def("multiplies(ScalarType dtype) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CompositeExplicitAutograd, m) {
  m.impl("multiplies", TORCH_BOX(multiplies));
}

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(linear_forward));
  m.impl("linear_backward", TORCH_BOX(linear_backward));
}

}  // namespace gptkernels
