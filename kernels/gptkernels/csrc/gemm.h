// Small matrix products on blocks that lie in cache: C[M, N] (+)= A[M, K] B[K, N], accumulated in float.
//
// A is row-major. B lies in panels of kPanel columns, and within a panel `step` neighbouring values of k lie together for
// each column (two for bfloat16, the order that both vdpbf16ps and the AMX tiles read; one for float). C is row-major
// float. M, N and K are multiples of kRowStep, kPanel and Element<T>::depth: callers pad their blocks with zeros.
#pragma once

#include <cstring>

#include "csrc/common.h"

#if defined(__AMX_BF16__) || defined(GPTKERNELS_EMULATE_AMX)
#define GPTKERNELS_TILES 1
#endif

namespace gptkernels {

constexpr int64_t kPanel = 2 * kLanes;

#if defined(GPTKERNELS_TILES)
constexpr int64_t kRowStep = 16;
#elif defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kRowStep = 8;
#else
constexpr int64_t kRowStep = 4;
#endif

template <typename T>
struct Element;
template <>
struct Element<float> {
  static constexpr int64_t step = 1, depth = 1;
};
template <>
struct Element<BFloat16> {
#if defined(GPTKERNELS_TILES)
  static constexpr int64_t step = 2, depth = 32;
#else
  static constexpr int64_t step = 2, depth = 2;
#endif
};

// The type that products of T are computed in: bfloat16 where the CPU can multiply it, else float.
#if defined(__AVX512BF16__)
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;
#else
template <typename T>
using Compute = float;
#endif

// B, or a block of it: element (k, n) of panel p begins at data + p * panel + (k / step) * row + (n * step).
template <typename C>
struct Panels {
  const C* data;
  int64_t panel, row;

  // Packed panels of depth K.
  static Panels packed(const C* data, int64_t depth) { return {data, depth * kPanel, kPanel * Element<C>::step}; }
  // A row-major float matrix already has the layout of panels.
  static Panels row_major(const float* data, int64_t stride) { return {data, kPanel, stride}; }
  // The part from column n and depth k on; n is a multiple of kPanel, k of step.
  Panels at(int64_t k, int64_t n) const { return {data + n / kPanel * panel + k / Element<C>::step * row, panel, row}; }
};

#if defined(GPTKERNELS_TILES)

// The eight AMX tile registers of 16 rows of 64 bytes. Emulated in software for tests on CPUs without AMX.
#if defined(GPTKERNELS_EMULATE_AMX)
namespace tiles {
struct Tile {
  alignas(64) unsigned char bytes[16][64];
};
inline thread_local Tile registers[8];
struct Scope {};
template <int t>
void zero() { std::memset(&registers[t], 0, sizeof(Tile)); }
template <int t>
void load(const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(registers[t].bytes[r], static_cast<const char*>(p) + r * stride, 64);
}
template <int t>
void store(void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(p) + r * stride, registers[t].bytes[r], 64);
}
template <int c, int a, int b>
void multiply() {
  for (int m = 0; m < 16; ++m) {
    float out[16];
    std::memcpy(out, registers[c].bytes[m], 64);
    for (int k = 0; k < 16; ++k) {
      BFloat16 left[2], right[32];
      std::memcpy(left, registers[a].bytes[m] + 4 * k, 4);
      std::memcpy(right, registers[b].bytes[k], 64);
      for (int n = 0; n < 16; ++n) out[n] += float(left[0]) * float(right[2 * n]) + float(left[1]) * float(right[2 * n + 1]);
    }
    std::memcpy(registers[c].bytes[m], out, 64);
  }
}
}  // namespace tiles
#else
namespace tiles {
// Sets the shape of the tiles for a scope. The shape is a state of the thread, and other code in the process (oneDNN) sets
// its own, so the scope must not call such code.
struct Scope {
  Scope() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Scope() { _tile_release(); }
  Scope(const Scope&) = delete;
};
// In assembly, because the compilers' intrinsics take only literal register numbers, not template arguments.
template <int t>
ALWAYS_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int t>
ALWAYS_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
ALWAYS_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int c, int a, int b>
ALWAYS_INLINE void multiply() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b)); }
}  // namespace tiles
#endif

