// Attention of a few queries over many keys, as in generation: bound by reading the keys, which are taken as they lie.
#pragma once

#include "attention.h"

namespace gptkernels {

constexpr int64_t kDecodeKeys = 64;    // keys whose scores are held at a time
constexpr int64_t kDecodePart = 256;   // fewest keys that are worth a thread of their own

// What one part of the keys gives for one query: its top, the sum of its weights, and their sum of values.
struct DecodeState {
  Scratch<float> query, scores, out;
  DecodeState(int64_t rows, int64_t head_dim) : query(rows * head_dim), scores(rows * kDecodeKeys), out(rows * head_dim) {}
};

// `rows` queries (the group's heads times the tokens) over keys [first, last); partial holds (top, total, out[head_dim])
// for each. A row sees the keys below ends[row].
template <typename T>
void decode_part(const Heads& key, const Heads& value, int64_t b, int64_t kv, int64_t first, int64_t last, const int64_t* ends,
                 const float* caps, float factor, int64_t rows, const float* query, float* scores, float* partial) {
  const int64_t head_dim = key.head_dim, record = head_dim + 2;
  for (int64_t r = 0; r < rows; ++r) {
    float* p = partial + r * record;
    p[0] = -kInfinity;
    std::fill_n(p + 1, head_dim + 1, 0.f);
  }
  for (int64_t start = first; start < last; start += kDecodeKeys) {
    const int64_t count = std::min(kDecodeKeys, last - start);
    const T *keys = key.at<T>(b, kv, start), *values = value.at<T>(b, kv, start);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t r = 0; r < rows; ++r) {
        Sum dot;
        sweep(head_dim, [&](int64_t d, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
          dot.add(load(keys + j * key.row() + d, lanes), load(query + r * head_dim + d, lanes), k);
        });
        scores[r * kDecodeKeys + j] = dot.total();
      }
    for (int64_t r = 0; r < rows; ++r) {
      float *p = partial + r * record, *row = scores + r * kDecodeKeys;
      const int64_t visible = std::clamp<int64_t>(ends[r] - start, 0, count);
      float top = p[0];
      for (int64_t j = 0; j < visible; ++j) {
        if (caps && caps[start + j] < 0.f) row[j] = -kInfinity;
        else row[j] *= factor;
        top = row[j] > top ? row[j] : top;
      }
      const float shift = top == -kInfinity ? 0.f : top, shrink = Softmax<Compute<T>>::power(p[0] - shift);
      Sum total;
      sweep(visible, [&](int64_t j, auto lanes, auto k) ALWAYS_INLINE_LAMBDA {
        const Vec w = keep(Softmax<Compute<T>>::power(load(row + j, lanes) - Vec(shift)), lanes, 0.f);
        store(row + j, w, lanes);
        total.add(w, k);
      });
      p[0] = top;
      p[1] = (p[0] == -kInfinity ? 0.f : p[1] * shrink) + total.total();
      float* out = p + 2;
      sweep(head_dim, [&](int64_t d, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
        Vec held = load(out + d, lanes) * Vec(shrink);
        for (int64_t j = 0; j < visible; ++j) held = fmadd(Vec(row[j]), load(values + j * value.row() + d, lanes), held);
        store(out + d, held, lanes);
      });
    }
  }
}

template <typename T>
void decode(const Heads& query, const Heads& key, const Heads& value, const Visibility& seen, float factor, const Heads& out,
            float* lse) {
  const int64_t group = query.heads / key.heads, tokens = query.tokens, head_dim = query.head_dim, rows = group * tokens;
  const int64_t heads = query.batch * key.heads, cuts = parts(heads, key.tokens / kDecodePart), record = head_dim + 2;
  Tensor partial = empty_floats({heads, cuts, rows, record});
  float* partials = partial.data_ptr<float>();
  parallel_units(
      heads * cuts, [&] { return std::make_unique<DecodeState>(rows, head_dim); },
      [&](int64_t unit, std::unique_ptr<DecodeState>& s) {
        const int64_t cut = unit % cuts, b = unit / cuts / key.heads, kv = unit / cuts % key.heads;
        std::vector<int64_t> ends(rows);
        int64_t most = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t h = kv * group + r / tokens, i = r % tokens;
          copy_rows(query.at<T>(b, h, i), query.row(), 1, head_dim, s->query + r * head_dim, 1, head_dim);
          ends[r] = seen.end(b, i);
          most = std::max(most, ends[r]);
        }
        const int64_t first = key.tokens * cut / cuts, last = std::min(key.tokens * (cut + 1) / cuts, most);
        decode_part<T>(key, value, b, kv, first, last, ends.data(), seen.caps_of(b), factor, rows, s->query, s->scores,
                       partials + unit * rows * record);
      });
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = head / key.heads, h = head % key.heads * group + r / tokens, i = r % tokens;
      float *first = partials + (head * cuts * rows + r) * record, *sum = first + 2;
      float top = -kInfinity, total = 0.f;
      for (int64_t cut = 0; cut < cuts; ++cut) top = std::max(top, first[cut * rows * record]);
      const float shift = top == -kInfinity ? 0.f : top;
      for (int64_t cut = 0; cut < cuts; ++cut) {
        const float *p = first + cut * rows * record, shrink = Softmax<Compute<T>>::power(p[0] - shift);
        total += p[1] * shrink;
        for (int64_t d = 0; d < head_dim; ++d) sum[d] = (cut ? sum[d] : 0.f) + p[2 + d] * shrink;
      }
      T* to = out.at<T>(b, h, i);
      const bool nothing = total == 0.f;
      for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<T>(nothing ? 0.f : sum[d] / total);
      lse[(b * query.heads + h) * tokens + i] = nothing ? kInfinity : top + Softmax<Compute<T>>::log(total);
    }
}

}  // namespace gptkernels
