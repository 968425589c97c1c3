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
  int64_t depth, width;  // head_dim as the first product's depth, as the second's width, padded
  Scratch<C> key_panels, value_panels, query, weights, buffer;
  Scratch<float> scores, kept, out;
  GemmScope scope;

  ForwardScratch(int64_t most_keys, int64_t head_dim)
      : depth(round_up(head_dim, Element<C>::depth)), width(round_up(head_dim, kPanel)),
        key_panels(round_up(most_keys, kKeys) * depth), value_panels(round_up(most_keys, kKeys) * width),
        query(kQueries * depth), weights(kQueries * kKeys),
        buffer(kPanel * round_up(std::max(depth, width), 2 * kLanes)), scores(kQueries * kKeys), kept(kKeys),
        out(kQueries * width) {}
};

// A row of scores becomes weights, the power of (score * factor - shift). Returns their sum, of those dropped too.
template <bool dropped, typename C>
ALWAYS_INLINE float weigh_row(
    const float* scores, const float* kept, int64_t count, float factor, float shift, C* weights) {
  Sum total;
  const Vec by(factor), down(-shift);
  sweep(count, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    Vec p = keep(Softmax<C>::power(fmadd(load(scores + j, lanes), by, down)), lanes, 0.f);
    total.add(p, k);
    if constexpr (dropped) p = p * load(kept + j, lanes);
    store(weights + j, p, lanes);
  });
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

template <typename T>
struct Forward {
  using C = Compute<T>;
  const ForwardCall<T>& call;

