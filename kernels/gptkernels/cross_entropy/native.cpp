// cross_entropy on the CPU: the loss, and with it the gradient, from one read of the logits.
#include "csrc/cross_entropy.h"

namespace gptkernels {
namespace {

Tensor cross_entropy_forward(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  Tensor losses = empty_floats(target.sizes());
  const Tensor targets = checked_targets(target, logits.size(-1), ignore_index);
  if (target.numel() == 0) return losses;
  const Rows rows(logits);
  dispatch(logits.scalar_type(), [&](auto t) {
    using T = decltype(t);
    cross_entropy_rows<T>(rows.data<T>(), rows.stride, nullptr, rows.rows, rows.columns, targets.const_data_ptr<int64_t>(),
                          ignore_index, nullptr, losses.mutable_data_ptr<float>(), nullptr);
  });
  return losses;
}

std::tuple<Tensor, Tensor> cross_entropy_backward(
    const Tensor& logits, const Tensor& target, const Tensor& row_weight, int64_t ignore_index) {
  Tensor losses = empty_floats(target.sizes()), gradient = result_like(logits);
  const Tensor targets = checked_targets(target, logits.size(-1), ignore_index);
  if (logits.numel() == 0) return {losses, gradient};
  const Rows rows(logits);
  const Tensor weights = converted(row_weight, ScalarType::Float);
  dispatch(logits.scalar_type(), [&](auto t) {
    using T = decltype(t);
    cross_entropy_rows<T>(rows.data<T>(), rows.stride, nullptr, rows.rows, rows.columns, targets.const_data_ptr<int64_t>(),
                          ignore_index, weights.const_data_ptr<float>(), losses.mutable_data_ptr<float>(), gradient.mutable_data_ptr<T>());
  });
  return {losses, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(cross_entropy_backward));
}

}  // namespace gptkernels
