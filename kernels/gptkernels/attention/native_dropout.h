// Dropout's random bits: Philox 4x32 with 7 rounds (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011). The bits of a weight depend on its position and its sequence's seed, not on the order of the work.
#pragma once

#include "csrc/vec.h"

namespace gptkernels {

// kLanes words of 32 bits. Written with intrinsics, because compilers make a loop of widening products half as fast.
#if defined(CPU_CAPABILITY_AVX512)
using Words = __m512i;
ALWAYS_INLINE Words all_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
ALWAYS_INLINE Words words_from(uint32_t x) {
  return _mm512_add_epi32(all_words(x), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
ALWAYS_INLINE Words exclusive_or(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
ALWAYS_INLINE void multiply(Words a, uint32_t by, Words& high, Words& low) {
  const Words even = _mm512_mul_epu32(a, all_words(by));
  const Words odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), all_words(by));
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  low = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
}
ALWAYS_INLINE void store(uint32_t* p, Words w) { _mm512_storeu_si512(p, w); }
#elif defined(CPU_CAPABILITY_AVX2)
using Words = __m256i;
ALWAYS_INLINE Words all_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
ALWAYS_INLINE Words words_from(uint32_t x) {
  return _mm256_add_epi32(all_words(x), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
ALWAYS_INLINE Words exclusive_or(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
ALWAYS_INLINE void multiply(Words a, uint32_t by, Words& high, Words& low) {
  const Words even = _mm256_mul_epu32(a, all_words(by));
  const Words odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), all_words(by));
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
ALWAYS_INLINE void store(uint32_t* p, Words w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w); }
#else
struct Words {
  uint32_t lanes[kLanes];
};
ALWAYS_INLINE Words all_words(uint32_t x) {
  Words w;
  for (uint32_t& lane : w.lanes) lane = x;
  return w;
}
ALWAYS_INLINE Words words_from(uint32_t x) {
  Words w;
  for (int64_t i = 0; i < kLanes; ++i) w.lanes[i] = x + static_cast<uint32_t>(i);
  return w;
}
ALWAYS_INLINE Words exclusive_or(Words a, Words b, Words c) {
  for (int64_t i = 0; i < kLanes; ++i) a.lanes[i] ^= b.lanes[i] ^ c.lanes[i];
  return a;
}
ALWAYS_INLINE void multiply(Words a, uint32_t by, Words& high, Words& low) {
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a.lanes[i]) * by;
    high.lanes[i] = static_cast<uint32_t>(product >> 32), low.lanes[i] = static_cast<uint32_t>(product);
  }
}
ALWAYS_INLINE void store(uint32_t* p, Words w) {
  for (int64_t i = 0; i < kLanes; ++i) p[i] = w.lanes[i];
}
#endif

constexpr int kPhiloxRounds = 7;
constexpr int64_t kPhiloxNumbers = 8;  // 16-bit numbers from one counter, for neighbouring keys
constexpr int64_t kKeptAtOnce = kPhiloxNumbers * kLanes;

// The generator with a seed: counters (key / 8, query, head, 0).
class Philox {
 public:
  explicit Philox(int64_t seed) {
    const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    // Two loops, because GCC 12 at -O3 miscompiles one: the second keys become copies of the first.
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) low_[round] = all_words(low + round * 0x9E3779B9u);
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) high_[round] = all_words(high + round * 0xBB67AE85u);
  }

  ALWAYS_INLINE void generate(Words keys, Words queries, uint32_t head, uint32_t (*out)[kLanes]) const {
    Words c0 = keys, c1 = queries, c2 = all_words(head), c3 = all_words(0);
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
      Words high0, low0, high2, low2;
      multiply(c0, 0xD2511F53u, high0, low0);
      multiply(c2, 0xCD9E8D57u, high2, low2);
      c0 = exclusive_or(high2, c1, low_[round]), c1 = low2;
      c2 = exclusive_or(high0, c3, high_[round]), c3 = low0;
    }
    store(out[0], c0), store(out[1], c1), store(out[2], c2), store(out[3], c3);
  }

 private:
  Words low_[kPhiloxRounds], high_[kPhiloxRounds];
};

// A weight is dropped when its 16-bit number is below the threshold; those kept count `factor` times.
struct Dropout {
  int32_t threshold = 0;
  float factor = 1.f;

  explicit Dropout(double p) : threshold(static_cast<int32_t>(std::nearbyint(p * 65536.))) {
    factor = threshold < 65536 ? static_cast<float>(65536. / (65536 - threshold)) : 0.f;
  }
  explicit operator bool() const { return threshold > 0; }
  float kept(uint32_t number) const { return static_cast<int32_t>(number) < threshold ? 0.f : 1.f; }
};

// Writes 1 for each kept weight of one query and keys [first, first + count), and 0 for each dropped one. `kept` has room for
// count rounded up to kKeptAtOnce. `first` is a multiple of 8.
inline void keep_keys(
    const Philox& philox, Dropout dropout, int64_t head, int64_t query, int64_t first, int64_t count, float* kept) {
  alignas(64) uint32_t words[4][kLanes], ordered[4 * kLanes];
  const Words queries = all_words(static_cast<uint32_t>(query));
  for (int64_t j = 0; j < count; j += kKeptAtOnce, kept += kKeptAtOnce) {
    const Words keys = words_from(static_cast<uint32_t>((first + j) / kPhiloxNumbers));
    philox.generate(keys, queries, static_cast<uint32_t>(head), words);
    for (int64_t i = 0; i < kLanes; ++i)
      for (int64_t w = 0; w < 4; ++w) ordered[4 * i + w] = words[w][i];
    for (int64_t w = 0; w < 4 * kLanes; ++w) {
      kept[2 * w] = dropout.kept(ordered[w] & 0xFFFF);
      kept[2 * w + 1] = dropout.kept(ordered[w] >> 16);
    }
  }
}

// The same, transposed: rows are keys [first, first + count), `stride` apart; columns are queries from `query` on. `kept` has
// room for `columns` rounded up to kLanes, and for `count` rounded up to 8.
inline void keep_queries(const Philox& philox, Dropout dropout, int64_t head, int64_t query, int64_t columns,
                         int64_t first, int64_t count, float* kept, int64_t stride) {
  alignas(64) uint32_t words[4][kLanes];
  for (int64_t j = 0; j < count; j += kPhiloxNumbers) {
    const Words keys = all_words(static_cast<uint32_t>((first + j) / kPhiloxNumbers));
    for (int64_t i = 0; i < columns; i += kLanes) {
      philox.generate(keys, words_from(static_cast<uint32_t>(query + i)), static_cast<uint32_t>(head), words);
      for (int64_t w = 0; w < 4; ++w) {
        float *even = kept + (j + 2 * w) * stride + i, *odd = even + stride;
        for (int64_t l = 0; l < kLanes; ++l) even[l] = dropout.kept(words[w][l] & 0xFFFF);
        for (int64_t l = 0; l < kLanes; ++l) odd[l] = dropout.kept(words[w][l] >> 16);
      }
    }
  }
}

}  // namespace gptkernels
