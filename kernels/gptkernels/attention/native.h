// What the attention kernels of the CPU share: tensors of heads, the keys that a query sees, and how work is divided.
#pragma once

#include <vector>

#include "csrc/gemm.h"
#include "attention/native_dropout.h"

namespace gptkernels {

constexpr int64_t kQueries = 64;  // queries in a block
constexpr int64_t kFew = 4;       // sequences of at most so many queries take native_decode.h in the forward

// A (batch, heads, tokens, head_dim) tensor whose last dimension has stride 1; copied if it has not.
struct Heads {
  Tensor tensor;
  int64_t batch, heads, tokens, head_dim;

  explicit Heads(const Tensor& x)
      : tensor(x.size(3) <= 1 || x.stride(3) == 1 ? x : as_contiguous(x)), data_(tensor.data_ptr()) {
    batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3);
    std::copy_n(tensor.strides().begin(), 3, strides_);
  }
  template <typename T>
  T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<T*>(data_) + b * strides_[0] + h * strides_[1] + t * strides_[2];
  }
  int64_t row() const { return strides_[2]; }
  // The index of a token in a contiguous (batch, heads, tokens) tensor.
  int64_t index(int64_t b, int64_t h, int64_t t) const { return (b * heads + h) * tokens + t; }

 private:
  void* data_;
  int64_t strides_[3];  // of batch, heads and tokens
};

// A new tensor of x's shape, in memory (batch, tokens, heads, head_dim): merging the heads is then a view.
inline Tensor empty_like_heads(const Tensor& x) {
  const int64_t heads = x.size(1), tokens = x.size(2), row = x.size(3);
  return empty_strided(x.sizes(), {tokens * heads * row, row, heads * row, 1}, x.scalar_type());
}

// One sequence: its rows in the tensors, and which keys its queries see. Positions count from the sequence's own start.
struct Sequence {
  int64_t batch, first_query, queries, first_key, keys;
  int64_t skipped = 0, length = 0;   // keys before `skipped` and from `length` on are hidden
  int64_t diagonal = 0, window = 0;  // query i sees the last `window` of the keys below i + diagonal
  const float* caps = nullptr;       // +inf for a key that the mask shows, -inf for one that it hides; null without a mask
  int64_t seed = 0;                  // of the dropout

  // Query i sees keys [begin, end), if the mask shows them; none if begin >= end.
  int64_t begin(int64_t i) const { return std::max<int64_t>(i + diagonal - window, skipped); }
  int64_t end(int64_t i) const { return std::clamp<int64_t>(i + diagonal, 0, length); }
  // Queries [from, until) see key j, unless it is hidden from all.
  int64_t from(int64_t j) const { return std::max<int64_t>(j + 1 - diagonal, 0); }
  int64_t until(int64_t j) const { return std::min(j + 1 - diagonal + window, queries); }
  // Few rows or columns of scores. BLAS computes such products in many short sums, and one long sum of floats would err more;
  // for float32 inputs they are summed in double here.
  bool few() const { return std::min(queries, keys) <= kFew; }
  int64_t work() const { return queries * std::min(length, window); }
};

