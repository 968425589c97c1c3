// The backward of attention: five products for each block of keys and each block of queries that sees it. See MATH.md.
#pragma once

#include "attention/native_weights.h"

namespace gptkernels {

template <typename C>
constexpr int64_t kPadding = std::max(kPanel, Element<C>::depth);  // the queries are padded for their use as columns and as depth

template <typename T>
struct BackwardScratch {
  using C = Compute<T>;
  int64_t depth, width, rows;  // head_dim, padded as a depth, a width, a count of rows
  Scratch<C> query_columns, grad_columns, query_rows, grad_rows;  // panels of all queries of the group
  Scratch<C> key, value, key_columns, weights, grad_scores, grad_panels, buffer, out_columns;
  Scratch<float> scores, grads, kept, grad_key, grad_value, grad_query, shift, inverse, delta, lift;
  GemmScope scope;

  // `queries`: the queries of all heads of a group, padded; `sums`: the floats of their gradient.
  BackwardScratch(int64_t queries, int64_t head_dim, int64_t sums)
      : depth(round_up(head_dim, Element<C>::depth)), width(round_up(head_dim, kPanel)),
        rows(round_up(head_dim, kRowStep)), query_columns(queries * depth), grad_columns(queries * depth),
        query_rows(queries * width), grad_rows(queries * width),
        key(kBlockKeys<T> * depth), value(kBlockKeys<T> * depth), key_columns(rows * kBlockKeys<T>),
        weights(kBlockKeys<T> * kQueries), grad_scores(kBlockKeys<T> * kQueries), grad_panels(kBlockKeys<T> * kQueries),
        buffer(kPanel * round_up(std::max(depth, width), 2 * kLanes)), out_columns(kQueries * depth),
        scores(kBlockKeys<T> * kQueries), grads(kBlockKeys<T> * kQueries), kept(kBlockKeys<T> * kQueries),
        grad_key(kBlockKeys<T> * width), grad_value(kBlockKeys<T> * width),
        grad_query(sums), shift(queries), inverse(queries), delta(queries), lift(queries) {}
};

template <typename T>
void write_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, float scale, T* to, int64_t row) {
  for (int64_t i = 0; i < rows; ++i)
    sweep(columns, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
      store(to + i * row + j, load(from + i * stride + j, lanes) * Vec(scale), lanes);
    });
}

// Writes the gradient of one head's queries, which is held transposed in blocks of (head_dim, kQueries).
template <typename T>
void write_queries(
    const float* blocks, int64_t rows, int64_t tokens, int64_t head_dim, float scale, T* to, int64_t row) {
  for (int64_t i = 0; i < tokens; ++i) {
    const float* block = blocks + i / kQueries * rows * kQueries + i % kQueries;
    for (int64_t d = 0; d < head_dim; ++d) to[i * row + d] = static_cast<T>(block[d * kQueries] * scale);
  }
}

// Some blocks of a head's keys, and the queries [low, high) that see any of them. If a head is cut into several parts, each
// part sums the queries' gradient for itself, at `offset`; `join` adds these sums in order.
struct Part {
  Unit unit;
  int64_t offset, first, last, step, low, high;  // blocks begin at `first`, `first + step` and so on below `last`

