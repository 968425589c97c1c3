"""Argument checks shared by the operations: each error names the argument, what came and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}; accepted is a floating-point tensor")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: got dtype {x.dtype}; accepted are floating-point dtypes")


def shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted here is {tuple(expected)}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: is on {x.device}; accepted is {other_name}'s device, {other.device}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}; accepted is {other_name}'s dtype, {other.dtype}")


def normalised(x: Tensor, **parameters: Tensor | None) -> None:
    """Checks a norm's arguments: rows ``(..., N)`` and parameters ``(N,)`` of any floating dtype."""
    floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: got a tensor without dimensions; accepted is (..., N)")
    for name, parameter in parameters.items():
        if parameter is not None:
            floating(name, parameter)
            shape(name, parameter, (x.size(-1),))  # some nested tensors have no shape, but this size
            same_device(name, parameter, "x", x)


def stream(x: Tensor, residual: Tensor) -> None:
    """Checks a residual stream against the branch `x` that is added to it: x's dtype, or float32 beside a 16-bit `x`."""
    floating("residual", residual)
    shape("residual", residual, tuple(x.shape))
    same_device("residual", residual, "x", x)
    if residual.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"residual: got dtype {residual.dtype}; accepted is x's dtype, {x.dtype}, or torch.float32")


def autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# PyTorch 2.11's Dynamo cannot trace the call above. The mark is that of torch.compiler.assume_constant_result, whose import
# of the compiler takes seconds.
autocast_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast casts `x` to; None where autocast is off or does not cast `x` (float64)."""
    device_type = x.device.type
    if x.dtype == torch.float64 or not autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