  // Queries [first, first + count) of one head against the packed keys and values, which are those from `origin` on.
  void block(const Sequence& sequence, const Philox& philox, int64_t h, int64_t first, int64_t count, int64_t origin,
             int64_t packed, ForwardScratch<T>& s) const {
    const int64_t rows = round_up(count, kRowStep), head_dim = call.query.head_dim, b = sequence.batch;
    const int64_t token = sequence.first_query + first;
    const auto keys = Panels<C>::packed(s.key_panels, s.depth), values = Panels<C>::packed(s.value_panels, packed);
    float top[kQueries], total[kQueries];
    std::fill_n(top, kQueries, -kInfinity);
    std::fill_n(total, kQueries, 0.f);
    const T* query = call.query.template at<T>(b, h, token);
    copy_rows(query, call.query.row(), count, head_dim, s.query.get(), rows, s.depth);
    const int64_t begin = sequence.begin(first) / kKeys * kKeys, end = sequence.end(first + count - 1);
    for (int64_t start = begin; start < end; start += kKeys) {
      const int64_t width = std::min(kKeys, round_up(end - start, std::max(kPanel, Element<C>::depth)));
      gemm<false>(rows, width, s.depth, s.query.get(), s.depth, keys.at(0, start - origin), s.scores.get(), kKeys);
      for (int64_t i = 0; i < rows; ++i) {
        // Of the block's keys the row sees those from `low` to `high`.
        const int64_t high = i < count ? std::clamp<int64_t>(sequence.end(first + i) - start, 0, width) : 0;
        const int64_t low = std::clamp<int64_t>(sequence.begin(first + i) - start, 0, high);
        float* scores = s.scores + i * kKeys + low;
        C* weights = s.weights + i * kKeys;
        const float* caps = sequence.caps ? sequence.caps + start + low : nullptr;
        const float raised = std::max(top[i], highest(scores, high - low, caps));
        const float factor = call.softmax.factor, shift = call.softmax.shift(raised);
        float sum;
        if (call.dropout) {
          keep_keys(philox, call.dropout, h, first + i, start, high, s.kept);
          sum = weigh_row<true>(scores, s.kept + low, high - low, factor, shift, weights + low);
        } else {
          sum = weigh_row<false>(scores, nullptr, high - low, factor, shift, weights + low);
        }
        if (low > 0) std::memset(static_cast<void*>(weights), 0, low * sizeof(C));
        std::memset(static_cast<void*>(weights + high), 0, (width - high) * sizeof(C));
        if (start == begin) {
          total[i] = sum;
        } else if (raised != top[i]) {
          const float shrink = Softmax<C>::power(top[i] * factor - shift);
          total[i] = total[i] * shrink + sum;
          float* held = s.out + i * s.width;
          sweep(s.width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
            store(held + j, load(held + j, lanes) * Vec(shrink), lanes);
          });
        } else {
          total[i] += sum;
        }
        top[i] = raised;
      }
      const auto right = values.at(start - origin, 0);
      if (start == begin) gemm<false>(rows, s.width, width, s.weights.get(), kKeys, right, s.out.get(), s.width);
      else gemm<true>(rows, s.width, width, s.weights.get(), kKeys, right, s.out.get(), s.width);
    }
    T* out = call.out.template at<T>(b, h, token);
    float* lse = call.lse + call.query.index(b, h, token);
    for (int64_t i = 0; i < count; ++i) {
      T* to = out + i * call.out.row();
      if (total[i] == 0.f) {  // saw no key
        std::fill_n(to, head_dim, T(0.f));
        lse[i] = kInfinity;
        continue;
      }
      const Vec by(call.dropout.factor / total[i]);
      const float* held = s.out + i * s.width;
      sweep(head_dim, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
        store(to + j, load(held + j, lanes) * by, lanes);
      });
      lse[i] = call.softmax.lse(top[i], total[i]);
    }
  }

  void unit(const Unit& unit, ForwardScratch<T>& s) const {
    const Sequence& sequence = *unit.sequence;
    const int64_t blocks = ceil_div(sequence.queries, kQueries);
    const int64_t cut = unit.cuts - 1 - unit.cut;  // a causal head's longest first
    const int64_t first = blocks * cut / unit.cuts * kQueries;
    const int64_t last = std::min(blocks * (cut + 1) / unit.cuts * kQueries, sequence.queries);
    if (first >= last) return;
    const int64_t origin = sequence.begin(first) / kKeys * kKeys, token = sequence.first_key + origin;
    const int64_t keys = std::max<int64_t>(sequence.end(last - 1) - origin, 0), packed = round_up(keys, kKeys);
    const T* k = call.key.template at<T>(sequence.batch, unit.head, token);
    const T* v = call.value.template at<T>(sequence.batch, unit.head, token);
    const int64_t head_dim = call.query.head_dim;
    pack_transposed(k, call.key.row(), keys, head_dim, s.key_panels.get(), packed, s.depth, s.buffer.get());
    pack_rows(v, call.value.row(), keys, head_dim, s.value_panels.get(), packed, packed, s.width, s.buffer.get());
    const Philox philox(sequence.seed);
    for (int64_t h = unit.head * call.group(); h < (unit.head + 1) * call.group(); ++h)
      for (int64_t i = first; i < last; i += kQueries)
        block(sequence, philox, h, i, std::min(kQueries, last - i), origin, packed, s);
  }

  void run(const std::vector<const Sequence*>& sequences) const {
    int64_t most_keys = 0;
    for (const Sequence* s : sequences) most_keys = std::max(most_keys, s->length);
    const std::vector<Unit> units =
        units_of(sequences, call.key.heads, [](const Sequence& s) { return ceil_div(s.queries, kQueries); });
    parallel_units(
        static_cast<int64_t>(units.size()), [&] { return ForwardScratch<T>(most_keys, call.query.head_dim); },
        [&](int64_t u, ForwardScratch<T>& s) { unit(units[u], s); });
  }
};

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_lengths,
    const OptionalTensor& key_mask, const OptionalTensor& cu_queries, const OptionalTensor& cu_keys,
    const OptionalTensor& dropout_seed, int64_t, int64_t, bool is_causal, std::optional<int64_t> window, double scale,
    double dropout_p) {
  Tensor out = empty_like_heads(query);
  Tensor lse = empty_floats(query.sizes().slice(0, 3));
  if (query.numel() == 0 || key.numel() == 0) return {out.zero_(), lse.fill_(kInfinity)};
  const Heads q(query), k(key), v(value), o(out);
  const Sequences sequences(
      q, k, key_lengths, key_mask, cu_queries, cu_keys, dropout_seed, is_causal, window, dropout_p);
  std::vector<const Sequence*> few, many;
  for (const Sequence& s : sequences.all)
    if (s.queries > 0) (s.queries <= kFewQueries ? few : many).push_back(&s);
  dispatch(query.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const ForwardCall<T> call{q, k, v, o, lse.data_ptr<float>(), Softmax<Compute<T>>(scale), sequences.dropout};
    if (!many.empty()) Forward<T>{call}.run(many);
    if (!few.empty()) Decode<T>{call}.run(few);
  });
  return {out, lse};
}

