"""The losses' Triton kernels: cross-entropy of rows of logits, and the scaling of a finished gradient.

A row stays in registers while it fits. A longer one is read once for its maximum and sum, and again, from the cache, for
its gradient. All arithmetic is float32. Rows are addressed in int64. The gradient may be written over the logits: a
program has read what it overwrites. The derivation and the traffic are in cross_entropy/MATH.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import (
    Hardware,
    Launch,
    cdiv,
    hardware,
    long_rows,
    next_power_of_2,
    on_device,
    planned,
    rereading_threads,
    rows_and_stride,
)

# The longest row that one program keeps in registers: 32,768 float32 over 1,024 threads are 32 registers a thread.
MAX_BLOCK = 32768
MAX_THREADS = 1024
# Elements that a program of the scaling kernel takes at a time.
SCALE_BLOCK = 4096

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def _rows_kernel(
    X, TARGET, WEIGHT, LOSS, DX, M, N, PADDED, stride_x, stride_dx, ignored,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: one read, and with GRADIENT one write. Columns from N to PADDED may be accessed, and have no meaning."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    target = tl.load(TARGET + rows, mask=rows < M, other=0)
    counted = (rows < M) & (target != ignored)
    known = (target >= 0) & (target < N)  # a target that is not a class makes its row NaN
    target = target.to(tl.int32)
    chosen = tl.load(X + rows * stride_x + target, mask=counted & known, other=float("nan")).to(tl.float32)
    touched = (cols < PADDED)[None, :] & counted[:, None]
    x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=touched, other=0.0).to(tl.float32)
    x = tl.where((cols < N)[None, :], x, float("-inf"))
    m = tl.max(x, axis=1)  # (ROWS,)
    e = tl.exp2((x - m[:, None]) * LOG2E)
    total = tl.sum(e, axis=1)
    tl.store(LOSS + rows, tl.where(counted, tl.log(total) + (m - chosen), 0.0), mask=rows < M)
    if GRADIENT:
        weight = tl.where(known, tl.load(WEIGHT + rows, mask=counted, other=0.0), float("nan"))
        p = e * (1.0 / total)[:, None]
        dx = weight[:, None] * tl.where(cols[None, :] == target[:, None], p - 1.0, p)
        dx = tl.where(counted[:, None], dx, 0.0)
        inside = (cols < PADDED)[None, :] & (rows < M)[:, None]
        tl.store(DX + rows[:, None] * stride_dx + cols[None, :], dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def _long_kernel(
    X, TARGET, WEIGHT, LOSS, DX, N, PADDED, stride_x, stride_dx, ignored,
    GRADIENT: tl.constexpr, PIECE: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One long row: one read for maximum and sum; with GRADIENT a second one, mostly from cache.

    Each of the tile's LANES columns has its own maximum and sum, so that threads do not wait for each other in the loop.
    PIECE is 0, or the number of elements in 16 bytes where rows do not start at multiples of 16 bytes. The loops then take
    the aligned pieces of 16 bytes within the row, from column `head` on; the edges before and after are taken separately.
    """
    row = tl.program_id(0).to(tl.int64)
    head = 0
    size = N  # columns of the loops
    touched = PADDED
    BODY = X + row * stride_x
    if PIECE > 0:
        start_piece = tl.cdiv(row * stride_x, PIECE)
        head = (start_piece * PIECE - row * stride_x).to(tl.int32)
        size = (N - head) // PIECE * PIECE
        touched = size
        BODY = X + start_piece * PIECE
        edge = tl.arange(0, 2 * PIECE)
        edge_cols = tl.where(edge < PIECE, edge, head + size + edge - PIECE)
        edge_end = tl.where(edge < PIECE, head, N)
    X += row * stride_x
    target = tl.load(TARGET + row)
    counted = target != ignored
    known = (target >= 0) & (target < N)  # a target that is not a class makes the row NaN
    target = target.to(tl.int32)
    chosen = tl.load(X + target, mask=counted & known, other=float("nan")).to(tl.float32)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    read = tl.where(counted, touched, 0)  # nothing of an ignored row
    m = tl.full((LANES,), LOWEST, tl.float32)  # not -inf: -inf - -inf would be NaN
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, read, DEPTH * LANES):
        cols = start + tile
        x = tl.load(BODY + cols, mask=cols < read, other=0.0).to(tl.float32)
        x = tl.where(cols < size, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, axis=0))
        e = tl.exp2((x - m_new[None, :]) * LOG2E)
        total = total * tl.exp2((m - m_new) * LOG2E) + tl.sum(e, axis=0)
        m = m_new
    top = tl.max(m, axis=0)
    if PIECE > 0:
        is_edge = edge_cols < tl.where(counted, edge_end, 0)
        x_edge = tl.load(X + edge_cols, mask=is_edge, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(x_edge, axis=0))
    total = tl.sum(total * tl.exp2((m - top) * LOG2E), axis=0)
    if PIECE > 0:
        total += tl.sum(tl.exp2((x_edge - top) * LOG2E), axis=0)
    tl.store(LOSS + row, tl.where(counted, tl.log(total) + (top - chosen), 0.0))
    if GRADIENT:
        BODY_DX = DX + row * stride_dx + head
        if PIECE > 0:
            BODY_DX = DX + tl.cdiv(row * stride_dx, PIECE) * PIECE
        DX += row * stride_dx
        weight = tl.where(known, tl.load(WEIGHT + row), float("nan"))
        factor = 1.0 / total
        # From the row's end, which the caches still hold. The gradient must not evict it.
        blocks = tl.cdiv(touched, DEPTH * LANES)
        for block in range(blocks):
            cols = (blocks - 1 - block) * (DEPTH * LANES) + tile
            x = tl.load(BODY + cols, mask=cols < read, other=0.0, eviction_policy="evict_first").to(tl.float32)
            p = tl.exp2((x - top) * LOG2E) * factor
            dx = weight * tl.where(cols == target - head, p - 1.0, p)
            dx = tl.where(counted & (cols < size), dx, 0.0)
            tl.store(BODY_DX + cols, dx.to(DX.dtype.element_ty), mask=cols < touched, eviction_policy="evict_first")
        if PIECE > 0:
            p = tl.exp2((x_edge - top) * LOG2E) * factor
            dx = weight * tl.where(edge_cols == target, p - 1.0, p)
            tl.store(DX + edge_cols, tl.where(counted, dx, 0.0).to(DX.dtype.element_ty), mask=edge_cols < edge_end)


