// Products of whole matrices, C (m, n) = A (m, k) B (k, n), block by block through gemm.h. Packing a block converts 16-bit
// operands to Compute<T>; sums stay float until they are written, once. They replace PyTorch's products where those are slow
// or missing: 16-bit types on a CPU without instructions for them, and float results of 16-bit operands.
#pragma once

#include "csrc/gemm.h"

namespace gptkernels {

// Whether PyTorch multiplies matrices of T fast on this CPU: float always, 16-bit types if oneDNN has instructions for them.
// Otherwise PyTorch's loops are 10 to 100 times slower than for float.
template <typename T>
bool torch_multiplies() {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (!std::is_same_v<T, float>) {
    static const bool supported = [] {
      const char* name = std::is_same_v<T, Half> ? "mkldnn::_is_mkldnn_fp16_supported" : "mkldnn::_is_mkldnn_bf16_supported";
      StableIValue answer;  // the call fails in a PyTorch without oneDNN
      return torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION) == 0 && torch::stable::detail::to<bool>(answer);
    }();
    return supported;
  }
  return true;
#elif defined(__x86_64__)
  return std::is_same_v<T, float>;
#else
  return true;  // other CPUs have kernels of their own in PyTorch
#endif
}

// The same for logits, x W^T with many rows of W. With AVX2 our products are a third faster at that than MKL's.
template <typename T>
bool torch_multiplies_logits() {
#if defined(CPU_CAPABILITY_AVX2)
  return false;
#else
  return torch_multiplies<T>();
#endif
}

// Element (i, j) lies at data[i * stride + j], or transposed at data[j * stride + i].
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
  bool transposed;

  explicit Matrix(const Tensor& x) {  // (rows, columns), one of whose strides is 1
    transposed = x.stride(1) != 1 && x.size(1) != 1;
    stride = x.stride(transposed ? 1 : 0), data = x.const_data_ptr<T>();
  }
  Matrix(const T* data_, int64_t stride_, bool transposed_ = false) : data(data_), stride(stride_), transposed(transposed_) {}
  Matrix t() const { return {data, stride, !transposed}; }
  Matrix from_row(int64_t i) const { return {data + i * (transposed ? 1 : stride), stride, transposed}; }
  // For PyTorch's products; see `borrowed`.
  Tensor tensor(int64_t rows, int64_t columns) const {
    return borrowed(data, rows, columns, transposed ? 1 : stride, transposed ? stride : 1);
  }
};

// x as (x.numel() / columns, columns): a view if Matrix can describe it, else a copy.
inline Tensor as_matrix(const Tensor& given, int64_t columns) {
  const Tensor x = given.dim() == 2 ? given : torch::stable::reshape(given, {given.numel() / columns, columns});
  const bool described = (x.size(1) == 1 || x.stride(1) == 1) || (x.size(0) == 1 || x.stride(0) == 1);
  return described ? x : as_contiguous(x);
}

// out (m, n) = A (m, k) B (k, n) by PyTorch's kernel; `add` adds the product to out instead. Neither autograd nor autocast
// sees the call.
template <typename T>
void torch_product(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, bool add, T* out) {
  const Tensor left = a.tensor(m, k), right = b.tensor(k, n), result = borrowed(out, m, n, n, 1);
  TORCH_ERROR_CODE_CHECK(
      add ? aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1., 1.)
          : aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
}

constexpr int64_t kProductDepth = 256, kProductRows = 64;

// The blocks of one thread: rows of A, panels of B, and the sums of a block of C.
template <typename T>
struct ProductScratch {
  using C = Compute<T>;
  Scratch<C> left, panels, right, buffer;
  Scratch<float> sums;
  GemmScope scope;

  ProductScratch(int64_t rows, int64_t columns)
      : left(kProductRows * kProductDepth), panels(kProductRows * kProductDepth), right(kProductDepth * columns),
        buffer(std::max(kPanel * kProductDepth, 2 * std::max(columns, kProductRows))), sums(rows * columns) {}
};

// Packs rows [i, i + rows) of A at depths [k, k + depth), padded with zeros to `padded`.
template <typename T>
void pack_left(Matrix<T> a, int64_t i, int64_t rows, int64_t k, int64_t depth, int64_t padded, ProductScratch<T>& s) {
  using C = Compute<T>;
  if (!a.transposed)
    return copy_rows(a.data + i * a.stride + k, a.stride, rows, depth, s.left.get(), round_up(rows, kRowStep), padded);
  // Packs units of 32 bits (two bfloat16 that are neighbours in depth) as panels of rows, then transposes them.
  static_assert(kProductRows % kPanel == 0 && kProductRows % kRowStep == 0);
  pack_rows(a.data + k * a.stride + i, a.stride, depth, rows, s.panels.get(), padded, padded, kProductRows, s.buffer.get());
  const int64_t units = padded / Element<C>::step;
  const float* from = reinterpret_cast<const float*>(s.panels.get());
  float* to = reinterpret_cast<float*>(s.left.get());
  for (int64_t j = 0; j < kProductRows; j += kLanes)
    for (int64_t u = 0; u < units; u += kLanes)
      transpose_square(from + j / kPanel * kPanel * units + u * kPanel + j % kPanel, kPanel, to + j * units + u, units);
}