// ---- backward ----------------------------------------------------------------------------------------------------
// Scores are held transposed, keys by queries: the weights and their gradients are then left operands as they lie, and
// the numbers that belong to a query (lse, delta) are vectors along a row.

template <typename C>
constexpr int64_t kPadding = std::max(kPanel, Element<C>::depth);  // queries are columns here, and depth there

template <typename T>
struct BackwardScratch {
  using C = Compute<T>;
  int64_t depth, width, rows;  // head_dim as a depth, a width, a count of rows
  Scratch<C> query_columns, grad_columns, query_rows, grad_rows;  // panels of all queries of the group
  Scratch<C> key, value, key_columns, weights, grad_scores, grad_panels, buffer;
  Scratch<float> scores, grads, kept, grad_key, grad_value, grad_query, lse, delta;
  GemmScope scope;

  // `queries`: of all heads of a group; `sums`: floats of their gradient.
  BackwardScratch(int64_t queries, int64_t head_dim, int64_t sums)
      : depth(round_up(head_dim, Element<C>::depth)), width(round_up(head_dim, kPanel)),
        rows(round_up(head_dim, kRowStep)), query_columns(queries * depth), grad_columns(queries * depth),
        query_rows(queries * width), grad_rows(queries * width),
        key(kBackwardKeys * depth), value(kBackwardKeys * depth), key_columns(rows * kBackwardKeys),
        weights(kBackwardKeys * kQueries), grad_scores(kBackwardKeys * kQueries), grad_panels(kBackwardKeys * kQueries),
        buffer(kPanel * round_up(std::max(depth, width), 2 * kLanes)),
        scores(kBackwardKeys * kQueries), grads(kBackwardKeys * kQueries), kept(kBackwardKeys * kQueries),
        grad_key(kBackwardKeys * width), grad_value(kBackwardKeys * width),
        grad_query(sums), lse(queries), delta(queries) {}
};

// A block of scores (rows are keys, columns queries) and what its gradients are made from.
struct ScoreBlock {
  const float *scores, *grads, *kept;  // kept: null without dropout
  const float *lse, *delta;            // of its queries
  int64_t keys, queries;
  float scale, factor;                 // of the scores; of the weights that dropout keeps
};