// A product of 32 rows (16 if `both` is false) and 32 columns: four (two) tiles of C stay in registers over all of K.
template <bool accumulate, bool both>
void tile_block(int64_t depth, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t row, float* c, int64_t ldc) {
  const int64_t bytes_c = ldc * 4, bytes_a = lda * 2, bytes_b = row * 2;
  if constexpr (accumulate) {
    tiles::load<0>(c, bytes_c);
    tiles::load<1>(c + 16, bytes_c);
    if constexpr (both) tiles::load<2>(c + 16 * ldc, bytes_c), tiles::load<3>(c + 16 * ldc + 16, bytes_c);
  } else {
    tiles::zero<0>(), tiles::zero<1>();
    if constexpr (both) tiles::zero<2>(), tiles::zero<3>();
  }
  for (int64_t k = 0; k < depth; k += 32) {
    tiles::load<6>(b + k / 2 * row, bytes_b);
    tiles::load<7>(b + k / 2 * row + 32, bytes_b);
    tiles::load<4>(a + k, bytes_a);
    tiles::multiply<0, 4, 6>();
    tiles::multiply<1, 4, 7>();
    if constexpr (both) {
      tiles::load<5>(a + 16 * lda + k, bytes_a);
      tiles::multiply<2, 5, 6>();
      tiles::multiply<3, 5, 7>();
    }
  }
  tiles::store<0>(c, bytes_c);
  tiles::store<1>(c + 16, bytes_c);
  if constexpr (both) tiles::store<2>(c + 16 * ldc, bytes_c), tiles::store<3>(c + 16 * ldc + 16, bytes_c);
}

using GemmScope = tiles::Scope;
#else
struct GemmScope {};
#endif

// A product of kRows rows and one panel in vector registers. The old values of C are added last: a sum of partial sums errs
// less than one long sum.
template <bool accumulate, int kRows>
ALWAYS_INLINE void register_block(
    int64_t depth, const float* a, int64_t lda, const float* b, int64_t row, float* c, int64_t ldc) {
  Vec sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = sums[r][1] = Vec(0.f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b + k * row), b1 = load(b + k * row + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec left(a[r * lda + k]);
      sums[r][0] = fmadd(left, b0, sums[r][0]);
      sums[r][1] = fmadd(left, b1, sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if constexpr (accumulate) {
      sums[r][0] = load(c + r * ldc) + sums[r][0];
      sums[r][1] = load(c + r * ldc + kLanes) + sums[r][1];
    }
    store(c + r * ldc, sums[r][0]);
    store(c + r * ldc + kLanes, sums[r][1]);
  }
}

#if defined(__AVX512BF16__)
template <bool accumulate, int kRows>
ALWAYS_INLINE void register_block(
    int64_t depth, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t row, float* c, int64_t ldc) {
  __m512 sums[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k / 2 * row);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + k / 2 * row + 32);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int pair;
      std::memcpy(&pair, a + r * lda + k, 4);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, b0);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], left, b1);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if constexpr (accumulate) {
      sums[r][0] = _mm512_add_ps(_mm512_loadu_ps(c + r * ldc), sums[r][0]);
      sums[r][1] = _mm512_add_ps(_mm512_loadu_ps(c + r * ldc + 16), sums[r][1]);
    }
    _mm512_storeu_ps(c + r * ldc, sums[r][0]);
    _mm512_storeu_ps(c + r * ldc + 16, sums[r][1]);
  }
}
#endif

template <bool accumulate, typename C>
void gemm(int64_t m, int64_t n, int64_t depth, const C* a, int64_t lda, Panels<C> b, float* c, int64_t ldc) {
  for (int64_t panel = 0; panel < n / kPanel; ++panel) {
    const C* columns = b.data + panel * b.panel;
    float* out = c + panel * kPanel;
#if defined(GPTKERNELS_TILES)
    if constexpr (std::is_same_v<C, BFloat16>) {
      int64_t i = 0;
      for (; i + 32 <= m; i += 32) tile_block<accumulate, true>(depth, a + i * lda, lda, columns, b.row, out + i * ldc, ldc);
      if (i < m) tile_block<accumulate, false>(depth, a + i * lda, lda, columns, b.row, out + i * ldc, ldc);
      continue;
    }
#endif
    constexpr int kRows = kRowStep > 8 ? 8 : kRowStep;
    for (int64_t i = 0; i < m; i += kRows)
      register_block<accumulate, kRows>(depth, a + i * lda, lda, columns, b.row, out + i * ldc, ldc);
  }
}

// C (+)= A B with each sum in double, rounded once. Columns from `real` on are padding: there C stays, or becomes 0.
template <bool accumulate>
void gemm_in_double(
    int64_t m, int64_t n, int64_t real, int64_t depth, const float* a, int64_t lda, Panels<float> b, float* c, int64_t ldc) {
  constexpr int64_t lanes = Doubles::size();
  for (int64_t j = 0; j < n; j += lanes) {
    const float* columns = b.data + j / kPanel * b.panel + j % kPanel;
    for (int64_t i = 0; i < m; ++i) {
      Doubles sum(0.);
      if (j < real)
        for (int64_t k = 0; k < depth; ++k)
          sum = at::vec::fmadd(Doubles(static_cast<double>(a[i * lda + k])), load_doubles(columns + k * b.row), sum);
      if constexpr (accumulate) sum = load_doubles(c + i * ldc + j) + sum;
      store(c + i * ldc + j, sum);
    }
  }
}

