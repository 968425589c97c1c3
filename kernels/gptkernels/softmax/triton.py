"""Softmax in Triton: whole rows while they fit in registers, an online pass and a second read beyond; other dims in tiles.

All arithmetic is float32. Rows are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import (
    FP_FUSION,
    long_rows,
    next_power_of_2,
    on_device,
    rereading_threads,
    rows_and_stride,
    whole_rows,
)

# The longest row that one program holds in registers: 32 float32 a thread of 1,024; backward y and dy, 16 of each.
FORWARD_BLOCK = 32768
BACKWARD_BLOCK = 16384
# The tile of the kernels for a dimension that is not the last: elements along it, and neighbours beside it.
STRIDED_BLOCK = 32
STRIDED_WIDTH = 64


@triton.jit
def _visible(rows, N, QUERIES, CAUSAL: tl.constexpr):
    """How many of its N columns each row keeps, counted from the left, and how many are read.

    Those end at a multiple of 16 or at the row's end: a mask that may end anywhere would have every element loaded alone.
    """
    visible = tl.zeros_like(rows) + N
    read = visible
    if CAUSAL:
        visible = tl.minimum(tl.maximum(rows % QUERIES + 1 + N - QUERIES, 0), visible)
        read = tl.minimum(tl.cdiv(visible, 16) * 16, read)
    return visible, read


@triton.jit
def _finite_max(m):
    """What to subtract under the exponential: a row of nothing but -inf would subtract -inf from itself."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _reciprocal(total):
    """1 / total; 1 for a row of nothing but -inf, whose exponentials are all 0 already."""
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _forward_kernel(
    X, Y, M, N, QUERIES, stride_x, scale_log2, CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS whole rows: one read, one write."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    visible, read = _visible(rows, N, QUERIES, CAUSAL)
    touched = (rows < M)[:, None] & (cols[None, :] < read[:, None])
    x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=touched, other=float("-inf")).to(tl.float32)
    if CAUSAL:
        x = tl.where(cols[None, :] < visible[:, None], x, float("-inf"))
    m = _finite_max(tl.max(x, axis=1))  # (ROWS,)
    p = tl.exp2((x - m[:, None]) * scale_log2)
    y = p * _reciprocal(tl.sum(p, axis=1))[:, None]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(Y + rows[:, None] * N + cols[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_long_kernel(
    X, Y, N, QUERIES, stride_x, scale_log2, CAUSAL: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """One long row: maximum and sum online in one read, the result in a second, of what the first left in cache.

    Each of LANES columns of a tile keeps a maximum and a sum of its own, so that the loop waits for no other thread.
    """
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    Y += row * N
    visible, read = _visible(row, N, QUERIES, CAUSAL)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, read, DEPTH * LANES):
        cols = start + tile
        x = tl.load(X + cols, mask=cols < read, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        if CAUSAL:
            x = tl.where(cols < visible, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = _finite_max(m_new)
        total = total * tl.exp2((m - base) * scale_log2) + tl.sum(tl.exp2((x - base[None, :]) * scale_log2), axis=0)
        m = m_new
    base = _finite_max(tl.max(m, axis=0))
    factor = _reciprocal(tl.sum(total * tl.exp2((m - base) * scale_log2), axis=0))
    # From the end: what was read last is what the caches still hold. The result is not to drive it out.
    blocks = tl.cdiv(N, DEPTH * LANES)
    for block in range(blocks):
        cols = (blocks - 1 - block) * (DEPTH * LANES) + tile
        x = tl.load(X + cols, mask=cols < read, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        if CAUSAL:
            x = tl.where(cols < visible, x, float("-inf"))
        y = tl.exp2((x - base) * scale_log2) * factor
        tl.store(Y + cols, y.to(Y.dtype.element_ty), mask=cols < N, eviction_policy="evict_first")


@triton.jit
def _forward_strided_kernel(X, Y, N, INNER, scale_log2, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(OUTER, N, INNER), softmax over N: WIDTH neighbouring columns at a time, so that reads stay adjacent."""
    blocks = tl.cdiv(INNER, WIDTH)
    inner = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    base_offset = (tl.program_id(0) // blocks).to(tl.int64) * N * INNER
    X += base_offset
    Y += base_offset
    m = tl.full((WIDTH,), float("-inf"), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, N, BLOCK):
        n = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (n < N)[:, None] & (inner < INNER)[None, :]
        x = tl.load(X + n[:, None] * INNER + inner[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        base = _finite_max(m_new)
        p = tl.exp2((x - base[None, :]) * scale_log2)
        total = total * tl.exp2((m - base) * scale_log2) + tl.sum(p, axis=0)
        m = m_new
    base = _finite_max(m)
    factor = _reciprocal(total)
    for start in range(0, N, BLOCK):
        n = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (n < N)[:, None] & (inner < INNER)[None, :]
        offsets = n[:, None] * INNER + inner[None, :]
        x = tl.load(X + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.exp2((x - base[None, :]) * scale_log2) * factor[None, :]
        tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    DY, Y, DX, M, N, QUERIES, stride_dy, scale, CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS whole rows: dx = scale * y * (dy - sum(y * dy)), each tensor read once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    visible, read = _visible(rows, N, QUERIES, CAUSAL)
    touched = (rows < M)[:, None] & (cols[None, :] < read[:, None])
    y = tl.load(Y + rows[:, None] * N + cols[None, :], mask=touched, other=0.0).to(tl.float32)
    dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=touched, other=0.0).to(tl.float32)
    if CAUSAL:  # y is 0 there, but dy may be NaN
        dy = tl.where(cols[None, :] < visible[:, None], dy, 0.0)
    centred = dy - tl.sum(y * dy, axis=1)[:, None]
    # y sums to 1 only up to its rounding: what is left of the mean is taken out in a second look, in registers.
    centred -= tl.sum(y * centred, axis=1)[:, None]
    dx = scale * y * centred
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(DX + rows[:, None] * N + cols[None, :], dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def _backward_long_kernel(
    DY, Y, DX, N, QUERIES, stride_dy, scale, CAUSAL: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """One long row: the sums of y * dy and of y in one read, dx in a second, of what the first left in cache."""
    row = tl.program_id(0).to(tl.int64)
    DY += row * stride_dy
    Y += row * N
    DX += row * N
    visible, read = _visible(row, N, QUERIES, CAUSAL)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    dot = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, read, DEPTH * LANES):
        cols = start + tile
        y = tl.load(Y + cols, mask=cols < read, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dy = tl.load(DY + cols, mask=cols < read, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if CAUSAL:
            dy = tl.where(cols < visible, dy, 0.0)
        dot += tl.sum(y * dy, axis=0)
        total += tl.sum(y, axis=0)
    mean = tl.sum(dot, axis=0) * _reciprocal(tl.sum(total, axis=0))
    # From the end, as in the forward.
    blocks = tl.cdiv(N, DEPTH * LANES)
    for block in range(blocks):
        cols = (blocks - 1 - block) * (DEPTH * LANES) + tile
        y = tl.load(Y + cols, mask=cols < read, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(DY + cols, mask=cols < read, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if CAUSAL:
            dy = tl.where(cols < visible, dy, 0.0)
        dx = scale * y * (dy - mean)
        tl.store(DX + cols, dx.to(DX.dtype.element_ty), mask=cols < N, eviction_policy="evict_first")


@triton.jit
def _backward_strided_kernel(DY, Y, DX, N, INNER, scale, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(OUTER, N, INNER), softmax over N: the long form over WIDTH neighbouring columns at a time."""
    blocks = tl.cdiv(INNER, WIDTH)
    inner = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    base_offset = (tl.program_id(0) // blocks).to(tl.int64) * N * INNER
    DY += base_offset
    Y += base_offset
    DX += base_offset
    dot = tl.zeros((WIDTH,), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, N, BLOCK):
        n = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (n < N)[:, None] & (inner < INNER)[None, :]
        offsets = n[:, None] * INNER + inner[None, :]
        y = tl.load(Y + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + offsets, mask=inside, other=0.0).to(tl.float32)
        dot += tl.sum(y * dy, axis=0)
        total += tl.sum(y, axis=0)
    dot = dot * _reciprocal(total)
    for start in range(0, N, BLOCK):
        n = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = (n < N)[:, None] & (inner < INNER)[None, :]
        offsets = n[:, None] * INNER + inner[None, :]
        y = tl.load(Y + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + offsets, (scale * y * (dy - dot[None, :])).to(DX.dtype.element_ty), mask=inside)


def _strided_launch(x: Tensor, dim: int) -> tuple[tuple[int], int, int, dict[str, int]]:
    """``(grid, N, INNER, constants)`` of the kernels for a dimension that is not the last."""
    columns, inner = x.shape[dim], math.prod(x.shape[dim + 1 :])
    width = min(STRIDED_WIDTH, next_power_of_2(inner))
    block = min(STRIDED_BLOCK * STRIDED_WIDTH // width, next_power_of_2(columns))
    # A grid's first dimension alone may exceed 65,535.
    grid = (math.prod(x.shape[:dim]) * triton.cdiv(inner, width),)
    return grid, columns, inner, {"BLOCK": block, "WIDTH": width, "num_warps": 4}


def softmax_forward(x: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    """Softmax of ``scale * x`` over `dim`: contiguous, like x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    dim %= x.dim()
    scale_log2 = scale * math.log2(math.e)
    with on_device(x):
        if math.prod(x.shape[dim + 1 :]) > 1:
            grid, columns, inner, constants = _strided_launch(x, dim)
            _forward_strided_kernel[grid](x.contiguous(), out, columns, inner, scale_log2, **constants, **FP_FUSION)
            return out
        queries = x.shape[-2] if causal else 1
        x, rows, columns, stride = rows_and_stride(x.flatten(dim))
        if columns <= FORWARD_BLOCK:
            constants = whole_rows(x, columns, 16)
            _forward_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                x, out, rows, columns, queries, stride, scale_log2, CAUSAL=causal, **constants, **FP_FUSION
            )
        else:
            constants = long_rows([x], (columns, stride), rereading_threads(columns * x.element_size()))
            _forward_long_kernel[(rows,)](
                x, out, columns, queries, stride, scale_log2, CAUSAL=causal, **constants, **FP_FUSION
            )
    return out


def softmax_backward(grad_out: Tensor, out: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    """The gradient of `softmax_forward`'s input from its output: contiguous, like out."""
    grad_x = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if out.numel() == 0:
        return grad_x
    dim %= out.dim()
    with on_device(out):
        out = out.contiguous()
        if math.prod(out.shape[dim + 1 :]) > 1:
            grid, columns, inner, constants = _strided_launch(out, dim)
            _backward_strided_kernel[grid](
                grad_out.contiguous(), out, grad_x, columns, inner, scale, **constants, **FP_FUSION
            )
            return grad_x
        queries = out.shape[-2] if causal else 1
        grad_out, rows, columns, stride = rows_and_stride(grad_out.flatten(dim))
        if columns <= BACKWARD_BLOCK:
            constants = whole_rows(out, columns, 16)
            _backward_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                grad_out, out, grad_x, rows, columns, queries, stride, scale, CAUSAL=causal, **constants, **FP_FUSION
            )
        else:
            row_bytes = columns * (grad_out.element_size() + out.element_size())
            constants = long_rows([grad_out, out], (columns, stride), rereading_threads(row_bytes))
            _backward_long_kernel[(rows,)](
                grad_out, out, grad_x, columns, queries, stride, scale, CAUSAL=causal, **constants, **FP_FUSION
            )
    return grad_x
