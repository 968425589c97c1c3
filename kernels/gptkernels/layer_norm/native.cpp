// layer_norm and add_layer_norm on the CPU: bindings of csrc/norm.h.
#include "csrc/norm.h"

namespace gptkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  auto [out, summed, mean, rstd] = norm_forward<true>(x, std::nullopt, weight, bias, eps);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
    bool need_weight, bool need_bias) {
  auto [grad_x, branch, grad_weight, grad_bias] =
      norm_backward<true>(grad_out, std::nullopt, x, weight, mean, rstd, need_weight, need_bias, false);
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  return norm_forward<true>(x, residual, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_out, const OptionalTensor& grad_summed, const Tensor& summed, const OptionalTensor& weight,
    const Tensor& mean, const Tensor& rstd, bool need_weight, bool need_bias, bool need_x) {
  return norm_backward<true>(grad_out, grad_summed, summed, weight, mean, rstd, need_weight, need_bias, need_x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptkernels_native, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(layer_norm_backward));
  m.impl("add_layer_norm_forward", TORCH_BOX(add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(add_layer_norm_backward));
}

}  // namespace gptkernels