  // `keys`: the keys in a block.
  Part(const Unit& unit_, int64_t offset_, int64_t keys) : unit(unit_), offset(offset_) {
    const Sequence& s = *unit.sequence;
    const int64_t blocks = ceil_div(s.keys, keys);
    if (2 * s.window <= s.keys) {  // neighbouring blocks: few queries see them
      first = blocks * unit.cut / unit.cuts * keys, step = keys;
      last = std::min(blocks * (unit.cut + 1) / unit.cuts * keys, s.keys);
    } else {  // every cuts-th block, because in causal attention the first blocks are the most work
      first = unit.cut * keys, last = s.keys, step = unit.cuts * keys;
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
  const float *statistics, *grad_lse;  // as the forward saved them; (batch, heads, tokens) or null
  Softmax<T> softmax;
  Dropout dropout;

  int64_t group() const { return query.heads / key.heads; }
  // The number of floats in the gradient of one head's queries.
  int64_t sums(int64_t queries) const { return round_up(queries, kQueries) * round_up(query.head_dim, kRowStep); }

  // Packs the queries of one key/value head and their output gradients, once for all key blocks of the part.
  void pack_queries(const Part& part, BackwardScratch<T>& s) const {
    const Sequence& sequence = *part.unit.sequence;
    const int64_t tokens = part.high - part.low, head_dim = query.head_dim, count = round_up(tokens, kPadding<C>);
    for (int64_t g = 0; g < group(); ++g) {
      const int64_t h = part.unit.head * group() + g, b = sequence.batch, first = sequence.first_query + part.low;
      const T *q = query.at<T>(b, h, first), *d = grad_out.at<T>(b, h, first);
      const int64_t columns = g * count * s.depth, rows = g * count * s.width;
      C* buffer = s.buffer;
      pack_transposed(q, query.row(), tokens, head_dim, s.query_columns + columns, count, s.depth, buffer);
      pack_transposed(d, grad_out.row(), tokens, head_dim, s.grad_columns + columns, count, s.depth, buffer);
      pack_rows(q, query.row(), tokens, head_dim, s.query_rows + rows, count, count, s.width, buffer);
      pack_rows(d, grad_out.row(), tokens, head_dim, s.grad_rows + rows, count, count, s.width, buffer);
      softmax.prepare(s.query_columns.get() + columns, count * s.depth);
      softmax.prepare(s.query_rows.get() + rows, count * s.width);
      describe_rows(part, g, count, s);
    }
  }

  // Whether one block holds all keys that queries [first, first + kQueries) see.
  static bool whole(const Sequence& s, int64_t first) {
    const int64_t begin = s.begin(first), end = s.end(std::min(first + kQueries, s.queries) - 1);
    return begin < end && begin / kBlockKeys<T> == (end - 1) / kBlockKeys<T>;
  }

  // Fills shift, inverse, lift and delta for the queries of the part's head g. `count`: their number, padded.
  void describe_rows(const Part& part, int64_t g, int64_t count, BackwardScratch<T>& s) const {
    const int64_t tokens = part.high - part.low, first = part.unit.sequence->first_query + part.low;
    const int64_t h = part.unit.head * group() + g, row = query.index(part.unit.sequence->batch, h, first);
    float *shift = s.shift + g * count, *inverse = s.inverse + g * count, *lift = s.lift + g * count;
    float* delta = s.delta + g * count;
    for (int64_t i = 0; i < count; ++i)  // the values for padding, and for queries that see no key
      shift[i] = kInfinity, inverse[i] = lift[i] = delta[i] = 0.f;
    sum_delta(part, g, count, s);
    for (int64_t i = 0; i < tokens; ++i) {
      const float first = statistics[row + i], given = grad_lse ? grad_lse[row + i] : 0.f;
      if constexpr (Softmax<T>::apart) {
        const float total = statistics[query.batch * query.heads * query.tokens + row + i];
        if (total != 0.f) shift[i] = first, inverse[i] = 1.f / total, lift[i] = given;
      } else {
        shift[i] = first;
        if (first != kInfinity) delta[i] -= given;  // `given` may be anything for a query that sees no key
      }
    }
  }

  // Computes delta for head g of the part, the sum of output times gradient of each query, unless `settle_delta` will do so.
  void sum_delta(const Part& part, int64_t g, int64_t count, BackwardScratch<T>& s) const {
    const Sequence& sequence = *part.unit.sequence;
    const int64_t tokens = part.high - part.low, first = sequence.first_query + part.low, head_dim = query.head_dim;
    const int64_t h = part.unit.head * group() + g;
    for (int64_t block = 0; block < tokens; block += kQueries) {
      if (Softmax<T>::apart && whole(sequence, part.low + block)) continue;
      const int64_t real = std::min(kQueries, tokens - block), padded = std::min(kQueries, count - block);
      const T* d = grad_out.at<T>(sequence.batch, h, first + block);
      const T* o = out.at<T>(sequence.batch, h, first + block);
      float* delta = s.delta + g * count + block;
      if constexpr (!Softmax<T>::apart) {
        for (int64_t i = 0; i < real; ++i) delta[i] = dot(d + i * grad_out.row(), o + i * out.row(), head_dim);
      } else if (sequence.few()) {
        for (int64_t i = 0; i < real; ++i) delta[i] = dot_in_double(d + i * grad_out.row(), o + i * out.row(), head_dim);
      } else {
        // In the same order as the products that give the gradients of the weights: if one key has all the weight, delta then
        // equals that key's gradient to the last bit, and their difference is 0.
        pack_transposed(o, out.row(), real, head_dim, s.out_columns.get(), padded, s.depth, s.buffer.get());
        const float *outs = s.out_columns, *grads = s.grad_columns + (g * count + block) * s.depth;
        for (int64_t i = 0; i < padded; i += kLanes) {
          Vec sum(0.f);
          const int64_t begin = i / kPanel * kPanel * s.depth + i % kPanel;
          for (int64_t at = begin; at < begin + s.depth * kPanel; at += kPanel)
            sum = fmadd(load(outs + at), load(grads + at), sum);
          store(delta + i, sum);
        }
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
      if (block.settle) settle_delta<T, windowed.value, dropped.value>(block, from, until);
      weigh_block<T, windowed.value, dropped.value>(
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
    const int64_t head_dim = query.head_dim, count = std::min(kBlockKeys<T>, sequence.keys - start);
    const bool skipped = start + count <= sequence.skipped;
    const int64_t real = skipped ? 0 : std::clamp<int64_t>(sequence.length - start, 0, count);  // hidden keys are never read
    const int64_t low = part.low, queries = round_up(part.high - low, kPadding<C>);
    constexpr int64_t kKeysStep = std::max(kRowStep, Element<C>::depth);
    const int64_t all = round_up(real, kKeysStep);
    copy_rows(key.at<T>(b, kv, token), key.row(), real, head_dim, s.key.get(), all, s.depth);
    copy_rows(value.at<T>(b, kv, token), value.row(), real, head_dim, s.value.get(), all, s.depth);
    for (int64_t d = 0; d < s.rows; ++d)
      for (int64_t j = 0; j < all; ++j)
        s.key_columns[d * kBlockKeys<T> + j] = d < s.depth ? s.key[j * s.depth + d] : C(0.f);
    std::memset(s.grad_key.get(), 0, kBlockKeys<T> * s.width * sizeof(float));
    std::memset(s.grad_value.get(), 0, kBlockKeys<T> * s.width * sizeof(float));
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
        const int64_t row = g * queries + at;
        const bool settle = Softmax<T>::apart && whole(sequence, first);
        const int64_t last = std::min(first + kQueries, sequence.queries) - 1;
        const int64_t keys = round_up(std::clamp<int64_t>(sequence.end(last) - start, 0, real), kKeysStep);
        const int64_t seeing = last + 1 - first;  // columns that are queries and not padding
        const auto product = [&](const C* left, Panels<C> right, float* to) {
          multiply<T, false>(sequence, keys, columns, seeing, s.depth, left, s.depth, right, to, kQueries);
        };
        product(s.key.get(), query_columns.at(0, at), s.scores.get());
        product(s.value.get(), grad_columns.at(0, at), s.grads.get());
        weigh(sequence, philox, kv * group() + g, start, first,
              {s.scores, s.grads, s.kept, s.shift + row, s.inverse + row, s.lift + row, s.delta + row, keys, columns,
               softmax.scale, dropout.factor, settle}, s);
        const auto add = [&](const C* left, Panels<C> right, float* to) {
          multiply<T, true>(sequence, keys, s.width, s.width, columns, left, kQueries, right, to, s.width);
        };
        add(s.weights.get(), grad_rows.at(at, 0), s.grad_value.get());
        add(s.grad_scores.get(), query_rows.at(at, 0), s.grad_key.get());
        Panels<C> panels = Panels<C>::packed(s.grad_panels, kBlockKeys<T>);
        if constexpr (Element<C>::step == 1) panels = Panels<C>::row_major(s.grad_scores, kQueries);
        float* to = grad_queries + g * sums(part.high - low) + at * s.rows;
        multiply<T, true>(
            sequence, s.rows, columns, seeing, keys, s.key_columns.get(), kBlockKeys<T>, panels, to, kQueries);
      }
    }
    T *to_key = grad_key.at<T>(b, kv, token), *to_value = grad_value.at<T>(b, kv, token);
    const float scale = Softmax<T>::apart ? 1.f : softmax.scale;  // with `apart` the queries are already scaled
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
      write_queries(
          total + g * sums(sequence.queries), rows, sequence.queries, head_dim, softmax.scale, to, grad_query.row());
    }
  }

  // Adds the gradients that the parts of a head (from `part` on) give for its queries, in order.
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
    const auto most = [](const Sequence& s) { return ceil_div(s.keys, kBlockKeys<T>); };
    std::vector<Part> parts;
    std::vector<const Part*> heads;  // the first part of each head that is cut
    int64_t size = 0, most_queries = 0;
    for (const Unit& unit : units_of(all, key.heads, most)) {
      parts.emplace_back(unit, size, kBlockKeys<T>);
      most_queries = std::max(most_queries, parts.back().high - parts.back().low);
      if (unit.cuts > 1) size += group() * sums(parts.back().high - parts.back().low);
    }
    for (const Part& part : parts)
      if (part.unit.cuts > 1 && part.unit.cut == 0) heads.push_back(&part);
    const Tensor given = zeroed(empty_floats({size}));
    float* sums_of_parts = given.mutable_data_ptr<float>();
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
    parallel_for(0, static_cast<int64_t>(heads.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) join(heads[head], sums_of_parts);
    });
  }
};

}  // namespace gptkernels
