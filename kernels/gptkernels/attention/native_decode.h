// Attention of a few queries over many keys, as in generation. Its time is that of reading the keys, which are not packed.
#pragma once

#include "attention/native.h"

namespace gptkernels {

constexpr int64_t kDecodeKeys = 64;    // keys whose scores are held at a time
constexpr int64_t kDecodePart = 256;   // the fewest keys that are worth a thread

template <typename T>
struct DecodeScratch {
  Scratch<std::conditional_t<Softmax<T>::apart, double, float>> query;  // summed in double, see Sequence::few
  Scratch<float> scores, kept, partial;
  DecodeScratch(int64_t rows, int64_t head_dim)
      : query(rows * head_dim), scores(rows * kDecodeKeys), kept(round_up(kDecodeKeys, kKeptAtOnce)),
        partial(rows * (head_dim + 2)) {}
};

template <typename T>
struct Decode {
  const ForwardCall<T>& call;

  // A row is one query of one head of the group. A part of the keys gives a record for each row: the highest score, the sum of
  // the weights, and the weighted sum of the values.
  int64_t rows(const Sequence& sequence) const { return call.group() * sequence.queries; }
  int64_t record() const { return call.key.head_dim + 2; }

  static int64_t first_block(const Sequence& s) { return s.begin(0) / kDecodeKeys; }
  static int64_t last_block(const Sequence& s) {
    return std::max(ceil_div(s.end(s.queries - 1), kDecodeKeys), first_block(s));
  }

  template <typename Q>
  ALWAYS_INLINE float product(const T* key, const Q* query) const {
    if constexpr (Softmax<T>::apart) return dot_in_double(key, query, call.key.head_dim);
    else return dot(key, query, call.key.head_dim);
  }

