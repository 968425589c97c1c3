"""Rotary position embedding: the public function, its checks and its autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _library
from gptkernels import backend as _backend
from gptkernels._layout import empty_like_heads
from gptkernels.rotary import reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, backend: str | None = None) -> Tensor:
    """Rotates pairs of each head's dimensions by angles that grow with the token's position.

    With R = ``2 * cos.shape[-1]`` rotated dimensions, pair i is ``(a, b) = (x[i], x[i + R/2])`` (Llama, GPT-NeoX), or
    ``(x[2i], x[2i + 1])`` when interleaved (GPT-J, GGUF files). It becomes ``(a cos - b sin, b cos + a sin)``. Dimensions
    from R on are copied. The arithmetic is float32 whatever the dtype, rounded once. The backward rotates back and saves
    only the tables.

    Slices of a packed projection are read in place. One call can rotate query and key heads that are adjacent in one
    projection.

    Args:
        x: ``(B, H, T, D)``, floating point; any layout, a last dimension of stride 1 is read in place.
        cos, sin: ``(T, R/2)`` for all sequences, or ``(B, T, R/2)`` with positions for each (left padding);
            ``2 <= R <= D``; float32 or x's dtype. Not differentiated. Hugging Face's tables hold every angle twice:
            pass ``cos[..., : R // 2]``, which is read in place.
        interleaved: whether a pair is two adjacent dimensions.
        backend: overrides `use_backend` for this call.

    Returns:
        ``(B, H, T, D)`` in x's dtype. The fused backends lay it out ``(B, T, H, D)`` in memory, as `attention` does.

    Raises:
        ValueError: a shape that does not fit, tables that require a gradient, or tensors on different devices.
        TypeError: a dtype that is not accepted.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864. The derivation
    is in ``MATH.md``.
    """
    _validate(x, cos, sin)
    name = _backend.choose("rotary", x, backend)
    if name == "reference":
        return reference.rotary(x, cos, sin, interleaved)
    return _library.apply(RotaryFunction, x, cos, sin, interleaved, name)


def _validate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _check.floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}; accepted is (batch, heads, tokens, head_dim)")
    batch, _, tokens, head_dim = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        _check.floating(name, table)
        _check.same_device(name, table, "x", x)
        if table.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}: got dtype {table.dtype}; accepted are x's dtype, {x.dtype}, and torch.float32")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, which rotary does not compute; accepted is {name}.detach()")
    shape = tuple(cos.shape)
    if len(shape) not in (2, 3) or shape[-2] != tokens or (len(shape) == 3 and shape[0] not in (1, batch)):
        raise ValueError(f"cos: got shape {shape}; accepted is ({tokens}, R/2) or ({batch}, {tokens}, R/2)")
    if not 1 <= shape[-1] <= head_dim // 2:
        raise ValueError(
            f"cos: got {shape[-1]} angles a token; accepted are 1 to {head_dim // 2}, half of the dimensions to rotate "
            f"of x's {head_dim} (a table that holds every angle twice: pass its first half)"
        )
    _check.shape("sin", sin, shape)
    _check.same_dtype("sin", sin, "cos", cos)


class RotaryFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves only the tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.backend = interleaved, backend
        return _library.ops(backend).rotary_forward(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if _library.graph_wanted():
            return reference.rotary(grad_out, cos, -sin, ctx.interleaved), None, None, None, None
        return _library.ops(ctx.backend).rotary_backward(grad_out, cos, sin, ctx.interleaved), None, None, None, None


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return empty_like_heads(x)


_library.register(
    "rotary_forward",
    "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    fake=_fake,
)
_library.register(
    "rotary_backward",
    "(Tensor grad_out, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    fake=_fake,
)
