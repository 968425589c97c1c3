// attention on the CPU: the online softmax over blocks of keys, and its backward. The derivation is in MATH.md.
#include "attention.h"
#include "decode.h"

namespace gptkernels {
namespace {

constexpr int64_t kKeys = 128;         // keys in a block of the forward
constexpr int64_t kBackwardKeys = 64;  // and of the backward

// ---- forward -----------------------------------------------------------------------------------------------------

template <typename T>
struct ForwardScratch {
  using C = Compute<T>;
  int64_t depth, width, keys;  // head_dim as the first product's depth, as the second's width; keys, all padded
  Scratch<C> key_panels, value_panels, query, weights, buffer;
  Scratch<float> scores, out;
  GemmScope scope;

  ForwardScratch(int64_t tokens, int64_t head_dim)
      : depth(round_up(head_dim, Element<C>::depth)), width(round_up(head_dim, kPanel)), keys(round_up(tokens, kKeys)),
        key_panels(keys * depth), value_panels(keys * width), query(kQueries * depth), weights(kQueries * kKeys),
        buffer(kPanel * round_up(std::max(depth, width), 2 * kLanes)), scores(kQueries * kKeys), out(kQueries * width) {}
};

// One row of scores becomes weights, the power of (score * factor - top), 0 from `seen` on. Returns their sum.
template <typename C>
ALWAYS_INLINE float weigh_row(const float* scores, C* weights, int64_t seen, int64_t width, float scale, float top) {
  Sum total;
  const Vec factor(scale), shift(-top);
  sweep(seen, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    const Vec p = keep(Softmax<C>::power(fmadd(load(scores + j, lanes), factor, shift)), lanes, 0.f);
    total.add(p, k);
    store(weights + j, p, lanes);
  });
  std::memset(static_cast<void*>(weights + seen), 0, (width - seen) * sizeof(C));
  return total.total();
}

ALWAYS_INLINE float highest(float* scores, int64_t seen, const float* caps) {
  Vec top[4] = {Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity), Vec(-kInfinity)};
  sweep(seen, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    Vec s = load(scores + j, lanes);
    if (caps) {
      s = capped(s, load(caps + j, lanes));
      store(scores + j, s, lanes);
    }
    top[k] = larger(keep(s, lanes, -kInfinity), top[k]);
  });
  return max(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

// Queries [first, first + count) of one head against its packed keys and values.
template <typename T>
void forward_block(const T* query, int64_t row, int64_t first, int64_t count, const Visibility& seen, int64_t b, float factor,
                   ForwardScratch<T>& s, int64_t head_dim, T* out, int64_t out_row, float* lse) {
  using C = Compute<T>;
  const int64_t rows = round_up(count, kRowStep);
  float top[kQueries], total[kQueries];
  std::fill_n(top, kQueries, -kInfinity);
  std::fill_n(total, kQueries, 0.f);
  copy_rows(query, row, count, head_dim, s.query.get(), rows, s.depth);
  const int64_t end = seen.end(b, first + count - 1);
  const float* caps = seen.caps_of(b);
  for (int64_t start = 0; start < end; start += kKeys) {
    const int64_t width = std::min(kKeys, round_up(end - start, std::max(kPanel, Element<C>::depth)));
    gemm<false>(rows, width, s.depth, s.query.get(), s.depth, Panels<C>::packed(s.key_panels, s.depth).at(0, start),
                s.scores.get(), kKeys);
    for (int64_t i = 0; i < rows; ++i) {
      float* scores = s.scores + i * kKeys;
      C* weights = s.weights + i * kKeys;
      const int64_t visible = i < count ? std::clamp<int64_t>(seen.end(b, first + i) - start, 0, width) : 0;
      const float raised = std::max(top[i], highest(scores, visible, caps ? caps + start : nullptr) * factor);
      // A row that has seen nothing yet has no top: any finite one gives it zeros (or the NaN that it holds).
      const float shift = raised == -kInfinity ? 0.f : raised;
      const float sum = weigh_row(scores, weights, visible, width, factor, shift);
      if (start == 0) {
        total[i] = sum;
      } else if (raised != top[i]) {
        const float shrink = Softmax<C>::power(top[i] - shift);
        total[i] = total[i] * shrink + sum;
        float* held = s.out + i * s.width;
        sweep(s.width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA { store(held + j, load(held + j, lanes) * Vec(shrink), lanes); });
      } else {
        total[i] += sum;
      }
      top[i] = raised;
    }
    const auto values = Panels<C>::packed(s.value_panels, s.keys).at(start, 0);
    if (start == 0) gemm<false>(rows, s.width, width, s.weights.get(), kKeys, values, s.out.get(), s.width);
    else gemm<true>(rows, s.width, width, s.weights.get(), kKeys, values, s.out.get(), s.width);
  }
  for (int64_t i = 0; i < count; ++i) {
    T* to = out + i * out_row;
    if (end == 0 || total[i] == 0.f) {  // saw no key
      std::fill_n(to, head_dim, T(0.f));
      lse[i] = kInfinity;
      continue;
    }
    const Vec inverse(1.f / total[i]);
    const float* held = s.out + i * s.width;
    sweep(head_dim, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA { store(to + j, load(held + j, lanes) * inverse, lanes); });
    lse[i] = top[i] + Softmax<C>::log(total[i]);
  }
}

template <typename T>
void forward(const Heads& query, const Heads& key, const Heads& value, const Visibility& seen, float factor, const Heads& out,
             float* lse) {
  const int64_t group = query.heads / key.heads, blocks = ceil_div(query.tokens, kQueries), head_dim = query.head_dim;
  const int64_t cuts = parts(query.batch * key.heads, blocks);
  parallel_units(
      query.batch * key.heads * cuts, [&] { return ForwardScratch<T>(key.tokens, head_dim); },
      [&](int64_t unit, ForwardScratch<T>& s) {
        const int64_t cut = cuts - 1 - unit % cuts;  // the longest part of a causal head first
        const int64_t b = unit / cuts / key.heads, kv = unit / cuts % key.heads;
        const int64_t first = blocks * cut / cuts * kQueries, last = std::min(blocks * (cut + 1) / cuts * kQueries, query.tokens);
        if (first >= last) return;
        const int64_t keys = seen.end(b, last - 1);
        pack_transposed(key.at<T>(b, kv, 0), key.row(), keys, head_dim, s.key_panels.get(), round_up(keys, kKeys), s.depth,
                        s.buffer.get());
        pack_rows(value.at<T>(b, kv, 0), value.row(), keys, head_dim, s.value_panels.get(), round_up(keys, kKeys), s.keys,
                  s.width, s.buffer.get());
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
          for (int64_t i = first; i < last; i += kQueries)
            forward_block(query.at<T>(b, h, i), query.row(), i, std::min(kQueries, last - i), seen, b, factor, s, head_dim,
                          out.at<T>(b, h, i), out.row(), lse + (b * query.heads + h) * query.tokens + i);
      });
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_lengths,
    const OptionalTensor& key_mask, bool is_causal, double scale) {
  Tensor out = empty_like_heads(query);
  Tensor lse = empty_floats(query.sizes().slice(0, 3));
  if (query.numel() == 0 || key.numel() == 0) return {out.zero_(), lse.fill_(kInfinity)};
  const Heads q(query), k(key), v(value), o(out);
  const Visibility seen(q, k, is_causal, key_lengths, key_mask);
  dispatch(query.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const float factor = Softmax<Compute<T>>::factor(scale);
    if (q.tokens <= kFewQueries) decode<T>(q, k, v, seen, factor, o, lse.data_ptr<float>());
    else forward<T>(q, k, v, seen, factor, o, lse.data_ptr<float>());
  });
  return {out, lse};
}

