// What the attention kernels of the CPU share: where sequences lie, the keys that a query sees, and how work is cut.
#pragma once

#include <vector>

#include "gemm.h"
#include "philox.h"

namespace gptkernels {

constexpr int64_t kQueries = 64;  // queries in a block
constexpr int64_t kFew = 4;       // up to so many queries the forward's products are with vectors: see decode.h

// A (batch, heads, tokens, head_dim) tensor whose head_dim is adjacent.
struct Heads {
  Tensor tensor;
  int64_t batch, heads, tokens, head_dim;

  explicit Heads(const Tensor& x) : tensor(x.size(3) <= 1 || x.stride(3) == 1 ? x : x.contiguous()) {
    batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3);
  }
  template <typename T>
  T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<T*>(tensor.data_ptr()) + b * tensor.stride(0) + h * tensor.stride(1) + t * tensor.stride(2);
  }
  int64_t row() const { return tensor.stride(2); }
  // Of a token in an adjacent (batch, heads, tokens) tensor.
  int64_t index(int64_t b, int64_t h, int64_t t) const { return (b * heads + h) * tokens + t; }
};

// Of x's shape, laid out (batch, tokens, heads, head_dim): merging the heads again is then a view.
inline Tensor empty_like_heads(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

// One sequence: its rows in the tensors, and which keys its queries see. Positions are counted from its own beginning.
struct Sequence {
  int64_t batch, first_query, queries, first_key, keys;
  int64_t skipped = 0, length = 0;   // keys before the one and from the other on are hidden
  int64_t diagonal = 0, window = 0;  // query i sees keys below i + diagonal, and of those the last `window`
  const float* caps = nullptr;       // with a mask: +inf for a key that is seen, -inf for a hidden one; else null
  int64_t seed = 0;                  // of its dropout

  // Keys [begin, end) are those that query i sees, before the mask; none where begin >= end.
  int64_t begin(int64_t i) const { return std::max<int64_t>(i + diagonal - window, skipped); }
  int64_t end(int64_t i) const { return std::clamp<int64_t>(i + diagonal, 0, length); }
  // Queries [from, until) are those that see key j, if it is seen at all.
  int64_t from(int64_t j) const { return std::max<int64_t>(j + 1 - diagonal, 0); }
  int64_t until(int64_t j) const { return std::min(j + 1 - diagonal + window, queries); }
  // Few rows or columns of scores. BLAS sums these in many short parts: one long sum of floats would err more. Of float32
  // inputs they are summed in double.
  bool few() const { return std::min(queries, keys) <= kFew; }
  int64_t work() const { return queries * std::min(length, window); }
};

inline std::vector<int64_t> integers(const Tensor& x) {
  const Tensor wide = x.to(at::kLong).contiguous();
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

// The sequences of a call: one for each row of the batch, or packed one after the other into a batch of one.
struct Sequences {
  std::vector<Sequence> all;
  Dropout dropout;

  Sequences(const Heads& query, const Heads& key, const OptionalTensor& key_lengths, const OptionalTensor& key_mask,
            const OptionalTensor& cu_queries, const OptionalTensor& cu_keys, const OptionalTensor& dropout_seed,
            bool is_causal, std::optional<int64_t> window, double dropout_p)
      : dropout(dropout_seed ? dropout_p : 0.) {
    if (cu_queries && cu_keys) {
      const std::vector<int64_t> q = integers(*cu_queries), k = integers(*cu_keys);
      for (size_t s = 0; s + 1 < q.size(); ++s) all.push_back({0, q[s], q[s + 1] - q[s], k[s], k[s + 1] - k[s]});
    } else {
      for (int64_t b = 0; b < query.batch; ++b) all.push_back({b, 0, query.tokens, 0, key.tokens});
    }
    const std::vector<int64_t> lengths = key_lengths ? integers(*key_lengths) : std::vector<int64_t>();
    const std::vector<int64_t> seeds = dropout ? integers(*dropout_seed) : std::vector<int64_t>();
    if (key_mask) make_caps(key_mask->contiguous());
    for (size_t s = 0; s < all.size(); ++s) {
      Sequence& one = all[s];
      one.length = key_lengths ? std::clamp<int64_t>(lengths[s], 0, one.keys) : one.keys;
      one.diagonal = is_causal ? one.keys - one.queries + 1 : one.keys;
      const int64_t widest = one.keys + one.queries;  // hides nothing
      one.window = std::min(window.value_or(widest), widest);
      if (key_mask) {
        one.caps = caps_.const_data_ptr<float>() + static_cast<int64_t>(s) * caps_.size(1);
        while (one.length > 0 && one.caps[one.length - 1] < 0.f) --one.length;
        while (one.skipped < one.length && one.caps[one.skipped] < 0.f) ++one.skipped;
      }
      if (dropout) one.seed = seeds[s];
    }
  }

 private:
  Tensor caps_;  // (batch, padded keys)

  void make_caps(const Tensor& mask) {
    const int64_t batch = mask.size(0), keys = mask.size(1), padded = round_up(keys, 256);
    caps_ = at::empty({batch, padded}, at::kFloat).fill_(-kInfinity);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < keys; ++j)
        if (mask.const_data_ptr<bool>()[b * keys + j]) caps_.data_ptr<float>()[b * padded + j] = kInfinity;
  }
};

// A part of a key/value head of a sequence, with all query heads of its group.
struct Unit {
  const Sequence* sequence;
  int64_t head, cut, cuts;
};

// The work as one list, the heaviest sequences first. Where there are few heads they are cut, by their share of the
// work and into `most(sequence)` parts at most: the threads have no say, so that results do not depend on them.
template <typename Most>
std::vector<Unit> units_of(std::vector<const Sequence*> sequences, int64_t heads, Most most) {
  int64_t work = 0;
  for (const Sequence* s : sequences) work += s->work();
  std::stable_sort(sequences.begin(), sequences.end(), [](auto* a, auto* b) { return a->work() > b->work(); });
  std::vector<Unit> units;
  for (const Sequence* s : sequences) {
    const int64_t share = 32 * s->work() / std::max<int64_t>(work * heads, 1);
    const int64_t cuts = std::clamp<int64_t>(share, 1, std::max<int64_t>(most(*s), 1));
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t cut = 0; cut < cuts; ++cut) units.push_back({s, head, cut, cuts});
  }
  return units;
}

