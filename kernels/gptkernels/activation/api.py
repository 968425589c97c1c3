"""GELU (with bias) and SwiGLU: the public functions, their checks and their autograd.Functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _library
from gptkernels import backend as _backend
from gptkernels.activation import reference


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh", *, backend: str | None = None) -> Tensor:
    """``z * Phi(z)`` with ``z = x + bias`` and Phi the normal distribution function: a layer's bias and its activation.

    Sum and activation are computed in one pass, in float32 whatever the dtype. The gradient of `bias` is summed in float32,
    in a fixed order.

    Args:
        x: ``(..., N)``, or ``()`` without `bias`; floating point; any layout, a last dimension of stride 1 is read in place.
        bias: ``(N,)`` or None for 0. Its dtype may differ from x's.
        approximate: "tanh": ``0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))``, GPT-2's; "none": the exact form.
        backend: overrides `use_backend` for this call.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        ValueError: a shape or form that is not accepted, or tensors on different devices.
        TypeError: a tensor that is not floating point.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415. The derivation is in ``MATH.md``.
    """
    _check.floating("x", x)
    if x.dim() == 0 and bias is None:
        return gelu(x[None], None, approximate, backend=backend)[0]
    _check.normalised(x, bias=bias)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate: got {approximate!r}; accepted are 'tanh' and 'none'")
    name = _backend.choose("gelu", x, backend)
    if name == "reference":
        return reference.gelu(x, bias, approximate)
    return _library.apply(GELUFunction, x, bias, approximate == "tanh", name)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``gate * sigmoid(gate) * up``, computed in float32 whatever the dtype, in one pass.

    Args:
        gate, up: ``(..., N)`` or ``()``, floating point, of one shape and dtype; halves of one projection are read in place.
        backend: overrides `use_backend` for this call.

    Returns:
        The shape and dtype of `gate`, contiguous.

    Raises:
        ValueError: shapes that differ, or tensors on different devices.
        TypeError: tensors that are not floating point or of different dtypes.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202. The derivation is in ``MATH.md``.
    """
    _check.floating("gate", gate)
    _check.floating("up", up)
    _check.shape("up", up, tuple(gate.shape))
    _check.same_device("up", up, "gate", gate)
    _check.same_dtype("up", up, "gate", gate)
    if gate.dim() == 0:
        return swiglu(gate[None], up[None], backend=backend)[0]
    name = _backend.choose("swiglu", gate, backend)
    if name == "reference":
        return reference.swiglu(gate, up)
    return _library.apply(SwiGLUFunction, gate, up, name)


class GELUFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves only the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, tanh: bool, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh, ctx.backend = tanh, backend
        return _library.ops(backend).gelu_forward(x, bias, tanh)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        if _library.graph_wanted():
            approximate = "tanh" if ctx.tanh else "none"
            formula = partial(reference.gelu, approximate=approximate)
            return *_library.differentiable_gradients(formula, (x, bias), grad_out), None, None
        need_bias = ctx.needs_input_grad[1]
        grad_x, grad_bias = _library.ops(ctx.backend).gelu_backward(grad_out, x, bias, ctx.tanh, need_bias)
        return grad_x, grad_bias.to(bias.dtype) if need_bias else None, None, None


class SwiGLUFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves only the inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return _library.ops(backend).swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if _library.graph_wanted():
            return *_library.differentiable_gradients(reference.swiglu, (gate, up), grad_out), None
        return *_library.ops(ctx.backend).swiglu_backward(grad_out, gate, up), None


def _fake_gelu_forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_gelu_backward(
    grad_out: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_bias else 0, dtype=torch.float32)


def _fake_swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_swiglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_library.register(
    "gelu_forward",
    "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    fake=_fake_gelu_forward,
)
_library.register(
    "gelu_backward",
    "(Tensor grad_out, Tensor x, Tensor? bias, bool tanh, bool need_bias) -> (Tensor grad_x, Tensor grad_bias)",
    fake=_fake_gelu_backward,
)
_library.register(
    "swiglu_forward",
    "(Tensor gate, Tensor up) -> Tensor",
    fake=_fake_swiglu_forward,
)
_library.register(
    "swiglu_backward",
    "(Tensor grad_out, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)",
    fake=_fake_swiglu_backward,
)