// ---- backward ----------------------------------------------------------------------------------------------------
// Scores are held transposed, keys by queries: the weights and their gradients are then left operands as they lie, and
// the numbers that belong to a query (lse, delta) are vectors along a row.

template <typename T>
struct BackwardScratch {
  using C = Compute<T>;
  int64_t depth, width, rows, queries, group;  // head_dim as a depth, a width, a count of rows; queries: padded
  Scratch<C> query_columns, grad_columns, query_rows, grad_rows;  // panels of all queries of the group
  Scratch<C> key, value, key_columns, weights, grad_scores, grad_panels, buffer;
  Scratch<float> scores, grads, grad_key, grad_value, grad_query, lse, delta;
  GemmScope scope;

  BackwardScratch(int64_t tokens, int64_t head_dim, int64_t group_, bool own_grad_query)
      : depth(round_up(head_dim, Element<C>::depth)), width(round_up(head_dim, kPanel)), rows(round_up(head_dim, kRowStep)),
        queries(round_up(tokens, kQueries)), group(group_),
        query_columns(group * queries * depth), grad_columns(group * queries * depth),
        query_rows(group * queries * width), grad_rows(group * queries * width),
        key(kBackwardKeys * depth), value(kBackwardKeys * depth), key_columns(rows * kBackwardKeys),
        weights(kBackwardKeys * kQueries), grad_scores(kBackwardKeys * kQueries), grad_panels(kBackwardKeys * kQueries),
        buffer(kPanel * round_up(std::max(depth, width), 2 * kLanes)),
        scores(kBackwardKeys * kQueries), grads(kBackwardKeys * kQueries),
        grad_key(kBackwardKeys * width), grad_value(kBackwardKeys * width),
        grad_query(own_grad_query ? group * queries * rows : 0), lse(group * queries), delta(group * queries) {}
};

