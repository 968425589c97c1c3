// Vectors of float on top of at::vec: loads that widen 16-bit types, stores that round to them, tails, sums, exp.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

namespace gptkernels {

using c10::BFloat16;
using c10::Half;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// All lanes, known at compile time. A function that takes All also takes `int64_t count`, the first lanes of a tail.
struct All {};

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

#if defined(CPU_CAPABILITY_AVX512)

ALWAYS_INLINE Vec load(const float* p, All) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE Vec load(const BFloat16* p, All) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
ALWAYS_INLINE Vec load(const Half* p, All) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ALWAYS_INLINE __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
ALWAYS_INLINE Vec load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
ALWAYS_INLINE Vec load(const BFloat16* p, int64_t count) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
ALWAYS_INLINE Vec load(const Half* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), p));
}

// Rounds to nearest, ties to even; NaN stays NaN.
ALWAYS_INLINE __m256i narrow(const BFloat16*, Vec v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  return at::vec::cvtfp32_bf16(v);
#endif
}
ALWAYS_INLINE __m256i narrow(const Half*, Vec v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ALWAYS_INLINE void store(float* p, Vec v, All) { _mm512_storeu_ps(p, v); }
ALWAYS_INLINE void store(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), v); }
template <typename T>
ALWAYS_INLINE void store(T* p, Vec v, All) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
}
template <typename T>
ALWAYS_INLINE void store(T* p, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, lanes(count), narrow(p, v));
}

ALWAYS_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
ALWAYS_INLINE float max(Vec v) { return _mm512_reduce_max_ps(v); }

#else

template <typename T>
ALWAYS_INLINE Vec load(const T* p, int64_t count) {
  alignas(64) float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec::loadu(lanes);
}
template <typename T>
ALWAYS_INLINE void store(T* p, Vec v, int64_t count) {
  alignas(64) float lanes[kLanes];
  v.store(lanes);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(lanes[i]);
}
template <typename T>
ALWAYS_INLINE Vec load(const T* p, All) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p);
  } else {
    Vec v;
    if constexpr (std::is_same_v<T, BFloat16>) at::vec::load_fp32_from_bf16(p, v);
    else at::vec::load_fp32_from_fp16(p, v);
    return v;
  }
}
template <typename T>
ALWAYS_INLINE void store(T* p, Vec v, All) {
  if constexpr (std::is_same_v<T, float>) {
    v.store(p);
  } else {
#if defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<T, BFloat16>) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(static_cast<__m256>(v)));
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_fp16(static_cast<__m256>(v)));
    }
#else
    store(p, v, kLanes);