// Scores become weights, and the gradients of weights those of scores. Queries [from(j), until(j)) of the block see
// key j; `until` is asked only where a window ends in the block.
template <bool windowed, bool dropped, typename C, typename From, typename Until>
void weigh_block(const ScoreBlock& block, From from, Until until, C* weights, C* grad_scores, C* grad_panels) {
  const Vec scale(block.scale), factor(block.factor);
  constexpr int64_t step = Element<C>::step;
  for (int64_t j = 0; j < block.keys; j += step) {
    for (int64_t i = 0; i < block.queries; i += kLanes) {
      Vec gradient[step];
      for (int64_t r = 0; r < step; ++r) {
        const int64_t at = (j + r) * kQueries + i, hidden = from(j + r) - i;  // so many lanes do not see the key yet
        const int64_t left = windowed ? until(j + r) - i : kLanes;            // from here on they see it no longer
        Vec p(0.f), g(0.f);
        if (hidden < kLanes && left > 0) {
          // Product and difference are rounded each by itself, as in the forward's sum: a lone key weighs exactly 1.
          p = exp(load(block.scores + at) * scale - load(block.lse + i));
          if constexpr (dropped) {
            const Vec kept = load(block.kept + at);
            g = p * (load(block.grads + at) * (kept * factor) - load(block.delta + i));
            p = p * kept;
          } else {
            g = p * (load(block.grads + at) - load(block.delta + i));
          }
          if (hidden > 0) p = Vec::set(p, Vec(0.f), hidden), g = Vec::set(g, Vec(0.f), hidden);
          if (windowed && left < kLanes) p = Vec::set(Vec(0.f), p, left), g = Vec::set(Vec(0.f), g, left);
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
void write_queries(
    const float* blocks, int64_t rows, int64_t tokens, int64_t head_dim, float scale, T* to, int64_t row) {
  for (int64_t i = 0; i < tokens; ++i) {
    const float* block = blocks + i / kQueries * rows * kQueries + i % kQueries;
    for (int64_t d = 0; d < head_dim; ++d) to[i * row + d] = static_cast<T>(block[d * kQueries] * scale);
  }
}

// Some blocks of a head's keys, and the queries [low, high) that see any of them. A head that is cut has a sum of its
// queries' gradient for each part, at `offset`; they are added up in order.
struct Part {
  Unit unit;
  int64_t offset, first, last, step, low, high;  // blocks begin at `first`, `first + step` and so on below `last`

  Part(const Unit& unit_, int64_t offset_) : unit(unit_), offset(offset_) {
    const Sequence& s = *unit.sequence;
    const int64_t blocks = ceil_div(s.keys, kBackwardKeys);
    if (2 * s.window <= s.keys) {  // neighbours, which are seen by few queries
      first = blocks * unit.cut / unit.cuts * kBackwardKeys, step = kBackwardKeys;
      last = std::min(blocks * (unit.cut + 1) / unit.cuts * kBackwardKeys, s.keys);
    } else {  // one of every few: of causal attention, the first are the most work
      first = unit.cut * kBackwardKeys, last = s.keys, step = unit.cuts * kBackwardKeys;
    }
    const int64_t real = std::min(last, s.length);
    low = 0, high = s.queries;
    if (unit.cuts == 1) return;
    low = s.from(first) / kQueries * kQueries;
    high = first < real ? std::max(s.until(real - 1), low) : low;
  }
};

template <typename T>
struct Backward {
  using C = Compute<T>;
  const Heads &grad_out, &query, &key, &value, &out, &grad_query, &grad_key, &grad_value;
  const float *lse, *grad_lse;  // (batch, heads, tokens); grad_lse may be null
  float scale;
  Dropout dropout;

  int64_t group() const { return query.heads / key.heads; }
  // Floats of the gradient of one head's queries.
  int64_t sums(int64_t queries) const { return round_up(queries, kQueries) * round_up(query.head_dim, kRowStep); }

  // The queries' side of one key/value head, packed once for all of the part's key blocks.
  void pack_queries(const Part& part, BackwardScratch<T>& s) const {
    const Sequence& sequence = *part.unit.sequence;
    const int64_t tokens = part.high - part.low, head_dim = query.head_dim, count = round_up(tokens, kPadding<C>);
    for (int64_t g = 0; g < group(); ++g) {
      const int64_t h = part.unit.head * group() + g, b = sequence.batch, first = sequence.first_query + part.low;
      const T *q = query.at<T>(b, h, first), *d = grad_out.at<T>(b, h, first), *o = out.at<T>(b, h, first);
      const int64_t columns = g * count * s.depth, rows = g * count * s.width;
      C* buffer = s.buffer;
      pack_transposed(q, query.row(), tokens, head_dim, s.query_columns + columns, count, s.depth, buffer);
      pack_transposed(d, grad_out.row(), tokens, head_dim, s.grad_columns + columns, count, s.depth, buffer);
      pack_rows(q, query.row(), tokens, head_dim, s.query_rows + rows, count, count, s.width, buffer);
      pack_rows(d, grad_out.row(), tokens, head_dim, s.grad_rows + rows, count, count, s.width, buffer);
      for (int64_t i = 0; i < count; ++i) {
        float delta = 0.f, sum = kInfinity;
        if (i < tokens) {
          Sum along;
          sweep(head_dim, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
            along.add(load(d + i * grad_out.row() + j, lanes), load(o + i * out.row() + j, lanes), k);
          });
          const int64_t at = query.index(b, h, first + i);
          delta = along.total(), sum = lse[at];
          if (grad_lse && sum != kInfinity) delta -= grad_lse[at];  // of a query without keys it may be anything
        }
        s.delta[g * count + i] = delta, s.lse[g * count + i] = sum;
      }
    }
  }

  void weigh(const Sequence& sequence, const Philox& philox, int64_t h, int64_t start, int64_t first,
             const ScoreBlock& block, BackwardScratch<T>& s) const {
    const auto from = [&](int64_t j) -> int64_t {
      const int64_t at = start + j;
      if (at >= sequence.length || (sequence.caps && sequence.caps[at] < 0.f)) return kQueries;
      return sequence.from(at) - first;
    };
    const auto until = [&](int64_t j) { return sequence.until(start + j) - first; };
    const auto run = [&](auto windowed, auto dropped) {
      weigh_block<windowed.value, dropped.value>(
          block, from, until, s.weights.get(), s.grad_scores.get(), s.grad_panels.get());
    };
    const bool windowed = sequence.until(start) < std::min(first + kQueries, sequence.queries);
    if (dropout) keep_queries(philox, dropout, h, first, block.queries, start, block.keys, s.kept, kQueries);
    if (dropout && windowed) run(std::true_type(), std::true_type());
    else if (dropout) run(std::false_type(), std::true_type());
    else if (windowed) run(std::true_type(), std::false_type());
    else run(std::false_type(), std::false_type());
  }

  // One block of keys against every query that sees it; adds to the part's `grad_queries`.
  void key_block(
      const Part& part, const Philox& philox, int64_t start, BackwardScratch<T>& s, float* grad_queries) const {
    const Sequence& sequence = *part.unit.sequence;
    const int64_t b = sequence.batch, kv = part.unit.head, token = sequence.first_key + start;
    const int64_t head_dim = query.head_dim, count = std::min(kBackwardKeys, sequence.keys - start);
    const int64_t real = std::clamp<int64_t>(sequence.length - start, 0, count);  // behind the length nothing is read
    const int64_t low = part.low, queries = round_up(part.high - low, kPadding<C>);
    const int64_t keys = round_up(real, std::max(kRowStep, Element<C>::depth));
    copy_rows(key.at<T>(b, kv, token), key.row(), real, head_dim, s.key.get(), keys, s.depth);
    copy_rows(value.at<T>(b, kv, token), value.row(), real, head_dim, s.value.get(), keys, s.depth);
    for (int64_t d = 0; d < s.rows; ++d)
      for (int64_t j = 0; j < keys; ++j)
        s.key_columns[d * kBackwardKeys + j] = d < s.depth ? s.key[j * s.depth + d] : C(0.f);
    std::memset(s.grad_key.get(), 0, kBackwardKeys * s.width * sizeof(float));
    std::memset(s.grad_value.get(), 0, kBackwardKeys * s.width * sizeof(float));
    const int64_t begin = sequence.from(start) / kQueries * kQueries;
    const int64_t end = real > 0 ? sequence.until(start + real - 1) : 0;
    for (int64_t g = 0; g < group(); ++g) {
      const int64_t columns_at = g * queries * s.depth, rows_at = g * queries * s.width;
      const auto query_columns = Panels<C>::packed(s.query_columns + columns_at, s.depth);
      const auto grad_columns = Panels<C>::packed(s.grad_columns + columns_at, s.depth);
      const auto query_rows = Panels<C>::packed(s.query_rows + rows_at, queries);
      const auto grad_rows = Panels<C>::packed(s.grad_rows + rows_at, queries);
      for (int64_t first = begin; first < end; first += kQueries) {
        const int64_t at = first - low, columns = std::min(kQueries, queries - at);
        const float *sum = s.lse + g * queries + at, *delta = s.delta + g * queries + at;
        gemm<false>(keys, columns, s.depth, s.key.get(), s.depth, query_columns.at(0, at), s.scores.get(), kQueries);
        gemm<false>(keys, columns, s.depth, s.value.get(), s.depth, grad_columns.at(0, at), s.grads.get(), kQueries);
        weigh(sequence, philox, kv * group() + g, start, first,
              {s.scores, s.grads, s.kept, sum, delta, keys, columns, scale, dropout.factor}, s);
        const auto right_value = grad_rows.at(at, 0), right_key = query_rows.at(at, 0);
        gemm<true>(keys, s.width, columns, s.weights.get(), kQueries, right_value, s.grad_value.get(), s.width);
        gemm<true>(keys, s.width, columns, s.grad_scores.get(), kQueries, right_key, s.grad_key.get(), s.width);
        Panels<C> panels = Panels<C>::packed(s.grad_panels, kBackwardKeys);
        if constexpr (Element<C>::step == 1) panels = Panels<C>::row_major(s.grad_scores, kQueries);
        float* to = grad_queries + g * sums(part.high - low) + at * s.rows;
        gemm<true>(s.rows, columns, keys, s.key_columns.get(), kBackwardKeys, panels, to, kQueries);
      }
    }
    T *to_key = grad_key.at<T>(b, kv, token), *to_value = grad_value.at<T>(b, kv, token);
    write_rows(s.grad_key.get(), s.width, count, head_dim, scale, to_key, grad_key.row());
    write_rows(s.grad_value.get(), s.width, count, head_dim, dropout.factor, to_value, grad_value.row());
  }

  void run_part(const Part& part, BackwardScratch<T>& s, float* grad_queries) const {
    const Philox philox(part.unit.sequence->seed);
    pack_queries(part, s);
    for (int64_t start = part.first; start < part.last; start += part.step)
      key_block(part, philox, start, s, grad_queries);
  }

  void write_group(const Unit& unit, const float* total) const {
    const Sequence& sequence = *unit.sequence;
    const int64_t head_dim = query.head_dim, rows = round_up(head_dim, kRowStep);
    for (int64_t g = 0; g < group(); ++g) {
      T* to = grad_query.at<T>(sequence.batch, unit.head * group() + g, sequence.first_query);
      write_queries(total + g * sums(sequence.queries), rows, sequence.queries, head_dim, scale, to, grad_query.row());
    }
  }

  // Adds up what the parts of a head (from `part` on) give for its queries, in order.
  void join(const Part* part, const float* given) const {
    const int64_t rows = round_up(query.head_dim, kRowStep), all = sums(part->unit.sequence->queries);
    const Scratch<float> total(group() * all);
    std::memset(total.get(), 0, group() * all * sizeof(float));
    for (const Part* end = part + part->unit.cuts; part < end; ++part)
      for (int64_t g = 0; g < group(); ++g) {
        const int64_t count = sums(part->high - part->low);
        const float* from = given + part->offset + g * count;
        float* to = total + g * all + part->low * rows;
        sweep(count, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
          store(to + j, load(to + j, lanes) + load(from + j, lanes), lanes);
        });
      }
    write_group(part[-1].unit, total);
  }

  void run(const Sequences& sequences) const {
    std::vector<const Sequence*> all;
    for (const Sequence& s : sequences.all) all.push_back(&s);
    const auto most = [](const Sequence& s) { return ceil_div(s.keys, kBackwardKeys); };
    std::vector<Part> parts;
    std::vector<const Part*> heads;  // the first part of each head that is cut
    int64_t size = 0, most_queries = 0;
    for (const Unit& unit : units_of(all, key.heads, most)) {
      parts.emplace_back(unit, size);
      most_queries = std::max(most_queries, parts.back().high - parts.back().low);
      if (unit.cuts > 1) size += group() * sums(parts.back().high - parts.back().low);
    }
    for (const Part& part : parts)
      if (part.unit.cuts > 1 && part.unit.cut == 0) heads.push_back(&part);
    const Tensor given = at::zeros({size}, at::kFloat);
    float* sums_of_parts = given.data_ptr<float>();
    parallel_units(
        static_cast<int64_t>(parts.size()),
        [&] {
          const int64_t queries = group() * round_up(most_queries, kPadding<C>);
          return BackwardScratch<T>(queries, query.head_dim, group() * sums(most_queries));
        },
        [&](int64_t p, BackwardScratch<T>& s) {
          const Part& part = parts[p];
          if (part.unit.cuts > 1) return run_part(part, s, sums_of_parts + part.offset);
          std::memset(s.grad_query.get(), 0, group() * sums(part.high) * sizeof(float));
          run_part(part, s, s.grad_query);
          write_group(part.unit, s.grad_query);
        });
    at::parallel_for(0, static_cast<int64_t>(heads.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) join(heads[head], sums_of_parts);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const OptionalTensor& key_lengths, const OptionalTensor& key_mask,
    const OptionalTensor& cu_queries, const OptionalTensor& cu_keys, const OptionalTensor& dropout_seed, int64_t,
    int64_t, bool is_causal, std::optional<int64_t> window, double scale, double dropout_p) {
  Tensor grad_query = empty_like_heads(query), grad_key = empty_like_heads(key), grad_value = empty_like_heads(value);
  if (query.numel() == 0 || key.numel() == 0) return {grad_query.zero_(), grad_key.zero_(), grad_value.zero_()};
  const Heads g(grad_out), q(query), k(key), v(value), o(out), gq(grad_query), gk(grad_key), gv(grad_value);
  const Sequences sequences(
      q, k, key_lengths, key_mask, cu_queries, cu_keys, dropout_seed, is_causal, window, dropout_p);
  const Tensor sums = lse.contiguous(), grad_sums = grad_lse ? grad_lse->contiguous() : Tensor();
  dispatch(query.scalar_type(), [&](auto t) {
    Backward<decltype(t)>{g, q, k, v, o, gq, gk, gv, sums.const_data_ptr<float>(),
                          grad_lse ? grad_sums.const_data_ptr<float>() : nullptr, static_cast<float>(scale),
                          sequences.dropout}.run(sequences);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
}

}  // namespace gptkernels
