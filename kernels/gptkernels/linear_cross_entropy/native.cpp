// linear_cross_entropy on the CPU: a chunk of tokens at a time, so that only a chunk's logits exist. Products are PyTorch's
// where those are the faster ones (csrc/product.h); grad_weight is summed over the chunks in float, whatever the dtype.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/autocast_mode.h>

#include "cross_entropy.h"
#include "product.h"

namespace gptkernels {
namespace {

constexpr int64_t kChunkBytes = 64 << 20;  // what a chunk's logits may take

int64_t chunk_rows(int64_t tokens, int64_t classes, int64_t itemsize) {
  const int64_t most = std::max<int64_t>(32, kChunkBytes / (classes * itemsize));
  return std::max<int64_t>(1, std::min(tokens, round_up(ceil_div(tokens, ceil_div(tokens, most)), 32)));
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
  const Tensor rows = as_matrix(x.reshape({tokens, width})), classes_rows = as_matrix(weight);
  const Tensor grad_rows = need_x ? r.grad_x.view({tokens, width}) : Tensor();
  const Tensor weights = gradients ? row_weight->to(at::kFloat).contiguous() : Tensor();
  const Parameter b(bias);
  const int64_t most = chunk_rows(tokens, classes, x.element_size());
  const Tensor buffer = at::empty({most, classes}, x.options());
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Matrix<T> w(classes_rows);
    for (int64_t start = 0; start < tokens; start += most) {
      const int64_t count = std::min(most, tokens - start);
      Tensor logits = buffer.narrow(0, 0, count);
      const Tensor part = rows.narrow(0, start, count);
      const Matrix<T> tokens_rows(part);
      T* data = logits.data_ptr<T>();
      const Matrix<T> gradient(data, classes);
      if (torch_multiplies_logits<T>()) at::mm_out(logits, part, weight.t());
      else product_to(count, classes, width, tokens_rows, w.t(), nullptr, data);
      cross_entropy_rows<T>(data, classes, b.data, count, classes, targets.const_data_ptr<int64_t>() + start, ignore_index,
                            gradients ? weights.const_data_ptr<float>() + start : nullptr, r.losses.data_ptr<float>() + start,
                            gradients ? data : nullptr);
      if (need_bias) add_column_sums(data, classes, count, classes, r.grad_bias.data_ptr<float>());
      if (need_weight) {
        if constexpr (!std::is_same_v<T, float>)
          product_to_floats(classes, width, count, gradient.t(), tokens_rows, start > 0, r.grad_weight.data_ptr<float>());
        else if (start == 0) at::mm_out(r.grad_weight, logits.t(), part);
        else at::addmm_out(r.grad_weight, r.grad_weight, logits.t(), part);
      }
      if (need_x) {
        Tensor to = grad_rows.narrow(0, start, count);
        if (torch_multiplies<T>()) at::mm_out(to, logits, weight);
        else product_to(count, width, classes, gradient, w, nullptr, to.data_ptr<T>());
      }
    }
  });
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
