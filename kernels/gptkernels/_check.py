"""Argument checks shared by the operations: each error names the argument, what came and what is accepted."""

from __future__ import annotations

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
