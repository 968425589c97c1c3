"""Layer normalisation: the public function, its checks and its autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptkernels import _check, _library
from gptkernels import backend as _backend
from gptkernels.layer_norm import reference


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalises `x` over its last dimension: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Mean and (population) variance are computed in float32 whatever the dtype, and so are the gradients of `weight` and
    `bias`, which are summed in a fixed order: the same inputs give the same bits.

    Args:
        x: ``(..., N)``, floating point; any layout, a last dimension of stride 1 is read in place.
        weight: ``(N,)`` or None for 1. Its dtype may differ from x's (float32 weights beside a bfloat16 x).
        bias: ``(N,)`` or None for 0; likewise.
        eps: added to the variance.
        backend: overrides `use_backend` for this call.

    Returns:
        ``(..., N)`` in x's dtype, contiguous.

    Raises:
        ValueError: a shape that does not fit, or tensors on different devices.
        TypeError: a tensor that is not floating point.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450. The derivation is in ``MATH.md``.
    """
    _check.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: got a tensor without dimensions; accepted is (..., N)")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check.floating(name, parameter)
            _check.shape(name, parameter, (x.shape[-1],))
            _check.same_device(name, parameter, "x", x)
    name = _backend.choose("layer_norm", x, backend)
    if name == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    return LayerNormFunction.apply(x, weight, bias, eps, name)


class LayerNormFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves x, weight and each row's float32 mean and reciprocal deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> Tensor:
        out, mean, rstd = _library.ops(backend).layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        need_weight = ctx.needs_input_grad[1]
        need_bias = ctx.needs_input_grad[2]
        grad_x, grad_weight, grad_bias = _library.ops(ctx.backend).layer_norm_backward(
            grad_out, x, weight, mean, rstd, need_weight, need_bias
        )
        return (
            grad_x,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_bias.to(ctx.bias_dtype) if need_bias else None,
            None,
            None,
        )


def _fake_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(columns if need_weight else 0, dtype=torch.float32),
        x.new_empty(columns if need_bias else 0, dtype=torch.float32),
    )


_library.register(
    "layer_norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)",
    fake=_fake_forward,
    module="gptkernels.layer_norm.triton",
)
_library.register(
    "layer_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_weight, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_backward,
    module="gptkernels.layer_norm.triton",
)