#endif
  }
}
#if defined(CPU_CAPABILITY_AVX2)
ALWAYS_INLINE float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// The largest lane. NaN lanes are ignored, as the CPU's maximum instruction does; callers look for NaN themselves.
ALWAYS_INLINE float max(Vec v) {
  // If either operand is NaN the instruction returns the second. That one starts at -inf and never becomes NaN.
  __m256 known = _mm256_max_ps(v, _mm256_set1_ps(-kInfinity));
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(known), _mm256_extractf128_ps(known, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
#else
ALWAYS_INLINE float sum(Vec v) {
  alignas(64) float lanes[kLanes];
  v.store(lanes);
  for (int64_t step = kLanes / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
// The largest lane. NaN lanes are ignored, as the CPU's maximum instruction does; callers look for NaN themselves.
ALWAYS_INLINE float max(Vec v) {
  alignas(64) float lanes[kLanes];
  v.store(lanes);
  float result = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}
#endif

#endif

// Half a vector of floats as doubles, and back.
using Doubles = at::vec::Vectorized<double>;
#if defined(CPU_CAPABILITY_AVX512)
ALWAYS_INLINE Doubles load_doubles(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
ALWAYS_INLINE void store(float* p, Doubles v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
ALWAYS_INLINE double sum(Doubles v) { return _mm512_reduce_add_pd(v); }
#elif defined(CPU_CAPABILITY_AVX2)
ALWAYS_INLINE Doubles load_doubles(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
ALWAYS_INLINE void store(float* p, Doubles v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
ALWAYS_INLINE double sum(Doubles v) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
#else
ALWAYS_INLINE Doubles load_doubles(const float* p) {
  double lanes[Doubles::size()];
  for (int64_t i = 0; i < Doubles::size(); ++i) lanes[i] = p[i];
  return Doubles::loadu(lanes);
}
ALWAYS_INLINE void store(float* p, Doubles v) {
  double lanes[Doubles::size()];
  v.store(lanes);
  for (int64_t i = 0; i < Doubles::size(); ++i) p[i] = static_cast<float>(lanes[i]);
}
ALWAYS_INLINE double sum(Doubles v) {
  double lanes[Doubles::size()], total = 0.;
  v.store(lanes);
  for (double lane : lanes) total += lane;
  return total;
}
#endif

ALWAYS_INLINE Doubles load_doubles(const double* p) { return Doubles::loadu(p); }

template <typename T>
ALWAYS_INLINE Vec load(const T* p) { return load(p, All{}); }
template <typename T>
ALWAYS_INLINE void store(T* p, Vec v) { store(p, v, All{}); }

// Non-temporal stores to an aligned address. They bypass the caches, for results too large to be found there again, and do not
// read a cache line before writing it. `drain` makes them visible to other threads.
#if defined(CPU_CAPABILITY_AVX512)
ALWAYS_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
template <typename T>
ALWAYS_INLINE void stream(T* p, Vec v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, v)); }
inline void drain() { _mm_sfence(); }
#elif defined(CPU_CAPABILITY_AVX2)
ALWAYS_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
ALWAYS_INLINE void stream(BFloat16* p, Vec v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(static_cast<__m256>(v))); }
ALWAYS_INLINE void stream(Half* p, Vec v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_fp16(static_cast<__m256>(v))); }
inline void drain() { _mm_sfence(); }
#else
template <typename T>
ALWAYS_INLINE void stream(T* p, Vec v) { store(p, v); }
inline void drain() {}
#endif

// A store, non-temporal if `past`. A tail is always an ordinary store.
template <typename T>
ALWAYS_INLINE void put(T* p, Vec v, All, bool past) {
  if (past) stream(p, v);
  else store(p, v, All{});
}
template <typename T>
ALWAYS_INLINE void put(T* p, Vec v, int64_t count, bool) { store(p, v, count); }

template <typename T>
inline void put_zeros(T* p, int64_t count, bool past) {
  if (past)
    for (; count > 0 && reinterpret_cast<uintptr_t>(p) % 64 != 0; --count) *p++ = T(0.f);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) put(p + j, Vec(0.f), All{}, past);
  for (; j < count; ++j) p[j] = T(0.f);
}

// The value that a load returns after v was stored as T.
template <typename T>
ALWAYS_INLINE Vec rounded(Vec v) {
  alignas(64) T lanes[kLanes];
  store(lanes, v, All{});
  return load(lanes, All{});
}

ALWAYS_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return at::vec::fmadd(a, b, c); }

// The larger value in each lane; a NaN in `v` is ignored.
ALWAYS_INLINE Vec larger(Vec v, Vec most) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(v, most);  // returns the second operand if either is NaN
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(v, most);
#else
  return Vec::blendv(most, v, v > most);
#endif
}

// The smaller value in each lane; NaN where v is NaN.
ALWAYS_INLINE Vec smaller(Vec v, Vec cap) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(cap, v);  // returns the second operand if either is NaN
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(cap, v);
#else
  return Vec::blendv(v, cap, v > cap);
#endif
}

// The smaller value in each lane, and `cap` where v is NaN: a cap of -inf hides every value.
ALWAYS_INLINE Vec capped(Vec v, Vec cap) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(v, cap);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(v, cap);
#else
  return Vec::blendv(cap, v, v < cap);
#endif
}

// Exchanges neighbouring lanes: 1, 0, 3, 2, ...
ALWAYS_INLINE Vec swapped(Vec v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_permute_ps(v, 0xB1);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_permute_ps(v, 0xB1);
#else
  alignas(64) float lanes[kLanes];
  v.store(lanes);
  for (int64_t i = 0; i < kLanes; i += 2) std::swap(lanes[i], lanes[i + 1]);
  return Vec::loadu(lanes);
#endif
}

// `v` with the lanes from `count` on replaced by `fill`.
ALWAYS_INLINE Vec keep(Vec v, All, float) { return v; }
ALWAYS_INLINE Vec keep(Vec v, int64_t count, float fill) { return Vec::set(Vec(fill), v, count); }

#if defined(CPU_CAPABILITY_AVX2)
// y 2^n for whole n from -250 to 250, as two factors 2^(n/2): each is a normal number even if 2^n is not.
ALWAYS_INLINE __m256 scale(__m256 y, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), bias = _mm256_set1_epi32(127);
  const __m256i half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(y, first), second);
}
#endif

