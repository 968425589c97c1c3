"""Mends Triton's interpreter (``TRITON_INTERPRET=1``) where it computes other than a GPU would.

bfloat16: the interpreter (Triton 3.6 to 3.9) holds it as 16-bit patterns, multiplies those patterns in `tl.dot`, and
truncates where the GPU rounds to nearest even. Sums: numpy adds along a first axis one element after the other, a GPU
in a tree, whose rounding errors grow with the logarithm of the length only.
`tests/kernels/test_interpreter.py` fails when a Triton release no longer needs this.
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


def _tree_sum(values: np.ndarray, axis: int | None, keepdims: bool) -> np.ndarray:
    """The sum over `axis`, halves added to halves. Triton's tiles have a power of two of elements."""
    if axis is None:
        total = _tree_sum(values.reshape(-1), 0, False)
        return total.reshape((1,) * values.ndim) if keepdims else total
    while values.shape[axis] > 1:
        low, high = np.split(values, 2, axis=axis)
        values = low + high
    return values if keepdims else values.squeeze(axis)


def mend() -> None:
    """Replaces the interpreter's cast, dot and sum with ones that compute as a GPU does. Idempotent."""
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

    reduction: Any = interpreter.ReduceOps
    plain_sum = reduction.sum

    def tree_sum(self: Any, tensor: Any) -> Any:
        values = tensor.handle.data
        if not np.issubdtype(values.dtype, np.floating):
            return plain_sum(self, tensor)
        return self.to_tensor(_tree_sum(values, self.axis, self.keep_dims), tensor.dtype)

    reduction.sum = tree_sum
