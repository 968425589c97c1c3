// linear_cross_entropy on the CPU, a chunk of tokens at a time, so that only the logits of one chunk exist. Products are
// PyTorch's where those are faster (csrc/product.h). grad_weight is summed over the chunks in float, whatever the dtype.
#include "csrc/cross_entropy.h"
#include "csrc/product.h"

namespace gptkernels {
namespace {

constexpr int64_t kChunkBytes = 64 << 20;  // the most that the logits of a chunk take

int64_t chunk_rows(int64_t tokens, int64_t classes, int64_t itemsize) {
  const int64_t most = std::max<int64_t>(32, kChunkBytes / (classes * itemsize));
  return std::max<int64_t>(1, std::min(tokens, round_up(ceil_div(tokens, ceil_div(tokens, most)), 32)));
}

struct Results {
  Tensor losses, grad_x, grad_weight, grad_bias;
};

Results run(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
            const OptionalTensor& row_weight, int64_t ignore_index, bool need_x, bool need_weight, bool need_bias) {
  const int64_t classes = weight.size(0), width = weight.size(1), tokens = target.numel();
  const bool gradients = row_weight.has_value();
  Results r{empty_floats(target.sizes()), need_x ? result_like(x) : none_like(x),
            need_weight ? empty_floats({classes, width}) : empty_floats({0}),
            need_bias ? zeroed(empty_floats({classes})) : empty_floats({0})};
  const Tensor targets = checked_targets(target, classes, ignore_index);
  if (tokens == 0 || width == 0) {
    check<std::invalid_argument>(tokens == 0, "x: got width 0; accepted is 1 or more");
    r.grad_x = zeroed(r.grad_x), r.grad_weight = zeroed(r.grad_weight);
    return r;
  }
  const Tensor rows = as_matrix(x, width), classes_rows = as_matrix(weight, width);
  const Parameter b(bias), weights(row_weight);
  const int64_t most = chunk_rows(tokens, classes, static_cast<int64_t>(x.element_size()));
  const Tensor buffer = empty({most, classes}, x.scalar_type());
  const int64_t* target_of = targets.const_data_ptr<int64_t>();
  float *losses = r.losses.mutable_data_ptr<float>(), *grad_weight = r.grad_weight.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const Matrix<T> w(classes_rows), tokens_rows(rows);
    T *logits = buffer.mutable_data_ptr<T>(), *grad_x = r.grad_x.mutable_data_ptr<T>();
    const Matrix<T> gradient(logits, classes);
    for (int64_t start = 0; start < tokens; start += most) {
      const int64_t count = std::min(most, tokens - start);
      const Matrix<T> part = tokens_rows.from_row(start);
      if (torch_multiplies_logits<T>()) torch_product(count, classes, width, part, w.t(), false, logits);
      else product_to(count, classes, width, part, w.t(), nullptr, logits);
      cross_entropy_rows<T>(logits, classes, b.data, count, classes, target_of + start, ignore_index,
                            gradients ? weights.data + start : nullptr, losses + start, gradients ? logits : nullptr);
      if (need_bias) add_column_sums(logits, classes, count, classes, r.grad_bias.mutable_data_ptr<float>());
      if (need_weight) {
        if constexpr (std::is_same_v<T, float>)
          torch_product(classes, width, count, gradient.t(), part, start > 0, grad_weight);
        else product_to_floats(classes, width, count, gradient.t(), part, start > 0, grad_weight);
      }
      if (need_x) {
        if (torch_multiplies<T>()) torch_product(count, width, classes, gradient, w, false, grad_x + start * width);
        else product_to(count, width, classes, gradient, w, nullptr, grad_x + start * width);
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

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(linear_cross_entropy_backward));
}

}  // namespace gptkernels