// 2^x to about one unit in the last place; 0 for -inf, inf above 128, NaN for NaN. It is 2^n 2^f, with n the nearest integer
// and a minimax polynomial for f in [-1/2, 1/2], whose relative error is 2e-9 before rounding.
ALWAYS_INLINE Vec exp2(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 t = _mm512_max_ps(_mm512_set1_ps(-160.f), _mm512_min_ps(_mm512_set1_ps(160.f), x));  // NaN passes: second operand
  __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_sub_ps(t, n);
  __m512 y = _mm512_set1_ps(1.5353362e-4f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3398875e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.61843692e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55033237e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40226477e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93147182e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 t = _mm256_max_ps(_mm256_set1_ps(-160.f), _mm256_min_ps(_mm256_set1_ps(160.f), x));
  __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 f = _mm256_sub_ps(t, n);
  __m256 y = _mm256_set1_ps(1.5353362e-4f);
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.3398875e-3f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(9.61843692e-3f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(5.55033237e-2f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(2.40226477e-1f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(6.93147182e-1f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0f));
  return scale(y, n);
#else
  alignas(64) float lanes[kLanes];
  x.store(lanes);
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = std::exp2(lanes[i]);
  return Vec::loadu(lanes);
#endif
}

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;

// e^x. Multiplies by log2(e) in two parts, so that the rounding error does not grow with |x|.
ALWAYS_INLINE Vec exp(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  // Not for an infinite x: infinity minus itself is NaN.
  __m512 t = _mm512_max_ps(_mm512_set1_ps(-110.f), _mm512_min_ps(_mm512_set1_ps(110.f), x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(t, _mm512_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), t);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.38435594e-3f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.37423559e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1668009e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.66664302e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.9999994e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 t = _mm256_max_ps(_mm256_set1_ps(-110.f), _mm256_min_ps(_mm256_set1_ps(110.f), x));
  __m256 n = _mm256_round_ps(_mm256_mul_ps(t, _mm256_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), t);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 y = _mm256_set1_ps(1.38435594e-3f);
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(8.37423559e-3f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(4.1668009e-2f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.66664302e-1f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(4.9999994e-1f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.0f));
  return scale(y, n);
#else
  return x.exp();
#endif
}

// Calls f(j, lanes, k) for j from 0 to n in steps of a vector. `lanes` is All, or the count of lanes in the tail; k goes round
// 0, 1, 2, 3, so that f can spread a sum over four accumulators.
template <typename F>
ALWAYS_INLINE void sweep(int64_t n, F f) {
  using std::integral_constant;
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    f(j, All{}, integral_constant<int, 0>{});
    f(j + kLanes, All{}, integral_constant<int, 1>{});
    f(j + 2 * kLanes, All{}, integral_constant<int, 2>{});
    f(j + 3 * kLanes, All{}, integral_constant<int, 3>{});
  }
  for (; j + kLanes <= n; j += kLanes) f(j, All{}, integral_constant<int, 0>{});
  if (j < n) f(j, n - j, integral_constant<int, 1>{});
}

// One sum in four accumulators.
struct Sum {
  Vec part[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  template <int k>
  ALWAYS_INLINE void add(Vec v, std::integral_constant<int, k>) { part[k] = part[k] + v; }
  template <int k>
  ALWAYS_INLINE void add(Vec a, Vec b, std::integral_constant<int, k>) { part[k] = fmadd(a, b, part[k]); }
  ALWAYS_INLINE float total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

template <typename A, typename B>
ALWAYS_INLINE float dot(const A* a, const B* b, int64_t count) {
  Sum sum;
  sweep(count, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    sum.add(load(a + j, lanes), load(b + j, lanes), k);
  });
  return sum.total();
}

// The same with a sum in double, rounded once.
template <typename B>
ALWAYS_INLINE float dot_in_double(const float* a, const B* b, int64_t count) {
  constexpr int64_t lanes = Doubles::size();
  Doubles sums[4] = {Doubles(0.), Doubles(0.), Doubles(0.), Doubles(0.)};
  int64_t j = 0;
  for (; j + 4 * lanes <= count; j += 4 * lanes)
#pragma GCC unroll 4
    for (int64_t part = 0; part < 4; ++part) {
      const int64_t at = j + part * lanes;
      sums[part] = at::vec::fmadd(load_doubles(a + at), load_doubles(b + at), sums[part]);
    }
  double total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < count; ++j) total += static_cast<double>(a[j]) * b[j];
  return static_cast<float>(total);
}

}  // namespace gptkernels