// Copies (rows, columns) of T as the compute type, padded with zeros to (padded_rows, stride).
template <typename C, typename T>
void copy_rows(const T* x, int64_t stride_x, int64_t rows, int64_t columns, C* out, int64_t padded_rows, int64_t stride) {
  for (int64_t i = 0; i < padded_rows; ++i) {
    C* to = out + i * stride;
    if (i >= rows) {
      std::memset(static_cast<void*>(to), 0, stride * sizeof(C));
      continue;
    }
    if constexpr (std::is_same_v<C, T>) {
      std::memcpy(static_cast<void*>(to), x + i * stride_x, columns * sizeof(C));
    } else {
      sweep(columns, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA { store(to + j, load(x + i * stride_x + j, lanes), lanes); });
    }
    std::memset(static_cast<void*>(to + columns), 0, (stride - columns) * sizeof(C));
  }
}

// Transposes kLanes by kLanes units of 32 bits. `flatten` inlines ATen's function, so that the compiler drops its check of the
// sizes: the check calls a function of PyTorch that is not in the stable interface.
inline __attribute__((flatten, noinline)) void transpose_square(const float* from, int64_t stride_from, float* to, int64_t stride_to) {
#if defined(CPU_CAPABILITY_AVX512)
  at::vec::transpose_mxn<float>(from, stride_from, to, stride_to, 16, 16);
#elif defined(CPU_CAPABILITY_AVX2)
  at::vec::transpose_mxn<float>(from, stride_from, to, stride_to, 8, 8);
#else
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) to[j * stride_to + i] = from[i * stride_from + j];
#endif
}

// Packs B whose columns are rows of x (n rows of k contiguous values), padded with zeros to `padded_n` and `depth`. `buffer`
// has room for kPanel rows of round_up(depth, kLanes * step).
template <typename C, typename T>
void pack_transposed(const T* x, int64_t stride_x, int64_t n, int64_t k, C* out, int64_t padded_n, int64_t depth, C* buffer) {
  constexpr int64_t step = Element<C>::step;
  const int64_t stride = round_up(depth, kLanes * step);
  for (int64_t p = 0; p < padded_n / kPanel; ++p) {
    const int64_t first = p * kPanel;
    copy_rows(x + first * stride_x, stride_x, std::clamp<int64_t>(n - first, 0, kPanel), k, buffer, kPanel, stride);
    // A pair of bfloat16 moves as one 32-bit unit.
    const float* from = reinterpret_cast<const float*>(buffer);
    float* to = reinterpret_cast<float*>(out + p * kPanel * depth);
    const int64_t units = depth / step, from_stride = stride / step;
    for (int64_t u = 0; u < units; u += kLanes) {
      for (int64_t half = 0; half < kPanel; half += kLanes) {
        if (u + kLanes <= units) {
          transpose_square(from + half * from_stride + u, from_stride, to + u * kPanel + half, kPanel);
        } else {
          alignas(64) float square[kLanes * kLanes];
          transpose_square(from + half * from_stride + u, from_stride, square, kLanes);
          for (int64_t i = 0; u + i < units; ++i) store(to + (u + i) * kPanel + half, load(square + i * kLanes));
        }
      }
    }
  }
}

// Packs B whose rows are rows of x (k rows of n contiguous values), padded with zeros to `padded_k` and `padded_n`. Panels are
// `depth` deep, so that a part of B can be packed by itself. `buffer` has room for two rows of padded_n.
template <typename C, typename T>
void pack_rows(const T* x, int64_t stride_x, int64_t k, int64_t n, C* out, int64_t padded_k, int64_t depth, int64_t padded_n,
               C* buffer) {
  constexpr int64_t step = Element<C>::step;
  for (int64_t i = 0; i < padded_k; i += step) {
    copy_rows(x + i * stride_x, stride_x, std::clamp<int64_t>(k - i, 0, step), n, buffer, step, padded_n);
    for (int64_t p = 0; p < padded_n / kPanel; ++p) {
      C* to = out + p * kPanel * depth + i * kPanel;
      const C* from = buffer + p * kPanel;
      if constexpr (step == 1) {
        std::memcpy(static_cast<void*>(to), from, kPanel * sizeof(C));
      } else {
        for (int64_t j = 0; j < kPanel; ++j) to[2 * j] = from[j], to[2 * j + 1] = from[padded_n + j];
      }
    }
  }
}

}  // namespace gptkernels
