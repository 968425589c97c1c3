"""Layer normalisation, alone or after a residual sum: the public functions, their checks and autograd.Functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

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

    Mean, (population) variance and the gradients of `weight` and `bias` are computed in float32 whatever the dtype. The
    gradients are summed in a fixed order: the same inputs give the same bits.

    Args:
        x: ``(..., N)``, floating point; any layout, a last dimension of stride 1 is read in place.
        weight: ``(N,)`` or None for 1. Its dtype may differ from x's (float32 weights beside a bfloat16 x).
        bias: ``(N,)`` or None for 0. Its dtype may differ from x's too.
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
    _check.normalised(x, weight=weight, bias=bias)
    name = _backend.choose("layer_norm", x, backend)
    if name == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    return _library.apply(LayerNormFunction, x, weight, bias, eps, name)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The next step of a pre-norm residual stream in one pass: ``summed = x + residual``, and `layer_norm` of `summed`.

    Args:
        x: ``(..., N)``, a branch's output.
        residual: the stream, of x's shape; x's dtype or float32. The sum is rounded to its dtype before it is normalised.
        weight, bias, eps, backend: as `layer_norm`.

    Returns:
        ``(normed, summed)``: normed in x's dtype, summed in residual's; both contiguous.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as `layer_norm`.
    """
    _check.normalised(x, weight=weight, bias=bias)
    _check.stream(x, residual)
    name = _backend.choose("add_layer_norm", x, backend)
    if name == "reference":  # layer_norm may still choose a kernel
        summed = (x + residual).to(residual.dtype)
        return layer_norm(summed, weight, bias, eps, backend=backend).to(x.dtype), summed
    return _library.apply(AddLayerNormFunction, x, residual, weight, bias, eps, name)


class LayerNormFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves the inputs and each row's float32 mean and reciprocal deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> Tensor:
        out, mean, rstd = _library.ops(backend).layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.backend = eps, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if _library.graph_wanted():
            formula = partial(reference.layer_norm, eps=ctx.eps)
            return *_library.differentiable_gradients(formula, (x, weight, bias), grad_out), None, None
        need_weight = ctx.needs_input_grad[1]
        need_bias = ctx.needs_input_grad[2]
        grad_x, grad_weight, grad_bias = _library.ops(ctx.backend).layer_norm_backward(
            grad_out, x, weight, mean, rstd, need_weight, need_bias
        )
        return (
            grad_x,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_bias.to(bias.dtype) if need_bias else None,
            None,
            None,
        )


class AddLayerNormFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves the sum, the parameters and each row's float32 statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        out, summed, mean, rstd = _library.ops(backend).add_layer_norm_forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(summed, weight, bias, mean, rstd)
        ctx.dtype, ctx.eps, ctx.backend = x.dtype, eps, backend
        ctx.set_materialize_grads(False)
        return out, summed

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, weight, bias, mean, rstd = ctx.saved_tensors
        need_x, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        if grad_out is None:
            grad_out = torch.zeros_like(summed, dtype=ctx.dtype)
        if _library.graph_wanted():

            def formula(summed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return reference.layer_norm(summed, weight, bias, ctx.eps).to(ctx.dtype)

            grad_residual, *grads = _library.differentiable_gradients(formula, (summed, weight, bias), grad_out)
            if grad_summed is not None:
                grad_residual = grad_residual + grad_summed
            return grad_residual.to(ctx.dtype), grad_residual, *grads, None, None
        grad_residual, grad_x, grad_weight, grad_bias = _library.ops(ctx.backend).add_layer_norm_backward(
            grad_out, grad_summed, summed, weight, mean, rstd, need_weight, need_bias, need_x
        )
        # Inputs of one dtype share one gradient.
        grad_x = grad_residual if ctx.dtype == summed.dtype else grad_x
        return (
            grad_x if need_x else None,
            grad_residual,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_bias.to(bias.dtype) if need_bias else None,
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


def _fake_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, mean, rstd = _fake_forward(x, weight, bias, eps)
    return out, residual.new_empty(x.shape), mean, rstd


def _fake_add_backward(
    grad_out: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual, grad_weight, grad_bias = _fake_backward(grad_out, summed, weight, mean, rstd, need_weight, need_bias)
    own = need_x and grad_out.dtype != summed.dtype
    return grad_residual, grad_out.new_empty(summed.shape if own else (0,)), grad_weight, grad_bias


_library.register(
    "layer_norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)",
    fake=_fake_forward,
)
_library.register(
    "layer_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_weight, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_backward,
)
_library.register(
    "add_layer_norm_forward",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor out, Tensor summed, Tensor mean, Tensor rstd)",
    fake=_fake_add_forward,
)
# grad_x is empty where x has the sum's dtype: grad_residual is then the gradient of both.
_library.register(
    "add_layer_norm_backward",
    "(Tensor grad_out, Tensor? grad_summed, Tensor summed, Tensor? weight, Tensor mean, Tensor rstd, bool need_weight,"
    " bool need_bias, bool need_x) -> (Tensor grad_residual, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_add_backward,
)
