// rotary on the CPU. A thread converts the angles of a token to float once and rotates all heads by them.
#include "csrc/common.h"

namespace gptkernels {
namespace {

// The angles of a token as floats; `inverse` negates the sines. If the pairs are interleaved, each cosine and sine is stored
// twice, the first sine negated, so that out = x cos + swapped(x) sin.
struct Angles {
  // (tokens, pairs), or (batch, tokens, pairs).
  struct Table {
    Tensor tensor;
    const void* data;
    int64_t stride_batch, stride_token;

    explicit Table(const Tensor& x) : tensor(x.stride(-1) == 1 ? x : as_contiguous(x)), data(tensor.const_data_ptr()) {
      stride_token = tensor.stride(-2), stride_batch = tensor.dim() == 3 && tensor.size(0) > 1 ? tensor.stride(0) : 0;
    }
    template <typename T>
    const T* row(int64_t batch, int64_t token) const {
      return static_cast<const T*>(data) + batch * stride_batch + token * stride_token;
    }
  };
  const Table cos, sin;
  const int64_t pairs;
  const bool floats;

  Angles(const Tensor& cos, const Tensor& sin)
      : cos(cos), sin(sin), pairs(cos.size(-1)), floats(cos.scalar_type() == ScalarType::Float) {}

  template <typename T>
  void read(int64_t batch, int64_t token, bool interleaved, bool inverse, float* c, float* s) const {
    const T *cosines = cos.row<T>(batch, token), *sines = sin.row<T>(batch, token);
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
  // In memory (batch, tokens, heads, head_dim), as attention lays out its results.
  Tensor out = empty_strided(given.sizes(), {tokens * heads * head_dim, head_dim, heads * head_dim, 1}, given.scalar_type());
  if (given.numel() == 0) return out;
  const Tensor x = given.stride(3) == 1 ? given : as_contiguous(given);
  const Angles angles(cos, sin);
  const int64_t pairs = angles.pairs, rest = head_dim - 2 * pairs;
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const T* in = x.const_data_ptr<T>();
    const int64_t stride_batch = x.stride(0), stride_head = x.stride(1), stride_token = x.stride(2);
    T* results = out.mutable_data_ptr<T>();
    const bool past = goes_past_caches(out) && pairs * x.element_size() % 64 == 0;  // both halves begin at a cache line
    parallel_for(0, batches * tokens, std::max<int64_t>(1, 8192 / (heads * head_dim)), [&](int64_t begin, int64_t end) {
      Scratch<float> c(2 * pairs), s(2 * pairs);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / tokens, token = i % tokens;
        if (angles.floats) angles.read<float>(batch, token, interleaved, inverse, c, s);
        else angles.read<T>(batch, token, interleaved, inverse, c, s);
        for (int64_t head = 0; head < heads; ++head) {
          const T* row = in + batch * stride_batch + head * stride_head + token * stride_token;
          T* to = results + (i * heads + head) * head_dim;
          if (interleaved) turn_neighbours(row, to, c.get(), s.get(), pairs, past);
          else turn_halves(row, to, c.get(), s.get(), pairs, past);
          std::copy_n(row + 2 * pairs, rest, to + 2 * pairs);
        }
      }
      if (past) drain();
    });
  });
  return out;
}

Tensor rotary_forward(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate(x, cos, sin, interleaved, false);
}

Tensor rotary_backward(const Tensor& grad_out, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate(grad_out, cos, sin, interleaved, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("rotary_forward", TORCH_BOX(rotary_forward));
  m.impl("rotary_backward", TORCH_BOX(rotary_backward));
}

}  // namespace gptkernels
