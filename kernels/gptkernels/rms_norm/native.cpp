// rms_norm and add_rms_norm on the CPU: bindings of csrc/norm.h.
#include "csrc/norm.h"

namespace gptkernels {
namespace {

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, const OptionalTensor& weight, double eps) {
  auto [out, summed, mean, rstd] = norm_forward<false>(x, std::nullopt, weight, std::nullopt, eps);
  return {out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& weight, const Tensor& rstd, bool need_weight) {
  auto [grad_x, branch, grad_weight, grad_bias] =
      norm_backward<false>(grad_out, std::nullopt, x, weight, none_like(rstd), rstd, need_weight, false, false);
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_forward(
    const Tensor& x, const Tensor& residual, const OptionalTensor& weight, double eps) {
  auto [out, summed, mean, rstd] = norm_forward<false>(x, residual, weight, std::nullopt, eps);
  return {out, summed, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward(
    const Tensor& grad_out, const OptionalTensor& grad_summed, const Tensor& summed, const OptionalTensor& weight,
    const Tensor& rstd, bool need_weight, bool need_x) {
  auto [grad_residual, grad_x, grad_weight, grad_bias] =
      norm_backward<false>(grad_out, grad_summed, summed, weight, none_like(rstd), rstd, need_weight, false, need_x);
  return {grad_residual, grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(rms_norm_backward));
  m.impl("add_rms_norm_forward", TORCH_BOX(add_rms_norm_forward));
  m.impl("add_rms_norm_backward", TORCH_BOX(add_rms_norm_backward));
}

}  // namespace gptkernels
