"""RMS normalisation, alone or after a residual sum: the public functions, their checks and autograd.Functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _library
from gptkernels import backend as _backend
from gptkernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Divides `x` by its root mean square over the last dimension: ``x / sqrt(mean(x^2) + eps) * weight``.

    The mean and the gradient of `weight` are computed in float32 whatever the dtype. The gradient is summed in a fixed
    order: the same inputs give the same bits.

    Args:
        x: ``(..., N)``, floating point; any layout, a last dimension of stride 1 is read in place.
        weight: ``(N,)`` or None for 1. Its dtype may differ from x's.
        eps: added to the mean square.
        backend: overrides `use_backend` for this call.

    Returns:
        ``(..., N)`` in x's dtype, contiguous.

    Raises:
        ValueError: a shape that does not fit, or tensors on different devices.
        TypeError: a tensor that is not floating point.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467. The derivation is in
    ``MATH.md``.
    """
    _check.normalised(x, weight=weight)
    name = _backend.choose("rms_norm", x, backend)
    if name == "reference":
        return reference.rms_norm(x, weight, eps)
    return _library.apply(RMSNormFunction, x, weight, eps, name)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The next step of a pre-norm residual stream in one pass: ``summed = x + residual``, and `rms_norm` of `summed`.

    Args:
        x: ``(..., N)``, a branch's output.
        residual: the stream, of x's shape; x's dtype or float32. The sum is rounded to its dtype before it is normalised.
        weight, eps, backend: as `rms_norm`.

    Returns:
        ``(normed, summed)``: normed in x's dtype, summed in residual's; both contiguous.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as `rms_norm`.
    """
    _check.normalised(x, weight=weight)
    _check.stream(x, residual)
    name = _backend.choose("add_rms_norm", x, backend)
    if name == "reference":
        return reference.add_rms_norm(x, residual, weight, eps)
    return _library.apply(AddRMSNormFunction, x, residual, weight, eps, name)


class RMSNormFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves x, weight and each row's float32 reciprocal root mean square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, backend: str) -> Tensor:
        out, rstd = _library.ops(backend).rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.backend = eps, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if _library.graph_wanted():
            formula = partial(reference.rms_norm, eps=ctx.eps)
            return *_library.differentiable_gradients(formula, (x, weight), grad_out), None, None
        need_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = _library.ops(ctx.backend).rms_norm_backward(grad_out, x, weight, rstd, need_weight)
        return grad_x, grad_weight.to(weight.dtype) if need_weight else None, None, None


class AddRMSNormFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves the sum, weight and each row's float32 reciprocal root mean square."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        out, summed, rstd = _library.ops(backend).add_rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(summed, weight, rstd)
        ctx.dtype, ctx.eps, ctx.backend = x.dtype, eps, backend
        ctx.set_materialize_grads(False)
        return out, summed

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, weight, rstd = ctx.saved_tensors
        need_x, _, need_weight, *_ = ctx.needs_input_grad
        if grad_out is None:
            grad_out = torch.zeros_like(summed, dtype=ctx.dtype)
        if _library.graph_wanted():

            def formula(summed: Tensor, weight: Tensor | None) -> Tensor:
                return reference.rms_norm(summed, weight, ctx.eps).to(ctx.dtype)

            grad_residual, grad_weight = _library.differentiable_gradients(formula, (summed, weight), grad_out)
            if grad_summed is not None:
                grad_residual = grad_residual + grad_summed
            return grad_residual.to(ctx.dtype), grad_residual, grad_weight, None, None
        grad_residual, grad_x, grad_weight = _library.ops(ctx.backend).add_rms_norm_backward(
            grad_out, grad_summed, summed, weight, rstd, need_weight, need_x
        )
        # Inputs of one dtype share one gradient.
        grad_x = grad_residual if ctx.dtype == summed.dtype else grad_x
        return (
            grad_x if need_x else None,
            grad_residual,
            grad_weight.to(weight.dtype) if need_weight else None,
            None,
            None,
        )


def _fake_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_weight else 0, dtype=torch.float32)


def _fake_add_forward(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_add_backward(
    grad_out: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_weight: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    own = need_x and grad_out.dtype != summed.dtype
    return (
        summed.new_empty(summed.shape),
        grad_out.new_empty(summed.shape if own else (0,)),
        summed.new_empty(summed.shape[-1] if need_weight else 0, dtype=torch.float32),
    )


_library.register(
    "rms_norm_forward",
    "(Tensor x, Tensor? weight, float eps) -> (Tensor out, Tensor rstd)",
    fake=_fake_forward,
)
_library.register(
    "rms_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor rstd, bool need_weight) -> (Tensor grad_x, Tensor grad_weight)",
    fake=_fake_backward,
)
_library.register(
    "add_rms_norm_forward",
    "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor out, Tensor summed, Tensor rstd)",
    fake=_fake_add_forward,
)
# grad_x is empty where x has the sum's dtype: grad_residual is then the gradient of both.
_library.register(
    "add_rms_norm_backward",
    "(Tensor grad_out, Tensor? grad_summed, Tensor summed, Tensor? weight, Tensor rstd, bool need_weight, bool need_x)"
    " -> (Tensor grad_residual, Tensor grad_x, Tensor grad_weight)",
    fake=_fake_add_backward,
)
