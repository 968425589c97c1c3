// gelu (with bias) and swiglu on the CPU, one pass forward and one backward.
#include "csrc/common.h"

namespace gptkernels {
namespace {

// x limited to [-bound, bound]; NaN where x is NaN.
ALWAYS_INLINE Vec within(Vec x, float bound) {
  const Vec zero(0.f), most(bound);
  return zero - smaller(zero - smaller(x, most), most);
}

// GELU and its derivative at x. The tanh form is x times the logistic function of 2u, u = sqrt(2/pi) (x + 0.044715 x^3):
// with e = exp(-2u) it is 1 / (1 + e) and its complement is e / (1 + e), without a difference of nearly equal numbers.
template <bool tanh>
struct Gelu {
  static ALWAYS_INLINE Vec exponent(Vec x, Vec square) {  // -2u
    return x * fmadd(square, Vec(-0.0713548162726f), Vec(-1.59576912160573f));
  }
  // By formula 7.1.26 of Abramowitz and Stegun, whose error is below 1.5e-7: with t = 1 / (1 + p |x| / sqrt(2)) the normal
  // distribution's share beyond |x| is exp(-x^2 / 2) times a polynomial of t.
  static ALWAYS_INLINE Vec normal_cdf(Vec x) {
    const Vec t = Vec(1.f) / fmadd(x.abs(), Vec(0.23164188f), Vec(1.f));
    Vec y = fmadd(t, Vec(0.5307027145f), Vec(-0.7265760135f));
    y = fmadd(t, y, Vec(0.7107068705f)), y = fmadd(t, y, Vec(-0.142248368f)), y = fmadd(t, y, Vec(0.127414796f));
    const Vec beyond = t * y * exp(x * x * Vec(-0.5f));
    return Vec::blendv(Vec(1.f) - beyond, beyond, x < Vec(0.f));
  }

  static ALWAYS_INLINE Vec value(Vec x) {
    if constexpr (tanh) return x / (Vec(1.f) + exp(exponent(x, x * x)));
    else return x * normal_cdf(x);
  }
  static ALWAYS_INLINE Vec slope(Vec x) {
    if constexpr (tanh) x = within(x, 10.f);  // beyond 10 the slope is 0 or 1 to the last bit; up to 10 e is finite
    const Vec square = x * x;
    if constexpr (tanh) {
      const Vec e = exp(exponent(x, square));
      const Vec s = Vec(1.f) / (Vec(1.f) + e);
      const Vec inner = fmadd(square, Vec(0.2140644488178f), Vec(1.59576912160573f));  // d(2u)/dx
      return s * fmadd(x * inner, e * s, Vec(1.f));
    } else {
      return fmadd(x * Vec(0.39894228040143268f), exp(square * Vec(-0.5f)), normal_cdf(x));
    }
  }
};

template <typename F>
void with_form(bool tanh, F f) {
  if (tanh) f(Gelu<true>{});
  else f(Gelu<false>{});
}

// x as rows of the bias's length. Without a bias a contiguous x is cut into rows of a handy length.
Rows rows_for(const Tensor& x, bool whole_rows) {
  constexpr int64_t kHandy = 4096;
  if (!whole_rows && x.is_contiguous() && x.numel() % kHandy == 0) return Rows(x, kHandy);
  return Rows(x);
}

Tensor gelu_forward(const Tensor& x, const OptionalTensor& bias, bool tanh) {
  Tensor out = result_like(x);
  if (x.numel() == 0) return out;
  const Rows rows = rows_for(x, bias.has_value());
  const Parameter b(bias);
  const int64_t n = rows.columns;
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* to = out.mutable_data_ptr<T>();
    with_form(tanh, [&](auto gelu) {
      parallel_for(0, rows.rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T* in = rows.data<T>() + i * rows.stride;
          T* y = to + i * n;
          sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
            Vec v = load(in + j, lanes);
            if (b.data) v = v + load(b.data + j, lanes);
            store(y + j, gelu.value(v), lanes);
          });
        }
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& bias, bool tanh, bool need_bias) {
  const int64_t width = need_bias ? x.size(-1) : 0;
  Tensor grad_x = result_like(x), grad_bias = empty_floats({width});
  if (x.numel() == 0) return {grad_x, zeroed(grad_bias)};
  const bool together = grad_out.is_contiguous() && x.is_contiguous() && !bias;
  const Rows rows = rows_for(x, !together), outs = rows_for(grad_out, !together);
  const Parameter b(bias);
  const int64_t n = rows.columns;
  const int64_t blocks = need_bias ? sum_blocks(rows.rows) : rows.rows, per_block = ceil_div(rows.rows, blocks);
  Tensor partial = zeroed(empty_floats({need_bias ? blocks : 0, n}));
  float* all_sums = partial.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* gradient = grad_x.mutable_data_ptr<T>();
    with_form(tanh, [&](auto gelu) {
      parallel_for(0, blocks, std::max<int64_t>(1, 4096 / (n * per_block)), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          float* sums = need_bias ? all_sums + block * n : nullptr;
          for (int64_t i = block * per_block; i < std::min((block + 1) * per_block, rows.rows); ++i) {
            const T* in = rows.data<T>() + i * rows.stride;
            const T* dy = outs.data<T>() + i * outs.stride;
            T* dx = gradient + i * n;
            sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
              Vec v = load(in + j, lanes);
              if (b.data) v = v + load(b.data + j, lanes);
              const Vec g = load(dy + j, lanes) * gelu.slope(v);
              store(dx + j, g, lanes);
              if (sums) store(sums + j, load(sums + j, lanes) + g, lanes);
            });
          }
        }
      });
    });
  });
  if (need_bias) add_blocks(all_sums, blocks, n, n, grad_bias.mutable_data_ptr<float>());
  return {grad_x, grad_bias};
}

