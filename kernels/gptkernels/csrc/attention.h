// What the attention kernels of the CPU share: sizes and strides, the keys that a query sees, block sizes.
#pragma once

#include <vector>

#include "gemm.h"

namespace gptkernels {

constexpr int64_t kQueries = 64;  // queries in a block

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
};

// Of x's shape, laid out (batch, tokens, heads, head_dim): merging the heads again is then a view.
inline Tensor empty_like_heads(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

// Which keys of each sequence take part, and how far each query sees.
struct Visibility {
  bool causal;
  int64_t queries, keys;
  std::vector<int64_t> lengths;  // keys from here on are hidden
  Tensor caps;                   // with a mask: (batch, padded keys), +inf where seen, -inf where hidden

  Visibility(const Heads& query, const Heads& key, bool is_causal, const OptionalTensor& key_lengths,
             const OptionalTensor& key_mask)
      : causal(is_causal), queries(query.tokens), keys(key.tokens), lengths(query.batch, key.tokens) {
    if (key_lengths) {
      const Tensor given = key_lengths->to(at::kLong).contiguous();
      for (int64_t b = 0; b < query.batch; ++b) lengths[b] = std::clamp<int64_t>(given.const_data_ptr<int64_t>()[b], 0, keys);
    }
    if (key_mask) {
      const Tensor given = key_mask->contiguous();
      const int64_t padded = round_up(keys, 256);
      caps = at::empty({query.batch, padded}, at::kFloat).fill_(-kInfinity);
      for (int64_t b = 0; b < query.batch; ++b)
        for (int64_t j = 0; j < keys; ++j)
          if (given.const_data_ptr<bool>()[b * keys + j]) caps.data_ptr<float>()[b * padded + j] = kInfinity;
    }
  }
  const float* caps_of(int64_t b) const { return caps.defined() ? caps.const_data_ptr<float>() + b * caps.size(1) : nullptr; }
  // Keys that query i sees, before the mask: those below this.
  int64_t end(int64_t b, int64_t i) const {
    return causal ? std::clamp<int64_t>(i + 1 + keys - queries, 0, lengths[b]) : lengths[b];
  }
};

// The exponential of the softmax. Where products are float, base e: the scores' factor is then the caller's scale, mostly a
// power of two and exact. Where they are bfloat16 anyway, base 2: log2(e) goes into the factor and saves a product.
template <typename C>
struct Softmax {
  static constexpr bool base_e = std::is_same_v<C, float>;
  static float factor(double scale) { return static_cast<float>(base_e ? scale : scale * M_LOG2E); }
  static ALWAYS_INLINE Vec power(Vec x) {
    if constexpr (base_e) return exp(x);
    else return exp2(x);
  }
  static ALWAYS_INLINE float power(float x) { return base_e ? std::exp(x) : std::exp2(x); }
  static ALWAYS_INLINE float log(float x) { return base_e ? std::log(x) : std::log2(x); }
};

// Work is cut finer when there are few heads, by the shape alone.
inline int64_t parts(int64_t units, int64_t most) { return std::clamp<int64_t>(32 / std::max<int64_t>(units, 1), 1, std::max<int64_t>(most, 1)); }

constexpr int64_t kFewQueries = 4;  // up to here the products are with vectors, not matrices: see decode.h

}  // namespace gptkernels