// Rows of scores (keys) and of their gradients become weights and gradients, for queries [first, first + kQueries).
// A query sees key j from `from(j)` on; hidden keys see none.
template <typename C, typename From>
void weigh_block(const float* scores, const float* grads, const float* lse, const float* delta, float factor, From from,
                 C* weights, C* grad_scores, C* grad_panels) {
  const Vec by(factor);
  constexpr int64_t step = Element<C>::step;
  for (int64_t j = 0; j < kBackwardKeys; j += step) {
    for (int64_t i = 0; i < kQueries; i += kLanes) {
      Vec gradient[step];
      for (int64_t r = 0; r < step; ++r) {
        const int64_t at = (j + r) * kQueries + i, hidden = from(j + r) - i;  // so many lanes do not see the key
        Vec p(0.f), g(0.f);
        if (hidden < kLanes) {
          // Product and difference are rounded each by itself, as in the forward's maximum: a lone key weighs exactly 1.
          p = Softmax<C>::power(load(scores + at) * by - load(lse + i));
          g = p * (load(grads + at) - load(delta + i));
          if (hidden > 0) p = Vec::set(p, Vec(0.f), hidden), g = Vec::set(g, Vec(0.f), hidden);
        }
        store(weights + at, p);
        store(grad_scores + at, g);
        gradient[r] = g;
      }
      if constexpr (step == 2) {  // the same gradients as panels: rows j and j + 1 in pairs
#if defined(__AVX512BF16__)
        const __m512i even = _mm512_cvtepu16_epi32(narrow(static_cast<const BFloat16*>(nullptr), gradient[0]));
        const __m512i odd = _mm512_cvtepu16_epi32(narrow(static_cast<const BFloat16*>(nullptr), gradient[1]));
        C* to = grad_panels + i / kPanel * kPanel * kBackwardKeys + j * kPanel + i % kPanel * 2;
        _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
#endif
      }
    }
  }
}

template <typename T>
void write_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, float scale, T* to, int64_t row) {
  for (int64_t i = 0; i < rows; ++i)
    sweep(columns, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      store(to + i * row + j, load(from + i * stride + j, lanes) * Vec(scale), lanes);
    });
}

// The gradient of one head's queries is held transposed, by blocks of (head_dim, kQueries).
template <typename T>
void write_queries(const float* blocks, int64_t rows, int64_t tokens, int64_t head_dim, float scale, T* to, int64_t row) {
  for (int64_t i = 0; i < tokens; ++i) {
    const float* block = blocks + i / kQueries * rows * kQueries + i % kQueries;
    for (int64_t d = 0; d < head_dim; ++d) to[i * row + d] = static_cast<T>(block[d * kQueries] * scale);
  }
}

template <typename T>
struct Backward {
  using C = Compute<T>;
  const Heads &grad_out, &query, &key, &value, &out, &grad_query, &grad_key, &grad_value;
  const Visibility& seen;
  const float* lse;
  float scale, factor;

