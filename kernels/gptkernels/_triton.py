"""What the Triton launchers share: the mended interpreter, the device guard, and the device's size and architecture.

Beside the operations' own ``triton.py`` this is the only module that imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from gptkernels.backend import interpreting

# Decided here and not inherited: Triton 3.10 turns the fusion of multiply and add off by default.
FP_FUSION = {"enable_fp_fusion": True}

if interpreting():
    from gptkernels import _interpreter

    _interpreter.mend()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes `x`'s GPU the current one: Triton launches on the current device, whatever its arguments live on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _properties(index: int) -> tuple[int, str]:
    properties = torch.cuda.get_device_properties(index)
    arch = "hip" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return properties.multi_processor_count, arch


# The device that meta tensors stand for, in `compiling_for`.
_compile_target: tuple[int, str] | None = None


@contextmanager
def compiling_for(arch: str, multiprocessors: int = 132) -> Iterator[None]:
    """Launchers given tensors without data configure themselves for `arch` (see compile_report)."""
    global _compile_target
    _compile_target = (multiprocessors, arch)
    try:
        yield
    finally:
        _compile_target = None


def _device(x: Tensor) -> tuple[int, str]:
    if x.is_cuda:
        return _properties(x.device.index)
    if x.is_meta and _compile_target:
        return _compile_target
    return 2, "interpreter"


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of `x`'s GPU; 2 in the interpreter, so that a handful of rows already spans several programs."""
    return _device(x)[0]


def architecture(x: Tensor) -> str:
    """``sm_90``, ``sm_80``, ... or ``hip``; ``interpreter`` on the CPU."""
    return _device(x)[1]


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rows_and_stride(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` as rows of its last dimension: ``(tensor, rows, columns, stride between rows)``.

    Read in place where one stride describes all rows and columns are adjacent (a slice of a wider tensor, say),
    copied otherwise. `x` is not empty.
    """
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)  # a view wherever one stride describes the rows
    if columns > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.shape[0], columns, flat.stride(0)
