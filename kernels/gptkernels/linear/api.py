"""A linear layer: the public function, its checks and its autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _flops, _library, _native
from gptkernels import backend as _backend
from gptkernels.linear import reference

FEW_ROWS = 8
"""For up to so many rows, reading the weight is most of the work. The native kernel reads it once."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``x @ weight^T + bias``, computed by PyTorch wherever its product is the fastest.

    On a CPU the native kernels compute it where PyTorch is slow: for the few rows of a decoding step, whose time is that of
    reading the weight, and for 16-bit dtypes that the CPU has no instructions to multiply (PyTorch is then ten to a
    hundred times slower than in float32). The native kernels sum in float32 whatever the dtype, and round the gradients
    of weight and bias once. Under autocast x, weight and bias are cast to autocast's dtype.

    Args:
        x: ``(..., K)``, floating point; any layout.
        weight: ``(N, K)``, of x's dtype except under autocast; any layout, read in place where one of its strides is 1.
        bias: ``(N,)`` or None for 0; of x's dtype except under autocast.
        backend: overrides `use_backend` for this call.

    Returns:
        ``(..., N)`` in x's dtype (autocast's, under autocast).

    Raises:
        ValueError: a shape that does not fit, or tensors on different devices.
        TypeError: tensors that are not floating point or, without autocast, of different dtypes.
        BackendUnavailableError: an explicit backend that cannot run here.

    The derivation is in ``MATH.md``.
    """
    _check.floating("x", x)
    _check.floating("weight", weight)
    if x.dim() == 0:
        raise ValueError("x: got a tensor without dimensions; accepted is (..., K)")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted is (N, {x.shape[-1]})")
    _check.same_device("weight", weight, "x", x)
    if bias is not None:
        _check.floating("bias", bias)
        _check.shape("bias", bias, (weight.shape[0],))
        _check.same_device("bias", bias, "x", x)
    dtype = _check.autocast_dtype(x)
    if dtype is None:
        dtype = x.dtype
        _check.same_dtype("weight", weight, "x", x)
        if bias is not None:
            _check.same_dtype("bias", bias, "x", x)
    name = _backend.choose("linear", x, backend)
    if name == "reference" or (x.numel() > FEW_ROWS * x.shape[-1] and _native.multiplies(dtype)):
        return reference.linear(x, weight, bias)
    return _library.apply(LinearFunction, x.to(dtype), weight, bias, name)


class LinearFunction(torch.autograd.Function):
    """Autograd around the native products: saves the inputs, and the weight in the dtype that was multiplied.

    Forward takes the model's own weight and casts it, so that the gradient is rounded once, from float32 to the weight's
    dtype, and not to autocast's first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, bias, cast)
        ctx.backend = backend
        return _library.ops(backend).linear_forward(x, cast, bias if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cast = ctx.saved_tensors
        if _library.graph_wanted():
            return *_library.differentiable_gradients(_formula, (x, weight, bias), grad_out), None
        needs = ctx.needs_input_grad[:3]
        grad_x, grad_weight, grad_bias = _library.ops(ctx.backend).linear_backward(grad_out, x, cast, *needs)
        return (
            grad_x if needs[0] else None,
            grad_weight.to(weight.dtype) if needs[1] else None,
            grad_bias.to(bias.dtype) if needs[2] else None,
            None,
        )


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32),
        x.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )


_library.register(
    "linear_forward",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fake_forward,
    triton=False,
    flops=lambda x, weight, bias: _flops.product(x, weight),
)
_library.register(
    "linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_backward,
    triton=False,
    flops=lambda grad_out, x, weight, need_x, need_weight, need_bias: (
        (need_x + need_weight) * _flops.product(x, weight)
    ),
)