// The forward's exponential, of scores times a factor, and what it leaves for the backward. Of float32 inputs it is what
// the textbook computes: the scale goes into the queries, the factor is 1, and a row's maximum and its sum are kept apart.
// Of 16-bit inputs one number is kept, the log-sum-exp. Where products are float, base e: the factor is then the caller's
// scale, mostly a power of two and exact. Where they are bfloat16, base 2: log2(e) goes into the factor and saves a
// product.
template <typename T>
struct Softmax {
  static constexpr bool apart = std::is_same_v<T, float>, base_e = std::is_same_v<Compute<T>, float>;
  float scale, factor;

  explicit Softmax(double given) : scale(static_cast<float>(given)) {
    factor = apart ? 1.f : base_e ? scale : static_cast<float>(given * M_LOG2E);
  }
  // Scales queries, of float32 inputs, that were copied or packed.
  template <typename C>
  ALWAYS_INLINE void prepare(C* queries, int64_t count) const {
    if constexpr (apart)
      sweep(count, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
        store(queries + j, load(queries + j, lanes) * Vec(scale), lanes);
      });
  }
  static ALWAYS_INLINE Vec power(Vec x) {
    if constexpr (base_e) return exp(x);
    else return exp2(x);
  }
  static ALWAYS_INLINE float power(float x) { return base_e ? std::exp(x) : std::exp2(x); }
  // What is taken from the products when `top` is the highest score. A row that has seen nothing yet has no top: any
  // finite number gives it zeros (or the NaN that it holds).
  ALWAYS_INLINE float shift(float top) const { return top == -kInfinity ? 0.f : top * factor; }
  // ln(sum of e^(score * scale)) from the sum of the weights, power(score * factor - shift(top)). The shift is rounded,
  // and the weights hold what it lacks. Of a lone key this is its score times the scale, rounded: just what the
  // backward computes again, to base e always.
  float lse(float top, float total) const {
    const float rest = std::fma(top, factor, -shift(top));
    return std::fma(top, scale, base_e ? std::log(total) - rest : (std::log2(total) - rest) * kLn2);
  }
};

// A product of a block of a sequence, `real` of its columns no padding. Scores are the same bits in the forward and the
// backward.
template <typename T, bool accumulate, typename C>
void multiply(const Sequence& sequence, int64_t rows, int64_t columns, int64_t real, int64_t depth, const C* left,
              int64_t row_left, Panels<C> right, float* out, int64_t row_out) {
  if constexpr (Softmax<T>::apart)
    if (sequence.few())
      return gemm_in_double<accumulate>(rows, columns, real, depth, left, row_left, right, out, row_out);
  gemm<accumulate>(rows, columns, depth, left, row_left, right, out, row_out);
}

// What the forward reads and writes.
template <typename T>
struct ForwardCall {
  const Heads &query, &key, &value, &out;
  float* statistics;  // (1 or 2, batch, heads, tokens): log-sum-exps, or maxima and then sums
  Softmax<T> softmax;
  Dropout dropout;

  int64_t group() const { return query.heads / key.heads; }
  // Of the row at `index`, whose highest score is `top`; `total` is 0 where it saw no key.
  void save(int64_t index, float top, float total) const {
    if constexpr (Softmax<T>::apart) {
      statistics[index] = softmax.shift(top);
      statistics[query.batch * query.heads * query.tokens + index] = total;
    } else {
      statistics[index] = total == 0.f ? kInfinity : softmax.lse(top, total);
    }
  }
};

}  // namespace gptkernels