// Computes C and calls write(i, j, sums, count) once for each row i and block of columns [j, j + count); sums[0 .. count) are
// C's elements there. The order of each sum follows from k alone.
template <typename T, typename Write>
void product(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, Write write) {
  using C = Compute<T>;
  if (m == 0 || n == 0) return;
  // A is packed again for every block of columns, B for every block of rows. A transposed A is expensive to pack, so it gets
  // wide blocks of columns.
  const int64_t columns = a.transposed ? 512 : 128, most_rows = a.transposed ? 256 : 1024;
  const int64_t blocks = ceil_div(n, columns);
  const int64_t wanted = std::max(ceil_div(m, most_rows), ceil_div(3 * num_threads(), blocks));
  const int64_t rows = round_up(ceil_div(m, wanted), kProductRows), parts = ceil_div(m, rows);
  parallel_units(
      blocks * parts, [&] { return std::make_unique<ProductScratch<T>>(rows, round_up(std::min(columns, n), kPanel)); },
      [&](int64_t unit, std::unique_ptr<ProductScratch<T>>& state) {
        ProductScratch<T>& s = *state;
        const int64_t j = unit % blocks * columns, width = std::min(columns, n - j), padded_width = round_up(width, kPanel);
        const int64_t first = unit / blocks * rows, last = std::min(first + rows, m);
        if (k == 0) std::memset(s.sums.get(), 0, (last - first) * padded_width * sizeof(float));
        for (int64_t d = 0; d < k; d += kProductDepth) {
          const int64_t depth = std::min(kProductDepth, k - d);
          const int64_t padded = round_up(depth, std::max(Element<C>::depth, Element<C>::step * kLanes));
          if (b.transposed)
            pack_transposed(b.data + j * b.stride + d, b.stride, width, depth, s.right.get(), padded_width, padded, s.buffer.get());
          else
            pack_rows(b.data + d * b.stride + j, b.stride, depth, width, s.right.get(), padded, padded, padded_width, s.buffer.get());
          const auto right = Panels<C>::packed(s.right, padded);
          for (int64_t i = first; i < last; i += kProductRows) {
            const int64_t count = std::min(kProductRows, last - i), padded_rows = round_up(count, kRowStep);
            pack_left(a, i, count, d, depth, padded, s);
            float* sums = s.sums + (i - first) * padded_width;
            if (d == 0) gemm<false>(padded_rows, padded_width, padded, s.left.get(), padded, right, sums, padded_width);
            else gemm<true>(padded_rows, padded_width, padded, s.left.get(), padded, right, sums, padded_width);
          }
        }
        for (int64_t i = first; i < last; ++i) write(i, j, s.sums + (i - first) * padded_width, width);
      });
}

// Writes C in its own dtype, rounded once. `bias` (n), if not null, is added to each row.
template <typename T>
void product_to(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, const float* bias, T* out) {
  product(m, n, k, a, b, [&](int64_t i, int64_t j, const float* sums, int64_t count) {
    sweep(count, [&](int64_t c, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      Vec v = load(sums + c, lanes);
      if (bias) v = v + load(bias + j + c, lanes);
      store(out + i * n + j + c, v, lanes);
    });
  });
}

// Writes C as floats into `out`; `add` adds it to `out` instead.
template <typename T>
void product_to_floats(int64_t m, int64_t n, int64_t k, Matrix<T> a, Matrix<T> b, bool add, float* out) {
  product(m, n, k, a, b, [&](int64_t i, int64_t j, const float* sums, int64_t count) {
    float* to = out + i * n + j;
    sweep(count, [&](int64_t c, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      const Vec v = load(sums + c, lanes);
      store(to + c, add ? load(to + c, lanes) + v : v, lanes);
    });
  });
}

// out (columns) += the column sums of x (rows, columns). The threads share the columns.
template <typename T>
void add_column_sums(const T* x, int64_t stride, int64_t rows, int64_t columns, float* out) {
  constexpr int64_t kColumns = 256, kRows = 16;  // partial sums of few rows, so that rounding does not grow with the rows
  parallel_for(0, ceil_div(columns, kColumns), 1, [&](int64_t begin, int64_t end) {
    alignas(64) float part[kColumns];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t start = c * kColumns, count = std::min(kColumns, columns - start);
      for (int64_t first = 0; first < rows; first += kRows) {
        std::fill_n(part, kColumns, 0.f);
        for (int64_t i = first; i < std::min(first + kRows, rows); ++i)
          sweep(count, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
            store(part + j, load(part + j, lanes) + load(x + i * stride + start + j, lanes), lanes);
          });
        for (int64_t j = 0; j < count; ++j) out[start + j] += part[j];
      }
    }
  });
}

}  // namespace gptkernels
