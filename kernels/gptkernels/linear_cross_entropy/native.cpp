// linear_cross_entropy on the CPU: a chunk of tokens at a time, so that only a chunk's logits exist. PyTorch's own products
// make the logits and grad_x; grad_weight is summed over the chunks in float, whatever the dtype.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/autocast_mode.h>

#include "cross_entropy.h"
#include "gemm.h"

namespace gptkernels {
namespace {

constexpr int64_t kChunkBytes = 64 << 20;  // what a chunk's logits may take

int64_t chunk_rows(int64_t tokens, int64_t classes, int64_t itemsize) {
  const int64_t most = std::max<int64_t>(32, kChunkBytes / (classes * itemsize));
  return std::max<int64_t>(1, std::min(tokens, round_up(ceil_div(tokens, ceil_div(tokens, most)), 32)));
}

// grad_weight (classes, width) += gradient^T (classes, rows) x (rows, width), in float. A block of classes is a unit.
template <typename T>
void add_grad_weight(const T* gradient, const T* x, int64_t stride_x, int64_t rows, int64_t classes, int64_t width, bool first,
                     float* grad_weight) {
  using C = Compute<T>;
  constexpr int64_t kClasses = 64;
  static_assert(kClasses % kPanel == 0 && kClasses % kRowStep == 0);
  const int64_t depth = round_up(rows, std::max<int64_t>(Element<C>::depth, Element<C>::step * kLanes));
  const int64_t padded = round_up(width, kPanel), units = depth / Element<C>::step;
  Scratch<C> right(depth * padded), right_buffer(2 * padded);
  pack_rows(x, stride_x, rows, width, right.get(), depth, depth, padded, right_buffer.get());
  struct State {
    Scratch<C> panels, left, buffer;
    Scratch<float> sums;
    GemmScope scope;
  };
  parallel_units(
      ceil_div(classes, kClasses),
      [&] { return State{Scratch<C>(depth * kClasses), Scratch<C>(depth * kClasses), Scratch<C>(2 * kClasses),
                         Scratch<float>(kClasses * padded), {}}; },
      [&](int64_t unit, State& s) {
        const int64_t start = unit * kClasses, count = std::min(kClasses, classes - start);
        // Pairs of tokens as units of 32 bits, then those units transposed: the block's gradient, classes by tokens.
        pack_rows(gradient + start, classes, rows, count, s.panels.get(), depth, depth, kClasses, s.buffer.get());
        const float* from = reinterpret_cast<const float*>(s.panels.get());
        float* to = reinterpret_cast<float*>(s.left.get());
        for (int64_t j = 0; j < kClasses; j += kLanes)
          for (int64_t u = 0; u < units; u += kLanes)
            transpose_square(from + j / kPanel * kPanel * units + u * kPanel + j % kPanel, kPanel, to + j * units + u, units);
        const auto columns = Panels<C>::packed(right.get(), depth);
        float* out = grad_weight + start * width;
        if (count == kClasses && padded == width) {
          if (first) gemm<false>(kClasses, width, depth, s.left.get(), depth, columns, out, width);
          else gemm<true>(kClasses, width, depth, s.left.get(), depth, columns, out, width);
          return;
        }
        gemm<false>(kClasses, padded, depth, s.left.get(), depth, columns, s.sums.get(), padded);
        for (int64_t i = 0; i < count; ++i)
          sweep(width, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
            const Vec more = load(s.sums + i * padded + j, lanes);
            store(out + i * width + j, first ? more : load(out + i * width + j, lanes) + more, lanes);
          });
      });
}

// grad_bias (classes) += the column sums of gradient (rows, classes), columns shared among the threads.
template <typename T>
void add_grad_bias(const T* gradient, int64_t rows, int64_t classes, float* grad_bias) {
  constexpr int64_t kColumns = 256, kRows = 16;  // partial sums of a few rows: their rounding does not grow with the rows
  at::parallel_for(0, ceil_div(classes, kColumns), 1, [&](int64_t begin, int64_t end) {
    alignas(64) float part[kColumns];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t start = c * kColumns, count = std::min(kColumns, classes - start);
      for (int64_t first = 0; first < rows; first += kRows) {
        std::fill_n(part, kColumns, 0.f);
        for (int64_t i = first; i < std::min(first + kRows, rows); ++i)
          sweep(count, [&](int64_t j, auto lanes, auto) ALWAYS_INLINE_LAMBDA {
            store(part + j, load(part + j, lanes) + load(gradient + i * classes + start + j, lanes), lanes);
          });
        for (int64_t j = 0; j < count; ++j) grad_bias[start + j] += part[j];
      }
    }
  });
}

