"""Mends bfloat16 in Triton's interpreter (``TRITON_INTERPRET=1``), which holds it as 16-bit patterns.

Left alone (Triton 3.6 to 3.9) the interpreter multiplies those patterns in `tl.dot` and truncates where the GPU rounds
to nearest even. `tests/kernels/test_interpreter.py` fails when a Triton release no longer needs this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle


def _bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even; uint32 wraps only for NaN
    rounded = np.where(np.isnan(values), 0x7FC0, rounded)
    return rounded.astype(np.uint16).reshape(values.shape)


def mend() -> None:
    """Replaces the interpreter's cast and dot with ones that compute in bfloat16's real values. Idempotent."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "bf16_is_mended", False):
        return
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot
    plain_fp_to_fp = builder.create_fp_to_fp

    def widened(handle: _Handle) -> _Handle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return _Handle(_bf16_to_float32(handle.data), tl.float32)

    def cast_impl(self: Any, src: _Handle, dst_type: Any) -> _Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return plain_cast(self, src, dst_type)
        wide = widened(src)
        if target != tl.bfloat16:
            return plain_cast(self, wide, dst_type) if target != tl.float32 else wide
        if wide.dtype.scalar != tl.float32:
            wide = plain_cast(self, wide, tl.float32)
        return _Handle(_float32_to_bf16(wide.data), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: _Handle, dst_type: Any, rounding_mode: Any) -> _Handle:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: _Handle, b: _Handle, d: _Handle, *rest: Any) -> _Handle:
        return plain_dot(self, widened(a), widened(b), d, *rest)

    builder.cast_impl, builder.create_dot, builder.create_fp_to_fp = cast_impl, create_dot, create_fp_to_fp
    builder.bf16_is_mended = True
