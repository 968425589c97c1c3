// attention on the CPU: the online softmax over blocks of keys, and its backward. The derivation is in MATH.md.
#include "attention/native_backward.h"
#include "attention/native_decode.h"

namespace gptkernels {
namespace {

constexpr int64_t kKeys = 128;  // keys in a block of the forward

template <typename T>
struct ForwardScratch {
  using C = Compute<T>;
  int64_t depth, width;  // head_dim, padded as the depth of the first product and as the width of the second
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

// Turns a row of scores into weights, power(score * factor - shift). Returns the sum of all weights, also of dropped ones.
template <typename T, bool dropped, typename C>
ALWAYS_INLINE float weigh_row(
    const float* scores, const float* kept, int64_t count, float factor, float shift, C* weights) {
  Sum total;
  const Vec by(factor), down(-shift);
  sweep(count, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
    Vec p = keep(Softmax<T>::power(fmadd(load(scores + j, lanes), by, down)), lanes, 0.f);
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

  // Queries [first, first + count) of one head against the packed keys and values, which begin at key `origin`.
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
    call.softmax.prepare(s.query.get(), count * s.depth);
    const int64_t begin = sequence.begin(first) / kKeys * kKeys, end = sequence.end(first + count - 1);
    for (int64_t start = begin; start < end; start += kKeys) {
      const int64_t width = std::min(kKeys, round_up(end - start, std::max(kPanel, Element<C>::depth)));
      multiply<T, false>(sequence, rows, width, end - start, s.depth, s.query.get(), s.depth, keys.at(0, start - origin),
                         s.scores.get(), kKeys);
      for (int64_t i = 0; i < rows; ++i) {
        // The row sees the block's keys [low, high).
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
          sum = weigh_row<T, true>(scores, s.kept + low, high - low, factor, shift, weights + low);
        } else {
          sum = weigh_row<T, false>(scores, nullptr, high - low, factor, shift, weights + low);
        }
        if (low > 0) std::memset(static_cast<void*>(weights), 0, low * sizeof(C));
        std::memset(static_cast<void*>(weights + high), 0, (width - high) * sizeof(C));
        if (start == begin) {
          total[i] = sum;
        } else if (raised != top[i]) {
          const float shrink = Softmax<T>::power(top[i] * factor - shift);
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
    for (int64_t i = 0; i < count; ++i) {
      call.save(call.query.index(b, h, token + i), top[i], total[i]);
      T* to = out + i * call.out.row();
      if (total[i] == 0.f) {  // saw no key
        std::fill_n(to, head_dim, T(0.f));
        continue;
      }
      const Vec by(call.dropout.factor / total[i]);
      const float* held = s.out + i * s.width;
      sweep(head_dim, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
        store(to + j, load(held + j, lanes) * by, lanes);
      });
    }
  }

  void unit(const Unit& unit, ForwardScratch<T>& s) const {
    const Sequence& sequence = *unit.sequence;
    const int64_t blocks = ceil_div(sequence.queries, kQueries);
    const int64_t cut = unit.cuts - 1 - unit.cut;  // the last queries first: in causal attention they see the most keys
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
  const bool apart = query.scalar_type() == ScalarType::Float;
  Tensor out = empty_like_heads(query);
  Tensor statistics = empty_floats({apart ? 2 : 1, query.size(0), query.size(1), query.size(2)});
  if (query.numel() == 0 || key.numel() == 0) {
    std::fill_n(statistics.mutable_data_ptr<float>(), statistics.numel(), apart ? 0.f : kInfinity);
    return {zeroed(out), statistics};
  }
  const Heads q(query), k(key), v(value), o(out);
  const Sequences sequences(
      q, k, key_lengths, key_mask, cu_queries, cu_keys, dropout_seed, is_causal, window, dropout_p);
  std::vector<const Sequence*> few, many;
  for (const Sequence& s : sequences.all)
    if (s.queries > 0) (s.queries <= kFew ? few : many).push_back(&s);
  dispatch(query.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const ForwardCall<T> call{q, k, v, o, statistics.mutable_data_ptr<float>(), Softmax<T>(scale), sequences.dropout};
    if (!many.empty()) Forward<T>{call}.run(many);
    if (!few.empty()) Decode<T>{call}.run(few);
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& statistics, const OptionalTensor& key_lengths, const OptionalTensor& key_mask,
    const OptionalTensor& cu_queries, const OptionalTensor& cu_keys, const OptionalTensor& dropout_seed, int64_t,
    int64_t, bool is_causal, std::optional<int64_t> window, double scale, double dropout_p) {
  Tensor grad_query = empty_like_heads(query), grad_key = empty_like_heads(key), grad_value = empty_like_heads(value);
  if (query.numel() == 0 || key.numel() == 0) return {zeroed(grad_query), zeroed(grad_key), zeroed(grad_value)};
  const Heads g(grad_out), q(query), k(key), v(value), o(out), gq(grad_query), gk(grad_key), gv(grad_value);
  const Sequences sequences(
      q, k, key_lengths, key_mask, cu_queries, cu_keys, dropout_seed, is_causal, window, dropout_p);
  const Tensor kept = as_contiguous(statistics);
  const OptionalTensor grad_sums = grad_lse ? OptionalTensor(as_contiguous(*grad_lse)) : std::nullopt;
  dispatch(query.scalar_type(), [&](auto t) {
    using T = decltype(t);
    Backward<T>{g, q, k, v, o, gq, gk, gv, kept.const_data_ptr<float>(),
                grad_sums ? grad_sums->const_data_ptr<float>() : nullptr, Softmax<T>(scale), sequences.dropout}.run(sequences);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(attention_forward));
  m.impl("attention_backward", TORCH_BOX(attention_backward));
}

}  // namespace gptkernels