  void part(const Unit& unit, DecodeScratch<T>& s, float* records) const {
    const Sequence& sequence = *unit.sequence;
    const int64_t head_dim = call.key.head_dim, count_rows = rows(sequence), b = sequence.batch;
    const int64_t row_key = call.key.row(), row_value = call.value.row();
    for (int64_t r = 0; r < count_rows; ++r) {
      const int64_t h = unit.head * call.group() + r / sequence.queries, i = r % sequence.queries;
      const T* query = call.query.template at<T>(b, h, sequence.first_query + i);
      auto* row = s.query + r * head_dim;
      if constexpr (Softmax<T>::apart)
        for (int64_t d = 0; d < head_dim; ++d) row[d] = query[d] * call.softmax.scale;
      else copy_rows(query, call.query.row(), 1, head_dim, row, 1, head_dim);
      records[r * record()] = -kInfinity;
      std::fill_n(records + r * record() + 1, head_dim + 1, 0.f);
    }
    const Philox philox(sequence.seed);
    const int64_t origin = first_block(sequence), blocks = last_block(sequence) - origin;
    const int64_t first = (origin + blocks * unit.cut / unit.cuts) * kDecodeKeys;
    const int64_t next = (origin + blocks * (unit.cut + 1) / unit.cuts) * kDecodeKeys;
    const int64_t last = std::min(next, sequence.end(sequence.queries - 1));
    for (int64_t start = first; start < last; start += kDecodeKeys) {
      const int64_t count = std::min(kDecodeKeys, last - start);
      const T* keys = call.key.template at<T>(b, unit.head, sequence.first_key + start);
      const T* values = call.value.template at<T>(b, unit.head, sequence.first_key + start);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t r = 0; r < count_rows; ++r) {
          s.scores[r * kDecodeKeys + j] = product(keys + j * row_key, s.query + r * head_dim);
        }
      for (int64_t r = 0; r < count_rows; ++r) {
        float *held = records + r * record(), *row = s.scores + r * kDecodeKeys, *out = held + 2;
        const int64_t i = r % sequence.queries;
        const int64_t low = std::max<int64_t>(sequence.begin(i) - start, 0);
        const int64_t high = std::min(sequence.end(i) - start, count);
        if (low >= high) continue;
        float top = held[0];
        for (int64_t j = low; j < high; ++j) {
          if (sequence.caps && sequence.caps[start + j] < 0.f) row[j] = -kInfinity;
          top = row[j] > top ? row[j] : top;
        }
        const float shift = call.softmax.shift(top);
        const float shrink = Softmax<T>::power(held[0] * call.softmax.factor - shift);
        const Vec factor(call.softmax.factor), down(-shift);
        Sum total;
        sweep(high - low, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
          const Vec w = keep(Softmax<T>::power(fmadd(load(row + low + j, lanes), factor, down)), lanes, 0.f);
          store(row + low + j, w, lanes);
          total.add(w, k);
        });
        held[0] = top;
        held[1] = held[1] * shrink + total.total();
        if (call.dropout) {
          keep_keys(philox, call.dropout, unit.head * call.group() + r / sequence.queries, i, start, high, s.kept);
          for (int64_t j = low; j < high; ++j) row[j] *= s.kept[j];
        }
        sweep(head_dim, [&](int64_t d, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
          Vec sum = load(out + d, lanes) * Vec(shrink);
          for (int64_t j = low; j < high; ++j) sum = fmadd(Vec(row[j]), load(values + j * row_value + d, lanes), sum);
          store(out + d, sum, lanes);
        });
      }
    }
  }

  // Combines the records of a head's parts, which lie one after the other, and writes the results of the head.
  void finish(const Unit& unit, float* records) const {
    const Sequence& sequence = *unit.sequence;
    const int64_t stride = rows(sequence) * record();
    for (int64_t r = 0; r < rows(sequence); ++r) {
      float *first = records + r * record(), *sum = first + 2;
      float top = -kInfinity, total = 0.f;
      for (int64_t cut = 0; cut < unit.cuts; ++cut) top = std::max(top, first[cut * stride]);
      const float shift = call.softmax.shift(top);
      for (int64_t cut = 0; cut < unit.cuts; ++cut) {
        const float *p = first + cut * stride, shrink = Softmax<T>::power(p[0] * call.softmax.factor - shift);
        total += p[1] * shrink;
        for (int64_t d = 0; d < call.key.head_dim; ++d) sum[d] = (cut ? sum[d] : 0.f) + p[2 + d] * shrink;
      }
      const int64_t h = unit.head * call.group() + r / sequence.queries;
      const int64_t token = sequence.first_query + r % sequence.queries;
      T* to = call.out.template at<T>(sequence.batch, h, token);
      const bool nothing = total == 0.f;
      for (int64_t d = 0; d < call.key.head_dim; ++d)
        to[d] = static_cast<T>(nothing ? 0.f : sum[d] / total * call.dropout.factor);
      call.save(call.query.index(sequence.batch, h, token), top, total);
    }
  }

  void run(const std::vector<const Sequence*>& sequences) const {
    const std::vector<Unit> units = units_of(sequences, call.key.heads, [](const Sequence& s) {
      return (last_block(s) - first_block(s)) * kDecodeKeys / kDecodePart;
    });
    const int64_t count = static_cast<int64_t>(units.size());
    std::vector<int64_t> offsets(count);  // where each part's records begin; a head in one part needs none
    int64_t size = 0, most_rows = 0;
    for (int64_t u = 0; u < count; ++u) {
      offsets[u] = size, most_rows = std::max(most_rows, rows(*units[u].sequence));
      if (units[u].cuts > 1) size += rows(*units[u].sequence) * record();
    }
    Scratch<float> records(size);
    parallel_units(
        count, [&] { return std::make_unique<DecodeScratch<T>>(most_rows, call.key.head_dim); },
        [&](int64_t u, std::unique_ptr<DecodeScratch<T>>& s) {
          const bool whole = units[u].cuts == 1;
          float* own = whole ? s->partial.get() : records + offsets[u];
          part(units[u], *s, own);
          if (whole) finish(units[u], own);
        });
    for (int64_t u = 0; u < count; ++u)
      if (units[u].cuts > 1 && units[u].cut == 0) finish(units[u], records + offsets[u]);
  }
};

}  // namespace gptkernels