Tensor swiglu_forward(const Tensor& gate, const Tensor& up) {
  Tensor out = result_like(gate);
  if (gate.numel() == 0) return out;
  const Rows gates(gate), ups(up);
  const int64_t n = gates.columns;
  dispatch(gate.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, gates.rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T *g = gates.data<T>() + i * gates.stride, *u = ups.data<T>() + i * ups.stride;
        T* y = to + i * n;
        sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
          const Vec v = load(g + j, lanes);
          store(y + j, v / (Vec(1.f) + exp(Vec(0.f) - v)) * load(u + j, lanes), lanes);
        });
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_out, const Tensor& gate, const Tensor& up) {
  Tensor grad_gate = result_like(gate), grad_up = result_like(up);
  if (gate.numel() == 0) return {grad_gate, grad_up};
  const Rows gates(gate), ups(up), outs(grad_out);
  const int64_t n = gates.columns;
  dispatch(gate.scalar_type(), [&](auto t) {
    using T = decltype(t);
    T *to_gate = grad_gate.mutable_data_ptr<T>(), *to_up = grad_up.mutable_data_ptr<T>();
    parallel_for(0, gates.rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T *g = gates.data<T>() + i * gates.stride, *u = ups.data<T>() + i * ups.stride;
        const T* dy = outs.data<T>() + i * outs.stride;
        T *dg = to_gate + i * n, *du = to_up + i * n;
        sweep(n, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
          const Vec v = load(g + j, lanes), d = load(dy + j, lanes);
          // With e = exp(-v), 1 / (1 + e) is the logistic function and e / (1 + e) its complement. Beyond 87 either way one
          // of them is 0 to the last bit, and up to there both are finite.
          const Vec bounded = within(v, 87.f), e = exp(Vec(0.f) - bounded), s = Vec(1.f) / (Vec(1.f) + e);
          store(dg + j, d * load(u + j, lanes) * s * fmadd(bounded, e * s, Vec(1.f)), lanes);
          const Vec factor = Vec(0.f) - smaller(Vec(0.f) - v, Vec(87.f));  // v, but where s stands for 0
          store(du + j, d * s * factor, lanes);
        });
      }
    });
  });
  return {grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(gelu_backward));
  m.impl("swiglu_forward", TORCH_BOX(swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(swiglu_backward));
}

}  // namespace gptkernels
