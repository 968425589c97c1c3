// gelu (with bias) and swiglu on the CPU, one pass each way.
#include "common.h"

namespace gptkernels {
namespace {

// x, or the nearer of -bound and bound; NaN where x is.
ALWAYS_INLINE Vec within(Vec x, float bound) {
  const Vec zero(0.f), most(bound);
  return zero - smaller(zero - smaller(x, most), most);
}

// GELU and its derivative at x. The tanh form is x times the logistic function of 2u, u = sqrt(2/pi) (x + 0.044715 x^3):
// with e = exp(-2u) that is 1 / (1 + e), and its complement e / (1 + e), so that neither is a difference of near equals.
template <bool tanh>
struct Gelu {
  static ALWAYS_INLINE Vec exponent(Vec x, Vec square) {  // -2u
    return x * fmadd(square, Vec(-0.0713548162726f), Vec(-1.59576912160573f));
  }
  static ALWAYS_INLINE Vec normal_cdf(Vec x) { return fmadd((x * Vec(0.70710678118654752f)).erf(), Vec(0.5f), Vec(0.5f)); }

  static ALWAYS_INLINE Vec value(Vec x) {
    if constexpr (tanh) return x / (Vec(1.f) + exp(exponent(x, x * x)));
    else return x * normal_cdf(x);
  }
  static ALWAYS_INLINE Vec slope(Vec x) {
    if constexpr (tanh) x = within(x, 10.f);  // beyond, it is 0 or 1 to the last bit, and e is finite up to there
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

// x as rows of the bias's length; without a bias a contiguous x is cut into rows of any handy length.
Rows rows_for(const Tensor& x, bool whole_rows) {
  constexpr int64_t kHandy = 4096;
  if (!whole_rows && x.is_contiguous() && x.numel() % kHandy == 0) return Rows(x.view({-1, kHandy}));
  return Rows(x);
}

Tensor gelu_forward(const Tensor& x, const OptionalTensor& bias, bool tanh) {
  Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  const Rows rows = rows_for(x, bias.has_value());
  const Parameter b(bias);
  const int64_t n = rows.columns;
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    with_form(tanh, [&](auto gelu) {
      at::parallel_for(0, rows.rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const T* in = rows.data<T>() + i * rows.stride;
          T* y = out.data_ptr<T>() + i * n;
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
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_bias = empty_floats({width});
  if (x.numel() == 0) return {grad_x, grad_bias.zero_()};
  const bool together = grad_out.is_contiguous() && x.is_contiguous() && !bias;
  const Rows rows = rows_for(x, !together), outs = rows_for(grad_out, !together);
  const Parameter b(bias);
  const int64_t n = rows.columns;
  const int64_t blocks = need_bias ? sum_blocks(rows.rows) : rows.rows, per_block = ceil_div(rows.rows, blocks);
  Tensor partial = at::zeros({need_bias ? blocks : 0, n}, at::kFloat);
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    with_form(tanh, [&](auto gelu) {
      at::parallel_for(0, blocks, std::max<int64_t>(1, 4096 / (n * per_block)), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          float* sums = need_bias ? partial.data_ptr<float>() + block * n : nullptr;
          for (int64_t i = block * per_block; i < std::min((block + 1) * per_block, rows.rows); ++i) {
            const T* in = rows.data<T>() + i * rows.stride;
            const T* dy = outs.data<T>() + i * outs.stride;
            T* dx = grad_x.data_ptr<T>() + i * n;
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
  if (need_bias) add_blocks(partial.data_ptr<float>(), blocks, n, n, grad_bias.data_ptr<float>());
  return {grad_x, grad_bias};
}

Tensor swiglu_forward(const Tensor& gate, const Tensor& up) {
  Tensor out = at::empty(gate.sizes(), gate.options());
  if (gate.numel() == 0) return out;
  const Rows gates(gate), ups(up);
  const int64_t n = gates.columns;
  dispatch(gate.scalar_type(), [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, gates.rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T *g = gates.data<T>() + i * gates.stride, *u = ups.data<T>() + i * ups.stride;
        T* y = out.data_ptr<T>() + i * n;
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
  Tensor grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty(up.sizes(), up.options());
  if (gate.numel() == 0) return {grad_gate, grad_up};
  const Rows gates(gate), ups(up), outs(grad_out);
  const int64_t n = gates.columns;
  dispatch(gate.scalar_type(), [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, gates.rows, std::max<int64_t>(1, 4096 / n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T *g = gates.data<T>() + i * gates.stride, *u = ups.data<T>() + i * ups.stride;
        const T* dy = outs.data<T>() + i * outs.stride;
        T *dg = grad_gate.data_ptr<T>() + i * n, *du = grad_up.data_ptr<T>() + i * n;
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

TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("gelu_forward", gelu_forward);
  m.impl("gelu_backward", gelu_backward);
  m.impl("swiglu_forward", swiglu_forward);
  m.impl("swiglu_backward", swiglu_backward);
}

}  // namespace gptkernels