struct Results {
  Tensor losses, grad_x, grad_weight, grad_bias;
};

Results run(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
            const OptionalTensor& row_weight, int64_t ignore_index, bool need_x, bool need_weight, bool need_bias) {
  // The products below are this operator's own: neither recorded nor cast.
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t classes = weight.size(0), width = weight.size(1), tokens = target.numel();
  const bool gradients = row_weight.has_value();
  Results r{empty_floats(target.sizes()), need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options()),
            need_weight ? empty_floats({classes, width}) : empty_floats({0}),
            need_bias ? at::zeros({classes}, at::kFloat) : empty_floats({0})};
  const Tensor targets = checked_targets(target, classes, ignore_index);
  if (tokens == 0 || width == 0) {
    r.grad_x.zero_(), r.grad_weight.zero_();
    TORCH_CHECK_VALUE(tokens == 0, "x: got width 0; accepted is 1 or more");
    return r;
  }
  const Tensor rows = x.reshape({tokens, width}), grad_rows = need_x ? r.grad_x.view({tokens, width}) : Tensor();
  const Tensor weights = gradients ? row_weight->to(at::kFloat).contiguous() : Tensor();
  const Parameter b(bias);
  const int64_t most = chunk_rows(tokens, classes, x.element_size());
  const Tensor buffer = at::empty({most, classes}, x.options());
  for (int64_t start = 0; start < tokens; start += most) {
    const int64_t count = std::min(most, tokens - start);
    Tensor logits = buffer.narrow(0, 0, count);
    const Tensor part = rows.narrow(0, start, count);
    at::mm_out(logits, part, weight.t());
    dispatch(x.scalar_type(), [&](auto t) {
      using T = decltype(t);
      T* data = logits.data_ptr<T>();
      cross_entropy_rows<T>(data, classes, b.data, count, classes, targets.const_data_ptr<int64_t>() + start, ignore_index,
                            gradients ? weights.const_data_ptr<float>() + start : nullptr, r.losses.data_ptr<float>() + start,
                            gradients ? data : nullptr);
      if (need_bias) add_grad_bias(data, count, classes, r.grad_bias.data_ptr<float>());
      if constexpr (!std::is_same_v<T, float>) {
        if (!need_weight) return;
        const Tensor adjacent = part.stride(1) == 1 ? part : part.contiguous();
        add_grad_weight(data, adjacent.const_data_ptr<T>(), adjacent.stride(0), count, classes, width, start == 0,
                        r.grad_weight.data_ptr<float>());
      }
    });
    if (need_weight && x.scalar_type() == at::kFloat) {
      if (start == 0) at::mm_out(r.grad_weight, logits.t(), part);
      else at::addmm_out(r.grad_weight, r.grad_weight, logits.t(), part);
    }
    if (need_x) {
      Tensor to = grad_rows.narrow(0, start, count);
      at::mm_out(to, logits, weight);
    }
  }
  return r;
}

Tensor linear_cross_entropy_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target, int64_t ignore_index) {
  return run(x, weight, bias, target, std::nullopt, ignore_index, false, false, false).losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target, const Tensor& row_weight,
    int64_t ignore_index, bool need_x, bool need_weight, bool need_bias) {
  Results r = run(x, weight, bias, target, row_weight, ignore_index, need_x, need_weight, need_bias);
  return {r.losses, r.grad_x, r.grad_weight, r.grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("linear_cross_entropy_forward", linear_cross_entropy_forward);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward);
}

}  // namespace gptkernels
