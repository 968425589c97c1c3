"""Softmax: the public function, its checks and its autograd.Function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _library
from gptkernels import backend as _backend
from gptkernels.softmax import reference


def softmax(
    x: Tensor, dim: int = -1, *, scale: float = 1.0, causal: bool = False, backend: str | None = None
) -> Tensor:
    """``exp(scale * x) / sum(exp(scale * x))`` over one dimension.

    The maximum, the exponentials and their sum are float32 whatever the dtype. The backward needs only the output.

    Args:
        x: floating point, any shape; any layout, a last dimension of stride 1 is read in place.
        dim: the dimension that sums to 1.
        scale: positive and finite; multiplies x in the same pass (attention's ``1 / sqrt(head_dim)``, or one over a
            temperature).
        causal: the last two dimensions are (query, key) and `dim` is the last. Query i keeps the keys up to ``i + keys -
            queries`` (aligned bottom-right: the last query keeps every key). The others become 0, whatever they hold.
        backend: overrides `use_backend` for this call.

    Returns:
        x's shape and dtype, contiguous. A row of nothing but -inf, or one without a key under `causal`, becomes zeros.

    Raises:
        ValueError: a dimension, scale or shape that is not accepted.
        TypeError: a tensor that is not floating point.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867. The derivation is
    in ``MATH.md``.
    """
    _check.floating("x", x)
    dims = max(x.dim(), 1)  # PyTorch counts one for a tensor without dimensions
    if not -dims <= dim < dims:
        raise ValueError(f"dim: got {dim}; accepted here are {-dims} to {dims - 1}")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}; accepted are positive finite numbers")
    dim %= dims
    if causal and x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}; with causal=True accepted is (..., queries, keys)")
    if causal and dim != x.dim() - 1:
        raise ValueError(f"dim: got {dim}; with causal=True accepted is the last, {x.dim() - 1}")
    if x.dim() == 0:
        return softmax(x[None], scale=scale, backend=backend)[0]
    name = _backend.choose("softmax", x, backend)
    if name == "reference":
        return reference.softmax(x, dim, scale=scale, causal=causal)
    return _library.apply(SoftmaxFunction, x, dim, scale, causal, name)


class SoftmaxFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves only the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, scale: float, causal: bool, backend: str) -> Tensor:
        out = _library.ops(backend).softmax_forward(x, dim, scale, causal)
        ctx.save_for_backward(out)
        ctx.options = dim, scale, causal
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        if _library.graph_wanted():
            dim, scale, _ = ctx.options
            return reference.softmax_backward(grad_out, out, dim, scale), None, None, None, None
        grad_x = _library.ops(ctx.backend).softmax_backward(grad_out, out, *ctx.options)
        return grad_x, None, None, None, None


def _fake_forward(x: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad_out: Tensor, out: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    return out.new_empty(out.shape)


_library.register(
    "softmax_forward",
    "(Tensor x, int dim, float scale, bool causal) -> Tensor",
    fake=_fake_forward,
)
_library.register(
    "softmax_backward",
    "(Tensor grad_out, Tensor out, int dim, float scale, bool causal) -> Tensor",
    fake=_fake_backward,
)
