"""Fixes Triton's interpreter (``TRITON_INTERPRET=1``) where it computes differently from a GPU.

bfloat16: the interpreter (Triton 3.6 to 3.9) holds numbers as 16-bit patterns and computes with those patterns as integers
(`tl.dot`, sums, maxima, comparisons, arithmetic); it also truncates where a GPU rounds to nearest even. Sums: NumPy adds
along a first axis one element after another; a GPU adds in a tree, whose rounding errors grow only with the logarithm of
the length. tests/kernels/test_interpreter.py fails when a Triton release no longer needs this.
"""

from __future__ import annotations

from collections.abc import Callable
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


def _rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    return _bf16_to_float32(_float32_to_bf16(values))


def _tree_sum(
    values: np.ndarray, axis: int | None, keepdims: bool, rounded: Callable[[np.ndarray], np.ndarray] = lambda x: x
) -> np.ndarray:
    """The sum over `axis`, adding halves to halves: a tile of Triton's has a power of two of elements."""
    if axis is None:
        total = _tree_sum(values.reshape(-1), 0, False, rounded)
        return total.reshape((1,) * values.ndim) if keepdims else total
    while values.shape[axis] > 1:
        low, high = np.split(values, 2, axis=axis)
        values = rounded(low + high)
    return values if keepdims else values.squeeze(axis)


def _is_bf16(x: Any) -> bool:
    return isinstance(x, _Handle | tl.core.tensor) and x.dtype.scalar == tl.bfloat16


def _widened(handle: _Handle) -> _Handle:
    return _Handle(_bf16_to_float32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrowed(handle: _Handle) -> _Handle:
    return _Handle(_float32_to_bf16(handle.data), tl.bfloat16)


def _like(tensor: Any, handle: _Handle) -> Any:
    """A tensor that holds `handle`, of `tensor`'s shape; a scalar if that is one."""
    scalar = handle.dtype.scalar
    shaped = isinstance(tensor.type, tl.block_type)
    return tl.core.tensor(handle, tl.block_type(scalar, tensor.type.shape) if shaped else scalar)


def _mend_builder(builder: Any) -> None:
    plain_cast, plain_fp_to_fp, plain_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self: Any, src: _Handle, dst_type: Any) -> _Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return plain_cast(self, src, dst_type)
        wide = _widened(src)
        if target != tl.bfloat16:
            return plain_cast(self, wide, dst_type) if target != tl.float32 else wide
        if wide.dtype.scalar != tl.float32:
            wide = plain_cast(self, wide, tl.float32)
        return _narrowed(wide)

    def create_fp_to_fp(self: Any, src: _Handle, dst_type: Any, rounding_mode: Any) -> _Handle:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: _Handle, b: _Handle, d: _Handle, *rest: Any) -> _Handle:
        return plain_dot(self, _widened(a), _widened(b), d, *rest)

    def in_float32(plain: Callable[..., _Handle]) -> Callable[..., _Handle]:
        """`plain` with bfloat16 operands widened, and a floating-point result rounded once."""

        def method(self: Any, *args: Any) -> _Handle:
            if not any(map(_is_bf16, args)):
                return plain(self, *args)
            out = plain(self, *(_widened(x) if _is_bf16(x) else x for x in args))
            return _narrowed(out) if out.data.dtype == np.float32 else out

        return method

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_rsqrt"):
        setattr(builder, name, in_float32(getattr(builder, name)))


def _mend_reductions(interface: Any, reduction: Any) -> None:
    plain_apply, plain_sum = interface.apply, reduction.sum

    def tree_sum(self: Any, tensor: Any) -> Any:
        values = tensor.handle.data
        if tensor.dtype == tl.bfloat16:  # tl.sum adds in bfloat16: it rounds every partial sum
            total = _tree_sum(_bf16_to_float32(values), self.axis, self.keep_dims, _rounded_to_bf16)
            return self.to_tensor(_float32_to_bf16(total), tl.bfloat16)
        if not np.issubdtype(values.dtype, np.floating):
            return plain_sum(self, tensor)
        return self.to_tensor(_tree_sum(values, self.axis, self.keep_dims), tensor.dtype)

    def apply(self: Any, input: Any) -> Any:
        """Computes maxima, minima and scans in float32."""
        inputs = input if isinstance(input, tuple) else (input,)
        is_sum = isinstance(self, reduction) and self.combine_fn is tl.standard._sum_combine
        if is_sum or not any(map(_is_bf16, inputs)):
            return plain_apply(self, input)
        outs = plain_apply(self, tuple(_like(x, _widened(x.handle)) if _is_bf16(x) else x for x in inputs))
        outs = tuple(_like(y, _narrowed(y.handle)) if _is_bf16(x) else y for x, y in zip(inputs, outs))
        return outs if isinstance(input, tuple) else outs[0]

    interface.apply, reduction.sum = apply, tree_sum


def mend() -> None:
    """Makes the interpreter's casts, arithmetic, dot and reductions compute as on a GPU. Idempotent."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "bf16_is_mended", False):
        return
    _mend_builder(builder)
    _mend_reductions(interpreter.ReduceScanOpInterface, interpreter.ReduceOps)
    builder.bf16_is_mended = True