@triton.jit
def _scale_kernel(X, FACTOR, SIZE, BLOCK: tl.constexpr):
    """X *= FACTOR, without accessing X where the factor is 1: the host need not wait for the factor."""
    factor = tl.load(FACTOR)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, SIZE, step):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(X + offsets, mask=offsets < SIZE).to(tl.float32)
            tl.store(X + offsets, (x * factor).to(X.dtype.element_ty), mask=offsets < SIZE)


def _short(columns: int, warp: int) -> tuple[int, dict[str, int]]:
    """Rows a program, and constants, of the whole-row kernel: short rows share a program; about 16 elements a thread."""
    block = next_power_of_2(columns)
    per_program = max(1, min(256, 2048 // block))
    threads = min(MAX_THREADS, block * per_program // 16)
    return per_program, {"ROWS": per_program, "BLOCK": block, "num_warps": max(1, threads // warp)}


def _piece(itemsize: int, columns: int, padded: int, strides: tuple[int, int]) -> int:
    """PIECE of the long-row kernel. Not 0 if rows are not aligned to 16 bytes, but those of both tensors are offset alike."""
    piece = 16 // itemsize
    wide = all(size % 16 == 0 for size in (padded, *strides))
    alike = padded == columns and strides[0] % piece == strides[1] % piece
    return piece if alike and not wide else 0


@planned
def _rows_launch(
    device: Hardware, itemsize: int, rows: int, columns: int, padded: int, stride: int, stride_grad: int,
    ignore_index: int, gradient: bool, aligned: bool,
) -> Launch:  # fmt: skip
    if columns <= MAX_BLOCK:
        per_program, constants = _short(columns, device.warp_size)
        grid, kernel, sizes = cdiv(rows, per_program), _rows_kernel, (rows, columns)
    else:
        threads = rereading_threads(columns * itemsize) if gradient else 256
        piece = _piece(itemsize, columns, padded, (stride, stride_grad)) if aligned else 0
        constants = long_rows(device, itemsize, () if piece else (padded, stride, stride_grad), threads)
        constants["PIECE"] = piece
        grid, kernel, sizes = rows, _long_kernel, (columns,)
    return Launch(kernel, (grid,), (*sizes, padded, stride, stride_grad, ignore_index), GRADIENT=gradient, **constants)


def rows_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    losses: Tensor,
    row_weight: Tensor | None = None,
    grad_logits: Tensor | None = None,
    padded: int | None = None,
) -> None:
    """Writes the `losses` of rows and, where given, `grad_logits`, which may be `logits` itself.

    `logits` and `grad_logits` are rows of V, evenly spaced in memory where they are written. The other tensors are
    contiguous, with one number a row. The first `padded` columns of every row may be read and written: if `padded` is a
    multiple of 16 and V is not, accesses stay wide.
    """
    given = logits
    logits, rows, columns, stride = rows_and_stride(logits)
    stride_grad = stride if grad_logits is None or grad_logits is given else rows_and_stride(grad_logits)[3]
    aligned = (logits.data_ptr() | (0 if grad_logits is None else grad_logits.data_ptr())) % 16 == 0
    launch = _rows_launch(
        hardware(logits), logits.dtype.itemsize, rows, columns, padded or columns, stride, stride_grad, ignore_index,
        grad_logits is not None, aligned,
    )  # fmt: skip
    with on_device(logits):
        launch(logits, target, row_weight, losses, grad_logits)


@planned
def _scale_launch(device: Hardware, size: int) -> Launch:
    programs = min(cdiv(size, SCALE_BLOCK), 8 * device.multiprocessors)
    return Launch(_scale_kernel, (programs,), (size,), BLOCK=SCALE_BLOCK, num_warps=8)


def scale_(x: Tensor, factor: Tensor) -> None:
    """``x *= factor`` for a contiguous `x` and one number on its device; does nothing where the number is 1."""
    if x.numel():
        with on_device(x):
            _scale_launch(hardware(x), x.numel())(x, factor)