inline std::vector<int64_t> integers(const Tensor& x) {
  const Tensor wide = converted(x, ScalarType::Long);
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

// The sequences of a call: one for each row of the batch, or several packed one after the other into a batch of one.
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
    if (key_mask) make_caps(as_contiguous(*key_mask));
    for (size_t s = 0; s < all.size(); ++s) {
      Sequence& one = all[s];
      one.length = key_lengths ? std::clamp<int64_t>(lengths[s], 0, one.keys) : one.keys;
      one.diagonal = is_causal ? one.keys - one.queries + 1 : one.keys;
      const int64_t widest = one.keys + one.queries;  // a window that hides nothing
      one.window = std::min(window.value_or(widest), widest);
      if (key_mask) {
        one.caps = caps_->const_data_ptr<float>() + static_cast<int64_t>(s) * caps_->size(1);
        while (one.length > 0 && one.caps[one.length - 1] < 0.f) --one.length;
        while (one.skipped < one.length && one.caps[one.skipped] < 0.f) ++one.skipped;
      }
      if (dropout) one.seed = seeds[s];
    }
  }

 private:
  OptionalTensor caps_;  // (batch, padded keys)

  void make_caps(const Tensor& mask) {
    const int64_t batch = mask.size(0), keys = mask.size(1), padded = round_up(keys, 256);
    caps_ = empty_floats({batch, padded});
    const bool* seen = mask.const_data_ptr<bool>();
    float* caps = caps_->mutable_data_ptr<float>();
    std::fill_n(caps, batch * padded, -kInfinity);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < keys; ++j)
        if (seen[b * keys + j]) caps[b * padded + j] = kInfinity;
  }
};

// A part of a sequence's key/value head, with all query heads of its group.
struct Unit {
  const Sequence* sequence;
  int64_t head, cut, cuts;
};

// The work as one list, the longest sequences first. If there are few heads, each is cut into parts by its share of the work,
// at most most(sequence) of them. The number of threads plays no part, so that results do not depend on it.
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

// The exponential of the forward, power(score * factor - shift), and the statistics that it saves for the backward.
// - float32 inputs (`apart`): as the textbook computes it. The queries are multiplied by the scale, the factor is 1, and the
//   maximum and the sum of a row are saved apart.
// - 16-bit inputs: one number is saved, the log-sum-exp. Where products are float the base is e and the factor is the caller's
//   scale, mostly a power of two and exact. Where products are bfloat16 the base is 2: the factor includes log2(e), which saves
//   a multiplication.
template <typename T>
struct Softmax {
  static constexpr bool apart = std::is_same_v<T, float>, base_e = std::is_same_v<Compute<T>, float>;
  float scale, factor;

  explicit Softmax(double given) : scale(static_cast<float>(given)) {
    factor = apart ? 1.f : base_e ? scale : static_cast<float>(given * M_LOG2E);
  }
  // Multiplies copied or packed queries by the scale, for float32 inputs.
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
  // The shift of a row whose highest score is `top`. A row that has seen no key yet has no highest score; any finite shift
  // gives zeros there (or the NaN that it holds).
  ALWAYS_INLINE float shift(float top) const { return top == -kInfinity ? 0.f : top * factor; }
  // ln(sum of e^(score * scale)), from `total`, the sum of the weights. The shift is rounded, and `rest` corrects for that. With
  // a single key the result is its score times the scale, rounded, which is exactly what the backward computes again.
  float lse(float top, float total) const {
    const float rest = std::fma(top, factor, -shift(top));
    return std::fma(top, scale, base_e ? std::log(total) - rest : (std::log2(total) - rest) * kLn2);
  }
};

// A product with a block of a sequence; `real` of its columns are not padding. Forward and backward get the same bits.
template <typename T, bool accumulate, typename C>
void multiply(const Sequence& sequence, int64_t rows, int64_t columns, int64_t real, int64_t depth, const C* left,
              int64_t row_left, Panels<C> right, float* out, int64_t row_out) {
  if constexpr (Softmax<T>::apart)
    if (sequence.few())
      return gemm_in_double<accumulate>(rows, columns, real, depth, left, row_left, right, out, row_out);
  gemm<accumulate>(rows, columns, depth, left, row_left, right, out, row_out);
}

// The arguments and results of a forward.
template <typename T>
struct ForwardCall {
  const Heads &query, &key, &value, &out;
  float* statistics;  // (1, batch, heads, tokens) log-sum-exps, or (2, ...) maxima and sums
  Softmax<T> softmax;
  Dropout dropout;

  int64_t group() const { return query.heads / key.heads; }
  // Saves the statistics of the row at `index`. `top` is its highest score; `total` is 0 if it saw no key.
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
