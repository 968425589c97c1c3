"""Softmax in Triton: rows that fit stay in registers, longer ones are read twice; other dimensions go by tiles.

All arithmetic is float32. Rows are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import (
    Hardware,
    Launch,
    cdiv,
    contiguous_like,
    hardware,
    long_rows,
    next_power_of_2,
    on_device,
    planned,
    rereading_threads,
    rows_and_stride,
    whole_rows,
)

LOG2_E = math.log2(math.e)

# The longest row that a program of 1,024 threads holds in registers: forward 32 float32 a thread; backward 16 of y and of dy.
FORWARD_BLOCK = 32768
BACKWARD_BLOCK = 16384
# The tile for a dimension that is not the last: elements along that dimension, and neighbouring columns.
STRIDED_BLOCK = 32
STRIDED_WIDTH = 64


@triton.jit
def _visible(rows, N, QUERIES, CAUSAL: tl.constexpr):
    """How many of its N columns each row keeps, counted from the left, and how many it reads.

    Reads end at a multiple of 16 or at the row's end: with a mask that may end anywhere, every element would be loaded by
    itself.
    """
    visible = tl.zeros_like(rows) + N
    read = visible
    if CAUSAL:
        visible = tl.minimum(tl.maximum(rows % QUERIES + 1 + N - QUERIES, 0), visible)
        read = tl.minimum(tl.cdiv(visible, 16) * 16, read)
    return visible, read


@triton.jit
def _finite_max(m):
    """The maximum to subtract: 0 for a row of nothing but -inf, where -inf - -inf would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _reciprocal(total):
    """1 / total; 1 for a row of nothing but -inf, whose exponentials are all 0."""
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
    """One long row: one read for maximum and sum, a second one, mostly from cache, for the result.

    Each of the tile's LANES columns has its own maximum and sum, so that threads do not wait for each other in the loop.
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
    # From the row's end, which the caches still hold. The result must not evict it.
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
    """Softmax over N of (OUTER, N, INNER): WIDTH neighbouring columns at a time, so that reads are adjacent."""
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
    # y sums to 1 only up to its rounding, so a part of the mean is left: subtract that too, from registers.
    centred -= tl.sum(y * centred, axis=1)[:, None]
    dx = scale * y * centred
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(DX + rows[:, None] * N + cols[None, :], dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def _backward_long_kernel(
    DY, Y, DX, N, QUERIES, stride_dy, scale, CAUSAL: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """One long row: one read for the sums of y * dy and of y, a second one, mostly from cache, for dx."""
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
    """Softmax's backward over N of (OUTER, N, INNER), as for a long row: WIDTH neighbouring columns at a time."""
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


def _strided(shape: tuple[int, ...], dim: int) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    """``(grid, (N, INNER), constants)`` of the kernels for a dimension that is not the last."""
    columns, inner = shape[dim], math.prod(shape[dim + 1 :])
    width = min(STRIDED_WIDTH, next_power_of_2(inner))
    block = min(STRIDED_BLOCK * STRIDED_WIDTH // width, next_power_of_2(columns))
    # Only a grid's first dimension may exceed 65,535.
    grid = (math.prod(shape[:dim]) * cdiv(inner, width),)
    return grid, (columns, inner), {"BLOCK": block, "WIDTH": width, "num_warps": 4}


@planned
def _forward_strided_launch(shape: tuple[int, ...], dim: int, scale_log2: float) -> Launch:
    grid, sizes, constants = _strided(shape, dim)
    return Launch(_forward_strided_kernel, grid, (*sizes, scale_log2), **constants)


@planned
def _backward_strided_launch(shape: tuple[int, ...], dim: int, scale: float) -> Launch:
    grid, sizes, constants = _strided(shape, dim)
    return Launch(_backward_strided_kernel, grid, (*sizes, scale), **constants)


@planned
def _forward_launch(
    device: Hardware, itemsize: int, rows: int, columns: int, queries: int, stride: int, scale_log2: float, causal: bool
) -> Launch:
    if columns <= FORWARD_BLOCK:
        constants = whole_rows(device, columns, 16)
        grid, kernel, sizes = cdiv(rows, constants["ROWS"]), _forward_kernel, (rows, columns)
    else:
        constants = long_rows(device, itemsize, (columns, stride), rereading_threads(columns * itemsize))
        grid, kernel, sizes = rows, _forward_long_kernel, (columns,)
    return Launch(kernel, (grid,), (*sizes, queries, stride, scale_log2), CAUSAL=causal, **constants)


@planned
def _backward_launch(
    device: Hardware, itemsize: int, rows: int, columns: int, queries: int, stride_dy: int, scale: float, causal: bool
) -> Launch:
    if columns <= BACKWARD_BLOCK:
        constants = whole_rows(device, columns, 16)
        grid, kernel, sizes = cdiv(rows, constants["ROWS"]), _backward_kernel, (rows, columns)
    else:
        constants = long_rows(device, itemsize, (columns, stride_dy), rereading_threads(2 * columns * itemsize))
        grid, kernel, sizes = rows, _backward_long_kernel, (columns,)
    return Launch(kernel, (grid,), (*sizes, queries, stride_dy, scale), CAUSAL=causal, **constants)


def _is_strided(x: Tensor, dim: int) -> bool:
    """Whether elements along `dim` are not adjacent in a contiguous tensor of `x`'s shape."""
    return dim != x.dim() - 1 and math.prod(x.shape[dim + 1 :]) > 1


def softmax_forward(x: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    """Softmax of ``scale * x`` over `dim`: contiguous, like x."""
    out = contiguous_like(x)
    if x.numel() == 0:
        return out
    dim %= x.dim()
    scale_log2 = scale * LOG2_E
    with on_device(x):
        if _is_strided(x, dim):
            _forward_strided_launch(x.shape, dim, scale_log2)(x.contiguous(), out)
            return out
        queries = x.shape[-2] if causal else 1
        x, rows, columns, stride = rows_and_stride(x.flatten(dim))
        launch = _forward_launch(hardware(x), x.dtype.itemsize, rows, columns, queries, stride, scale_log2, causal)
        launch(x, out)
    return out


def softmax_backward(grad_out: Tensor, out: Tensor, dim: int, scale: float, causal: bool) -> Tensor:
    """The gradient of `softmax_forward`'s input from its output: contiguous, like out."""
    grad_x = contiguous_like(out)
    if out.numel() == 0:
        return grad_x
    dim %= out.dim()
    with on_device(out):
        out = out.contiguous()
        if _is_strided(out, dim):
            _backward_strided_launch(out.shape, dim, scale)(grad_out.contiguous(), out, grad_x)
            return grad_x
        queries = out.shape[-2] if causal else 1
        grad_out, rows, columns, stride = rows_and_stride(grad_out.flatten(dim))
        launch = _backward_launch(hardware(out), out.dtype.itemsize, rows, columns, queries, stride, scale, causal)
        launch(grad_out, out, grad_x)
    return grad_x
