// What the backward of attention computes between its products: weights from scores, and the gradients of the scores from
// those of the weights.
#pragma once

#include "attention/native.h"

namespace gptkernels {

// Keys in a block. Larger for float32, so that more sequences have all their keys in one block.
template <typename T>
constexpr int64_t kBlockKeys = Softmax<T>::apart ? 128 : 64;

// A block of scores and what its gradients are computed from. Scores are held transposed, keys by queries: weights and
// gradients are then left operands without a copy, and statistics of queries are vectors along a row.
struct ScoreBlock {
  const float *scores, *grads, *kept;     // rows of kQueries; kept: null without dropout
  const float *shift, *inverse, *lift;    // of each query, for float32: its maximum, 1 / its sum, the gradient of its
                                          // log-sum-exp. For 16-bit inputs `shift` is the log-sum-exp, the others unused
  float* delta;
  int64_t keys, queries;
  float scale, factor;                    // of the scores, for 16-bit inputs; of the weights that dropout keeps
  bool settle;                            // no other block holds keys of these queries, and delta is not computed yet
};

// The lanes [hidden, left) of a vector of queries from i on that see key j.
struct Lanes {
  int64_t hidden, left;
  bool none() const { return hidden >= kLanes || left <= 0; }
  ALWAYS_INLINE Vec only(Vec v) const {
    if (hidden > 0) v = Vec::set(v, Vec(0.f), hidden);
    if (left < kLanes) v = Vec::set(Vec(0.f), v, left);
    return v;
  }
};

// Weights of key j and queries [i, i + kLanes), before dropout.
template <typename T>
ALWAYS_INLINE Vec weights_of(const ScoreBlock& block, int64_t j, int64_t i) {
  const Vec scores = load(block.scores + j * kQueries + i), shift = load(block.shift + i);
  if constexpr (Softmax<T>::apart) return exp(scores - shift) * load(block.inverse + i);
  // The product and the difference are rounded separately, as in the forward: a single key then weighs exactly 1.
  else return exp(scores * Vec(block.scale) - shift);
}

template <bool dropped>
ALWAYS_INLINE Vec grads_of(const ScoreBlock& block, int64_t j, int64_t i) {
  const Vec grads = load(block.grads + j * kQueries + i);
  if constexpr (dropped) return grads * (load(block.kept + j * kQueries + i) * Vec(block.factor));
  else return grads;
}

// Computes delta as the textbook does, as a sum over the same weights and gradients that it is then subtracted from: for a
// single key the difference is exactly 0. Queries [from(j), until(j)) of the block see key j; `until` is called only if a
// window ends in the block.
template <typename T, bool windowed, bool dropped, typename From, typename Until>
void settle_delta(const ScoreBlock& block, From from, Until until) {
  for (int64_t i = 0; i < block.queries; i += kLanes) {
    Vec sum(0.f);
    for (int64_t j = 0; j < block.keys; ++j) {
      const Lanes lanes{from(j) - i, windowed ? until(j) - i : kLanes};
      if (!lanes.none()) sum = sum + lanes.only(weights_of<T>(block, j, i) * grads_of<dropped>(block, j, i));
    }
    store(block.delta + i, sum);
  }
}

// Turns scores into weights, and the gradients of the weights into those of the scores.
template <typename T, bool windowed, bool dropped, typename C, typename From, typename Until>
void weigh_block(const ScoreBlock& block, From from, Until until, C* weights, C* grad_scores, C* grad_panels) {
  constexpr int64_t step = Element<C>::step;
  for (int64_t j = 0; j < block.keys; j += step) {
    for (int64_t i = 0; i < block.queries; i += kLanes) {
      Vec gradient[step];
      for (int64_t r = 0; r < step; ++r) {
        const int64_t at = (j + r) * kQueries + i;
        const Lanes lanes{from(j + r) - i, windowed ? until(j + r) - i : kLanes};
        Vec p(0.f), g(0.f);
        if (!lanes.none()) {
          p = weights_of<T>(block, j + r, i);
          g = grads_of<dropped>(block, j + r, i) - load(block.delta + i);
          if constexpr (Softmax<T>::apart) g = g + load(block.lift + i);
          g = lanes.only(p * g);
          if constexpr (dropped) p = p * load(block.kept + at);
          p = lanes.only(p);
        }
        store(weights + at, p);
        store(grad_scores + at, g);
        gradient[r] = g;
      }
      if constexpr (step == 2) {  // also write the gradients as panels, rows j and j + 1 in pairs
#if defined(__AVX512BF16__)
        const __m512i even = _mm512_cvtepu16_epi32(narrow(static_cast<const BFloat16*>(nullptr), gradient[0]));
        const __m512i odd = _mm512_cvtepu16_epi32(narrow(static_cast<const BFloat16*>(nullptr), gradient[1]));
        C* to = grad_panels + i / kPanel * kPanel * kBlockKeys<T> + j * kPanel + i % kPanel * 2;
        _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
#endif
      }
    }
  }
}

}  // namespace gptkernels
