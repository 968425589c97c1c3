// rotary on the CPU: a thread widens a token's angles once and turns all heads by them, one read and one write of each.
#include "common.h"

namespace gptkernels {
namespace {

// A token's angles as floats, sines negated for the turn back. Interleaved, each stands beside itself, and the first sine
// of two with the sign of a pair's first row: out = x cos + swapped(x) sin.
struct Angles {
  const Tensor cos, sin;
  const int64_t pairs;

  static Tensor adjacent(const Tensor& table) {
    const Tensor whole = table.stride(-1) == 1 ? table : table.contiguous();
    return whole.dim() == 3 ? whole : whole.unsqueeze(0);
  }
  Angles(const Tensor& cos, const Tensor& sin) : cos(adjacent(cos)), sin(adjacent(sin)), pairs(cos.size(-1)) {}

  template <typename T>
  static const T* row(const Tensor& table, int64_t batch, int64_t token) {
    return table.const_data_ptr<T>() + (table.size(0) > 1 ? batch * table.stride(0) : 0) + token * table.stride(1);
  }
  template <typename T>
  void read(int64_t batch, int64_t token, bool interleaved, bool inverse, float* c, float* s) const {
    const T *cosines = row<T>(cos, batch, token), *sines = row<T>(sin, batch, token);
    const float sign = inverse ? -1.f : 1.f;
    if (interleaved) {
      for (int64_t i = 0; i < pairs; ++i) {
        c[2 * i] = c[2 * i + 1] = static_cast<float>(cosines[i]);
        s[2 * i + 1] = sign * static_cast<float>(sines[i]);
        s[2 * i] = -s[2 * i + 1];
      }
    } else {
      sweep(pairs, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
        store(c + j, load(cosines + j, lanes), lanes);
        store(s + j, load(sines + j, lanes) * Vec(sign), lanes);
      });
    }
  }
};

template <typename T>
void turn_halves(const T* x, T* out, const float* c, const float* s, int64_t pairs, bool past) {
  sweep(pairs, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
    const Vec a = load(x + j, lanes), b = load(x + pairs + j, lanes), cosine = load(c + j, lanes), sine = load(s + j, lanes);
    put(out + j, a * cosine - b * sine, lanes, past);
    put(out + pairs + j, b * cosine + a * sine, lanes, past);
  });
}

template <typename T>
void turn_neighbours(const T* x, T* out, const float* c, const float* s, int64_t pairs, bool past) {
  sweep(2 * pairs, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
    const Vec v = load(x + j, lanes);
    put(out + j, v * load(c + j, lanes) + swapped(v) * load(s + j, lanes), lanes, past);
  });
}

Tensor rotate(const Tensor& given, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const int64_t batches = given.size(0), heads = given.size(1), tokens = given.size(2), head_dim = given.size(3);
  Tensor out = at::empty({batches, tokens, heads, head_dim}, given.options());
  if (given.numel() == 0) return out.transpose(1, 2);
  const Tensor x = given.stride(3) == 1 ? given : given.contiguous();
  const Angles angles(cos, sin);
  const int64_t pairs = angles.pairs, rest = head_dim - 2 * pairs;
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* in = x.const_data_ptr<T>();
    T* results = out.data_ptr<T>();
    const bool past = goes_past_caches(out) && pairs * x.element_size() % 64 == 0;  // both halves from a line's start on
    at::parallel_for(0, batches * tokens, std::max<int64_t>(1, 8192 / (heads * head_dim)), [&](int64_t begin, int64_t end) {
      Scratch<float> c(2 * pairs), s(2 * pairs);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / tokens, token = i % tokens;
        if (angles.cos.scalar_type() == at::kFloat) angles.read<float>(batch, token, interleaved, inverse, c, s);
        else angles.read<T>(batch, token, interleaved, inverse, c, s);
        for (int64_t head = 0; head < heads; ++head) {
          const T* row = in + batch * x.stride(0) + head * x.stride(1) + token * x.stride(2);
          T* to = results + (i * heads + head) * head_dim;
          if (interleaved) turn_neighbours(row, to, c.get(), s.get(), pairs, past);
          else turn_halves(row, to, c.get(), s.get(), pairs, past);
          std::copy_n(row + 2 * pairs, rest, to + 2 * pairs);
        }
      }
      if (past) drain();
    });
  });
  return out.transpose(1, 2);
}

Tensor rotary_forward(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate(x, cos, sin, interleaved, false);
}

Tensor rotary_backward(const Tensor& grad_out, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate(grad_out, cos, sin, interleaved, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("rotary_forward", rotary_forward);
  m.impl("rotary_backward", rotary_backward);
}

}  // namespace gptkernels