  // The queries' side of one key/value head, packed once for all of its key blocks.
  void pack_queries(int64_t b, int64_t kv, BackwardScratch<T>& s) const {
    const int64_t tokens = query.tokens, head_dim = query.head_dim;
    for (int64_t g = 0; g < s.group; ++g) {
      const int64_t h = kv * s.group + g;
      const T *q = query.at<T>(b, h, 0), *d = grad_out.at<T>(b, h, 0), *o = out.at<T>(b, h, 0);
      pack_transposed(q, query.row(), tokens, head_dim, s.query_columns + g * s.queries * s.depth, s.queries, s.depth, s.buffer.get());
      pack_transposed(d, grad_out.row(), tokens, head_dim, s.grad_columns + g * s.queries * s.depth, s.queries, s.depth, s.buffer.get());
      pack_rows(q, query.row(), tokens, head_dim, s.query_rows + g * s.queries * s.width, s.queries, s.queries, s.width, s.buffer.get());
      pack_rows(d, grad_out.row(), tokens, head_dim, s.grad_rows + g * s.queries * s.width, s.queries, s.queries, s.width, s.buffer.get());
      float *top = s.lse + g * s.queries, *delta = s.delta + g * s.queries;
      for (int64_t i = 0; i < s.queries; ++i) {
        Sum along;
        if (i < tokens)
          sweep(head_dim, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
            along.add(load(d + i * grad_out.row() + j, lanes), load(o + i * out.row() + j, lanes), k);
          });
        delta[i] = along.total();
        top[i] = i < tokens ? lse[(b * query.heads + h) * tokens + i] : kInfinity;
      }
    }
  }

  // One block of keys against every query that sees it; adds to the group's `grad_query`.
  void key_block(int64_t b, int64_t kv, int64_t start, BackwardScratch<T>& s, float* grad_queries) const {
    const int64_t head_dim = query.head_dim, tokens = query.tokens, keys = seen.lengths[b];
    const int64_t count = std::min(kBackwardKeys, key.tokens - start), offset = seen.keys - seen.queries;
    const T *k = key.at<T>(b, kv, start), *v = value.at<T>(b, kv, start);
    const float* caps = seen.caps_of(b);
    const int64_t real = std::clamp<int64_t>(keys - start, 0, count);  // what lies behind the length is not read
    copy_rows(k, key.row(), real, head_dim, s.key.get(), kBackwardKeys, s.depth);
    copy_rows(v, value.row(), real, head_dim, s.value.get(), kBackwardKeys, s.depth);
    for (int64_t d = 0; d < s.rows; ++d)
      for (int64_t j = 0; j < kBackwardKeys; ++j) s.key_columns[d * kBackwardKeys + j] = d < s.depth ? s.key[j * s.depth + d] : C(0.f);
    std::memset(s.grad_key.get(), 0, kBackwardKeys * s.width * sizeof(float));
    std::memset(s.grad_value.get(), 0, kBackwardKeys * s.width * sizeof(float));
    const int64_t first_query = seen.causal ? std::max<int64_t>(start - offset, 0) : 0;
    for (int64_t g = 0; g < s.group && start < keys; ++g) {
      for (int64_t first = first_query / kQueries * kQueries; first < tokens; first += kQueries) {
        const C *qc = s.query_columns + g * s.queries * s.depth, *gc = s.grad_columns + g * s.queries * s.depth;
        gemm<false>(kBackwardKeys, kQueries, s.depth, s.key.get(), s.depth, Panels<C>::packed(qc, s.depth).at(0, first), s.scores.get(), kQueries);
        gemm<false>(kBackwardKeys, kQueries, s.depth, s.value.get(), s.depth, Panels<C>::packed(gc, s.depth).at(0, first), s.grads.get(), kQueries);
        weigh_block(
            s.scores.get(), s.grads.get(), s.lse + g * s.queries + first, s.delta + g * s.queries + first, factor,
            [&](int64_t j) -> int64_t {
              const int64_t at = start + j;
              if (at >= keys || (caps && caps[at] < 0.f)) return kQueries;
              return seen.causal ? at - offset - first : 0;
            },
            s.weights.get(), s.grad_scores.get(), s.grad_panels.get());
        gemm<true>(kBackwardKeys, s.width, kQueries, s.weights.get(), kQueries,
                   Panels<C>::packed(s.grad_rows + g * s.queries * s.width, s.queries).at(first, 0), s.grad_value.get(), s.width);
        gemm<true>(kBackwardKeys, s.width, kQueries, s.grad_scores.get(), kQueries,
                   Panels<C>::packed(s.query_rows + g * s.queries * s.width, s.queries).at(first, 0), s.grad_key.get(), s.width);
        Panels<C> panels = Panels<C>::packed(s.grad_panels, kBackwardKeys);
        if constexpr (Element<C>::step == 1) panels = Panels<C>::row_major(s.grad_scores, kQueries);
        float* to = grad_queries + g * s.queries * s.rows + first * s.rows;
        gemm<true>(s.rows, kQueries, kBackwardKeys, s.key_columns.get(), kBackwardKeys, panels, to, kQueries);
      }
    }
    write_rows(s.grad_key.get(), s.width, count, head_dim, scale, grad_key.at<T>(b, kv, start), grad_key.row());
    write_rows(s.grad_value.get(), s.width, count, head_dim, 1.f, grad_value.at<T>(b, kv, start), grad_value.row());
  }

  void run() const {
    const int64_t group = query.heads / key.heads, blocks = ceil_div(key.tokens, kBackwardKeys);
    const int64_t heads = query.batch * key.heads, cuts = parts(heads, blocks);
    const int64_t rows = round_up(query.head_dim, kRowStep), queries = round_up(query.tokens, kQueries);
    const int64_t one = group * queries * rows;  // the queries' gradient of one key/value head
    // A head cut into parts has a sum for each, added up in order afterwards.
    Tensor sums = cuts > 1 ? at::zeros({cuts, heads, one}, at::kFloat) : Tensor();
    parallel_units(
        heads * cuts, [&] { return BackwardScratch<T>(query.tokens, query.head_dim, group, cuts == 1); },
        [&](int64_t unit, BackwardScratch<T>& s) {
          const int64_t cut = unit % cuts, b = unit / cuts / key.heads, kv = unit / cuts % key.heads;
          float* own = cuts > 1 ? sums.data_ptr<float>() + (cut * heads + unit / cuts) * one : s.grad_query.get();
          if (cuts == 1) std::memset(own, 0, one * sizeof(float));
          pack_queries(b, kv, s);
          for (int64_t block = cut; block < blocks; block += cuts) key_block(b, kv, block * kBackwardKeys, s, own);
          if (cuts == 1) write_group(b, kv, group, own, rows, queries);
        });
    if (cuts == 1) return;
    at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        float* total = sums.data_ptr<float>() + head * one;
        for (int64_t cut = 1; cut < cuts; ++cut) {
          const float* more = sums.data_ptr<float>() + (cut * heads + head) * one;
          sweep(one, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
            store(total + j, load(total + j, lanes) + load(more + j, lanes), lanes);
          });
        }
        write_group(head / key.heads, head % key.heads, group, total, rows, queries);
      }
    });
  }

  void write_group(int64_t b, int64_t kv, int64_t group, const float* total, int64_t rows, int64_t queries) const {
    for (int64_t g = 0; g < group; ++g)
      write_queries(total + g * queries * rows, rows, query.tokens, query.head_dim, scale,
                    grad_query.at<T>(b, kv * group + g, 0), grad_query.row());
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const OptionalTensor& key_lengths, const OptionalTensor& key_mask, bool is_causal, double scale) {
  Tensor grad_query = empty_like_heads(query), grad_key = empty_like_heads(key), grad_value = empty_like_heads(value);
  if (query.numel() == 0 || key.numel() == 0) return {grad_query.zero_(), grad_key.zero_(), grad_value.zero_()};
  const Heads g(grad_out), q(query), k(key), v(value), o(out), gq(grad_query), gk(grad_key), gv(grad_value);
  const Visibility seen(q, k, is_causal, key_lengths, key_mask);
  const Tensor sums = lse.contiguous();
  dispatch(query.scalar_type(), [&](auto t) {
    Backward<decltype(t)>{g, q, k, v, o, gq, gk, gv, seen, sums.const_data_ptr<float>(), static_cast<float>(scale),
                          Softmax<Compute<decltype(t)>>::factor(scale)}.run();
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
}

}  // namespace gptkernels
