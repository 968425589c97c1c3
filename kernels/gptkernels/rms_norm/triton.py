"""RMS normalisation in Triton, alone or after a residual sum: rows that fit stay in registers, longer ones are read again.

All arithmetic is float32. Rows are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import (
    Hardware,
    Launch,
    cdiv,
    contiguous_like,
    hardware,
    on_device,
    planned,
    registers,
    rereading_threads,
    rows_and_stride,
    share_rows,
    sum_partials,
    team_rows,
    whole_rows,
)

# The longest row that one program holds in registers: forward 32 float32 a thread; backward 16 of x, dy, weight and dw each.
# Half of that where a 16-bit branch is added to a float32 stream: their layouts differ, and a thread needs more registers.
FORWARD_BLOCK = 32768
BACKWARD_BLOCK = 8192
# Eviction policies: data that is read once leaves the caches first, data that is read again leaves them last.
ONCE, AGAIN = tl.constexpr("evict_first"), tl.constexpr("evict_last")


@triton.jit
def _forward_kernel(
    X, RESIDUAL, W, OUT, SUMMED, RSTD, M, N, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: one read, one write."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(RESIDUAL + rows[:, None] * stride_residual + cols[None, :], mask=mask, other=0.0)
        # The rounded sum is what the stream holds: normalise that.
        summed = (x + residual.to(tl.float32)).to(SUMMED.dtype.element_ty)
        tl.store(SUMMED + offsets, summed, mask=mask)
        x = summed.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / N + eps)  # (ROWS,)
    out = x * rstd[:, None]
    if HAS_WEIGHT:
        out = out * tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + offsets, out.to(OUT.dtype.element_ty), mask=mask)
    tl.store(RSTD + rows, rstd, mask=rows < M)


@triton.jit
def _forward_long_kernel(
    X, RESIDUAL, W, OUT, SUMMED, RSTD, N, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row longer than a block: one read for the mean square, a second one for the result."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    OUT += row * N
    if HAS_RESIDUAL:
        RESIDUAL += row * stride_residual
        SUMMED += row * N
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < N
        x = tl.load(X + cols, mask=inside, other=0.0, eviction_policy=ONCE if HAS_RESIDUAL else AGAIN).to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(RESIDUAL + cols, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
            summed = (x + residual).to(SUMMED.dtype.element_ty)
            tl.store(SUMMED + cols, summed, mask=inside, eviction_policy=AGAIN)
            x = summed.to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / N + eps)
    if HAS_RESIDUAL:
        tl.debug_barrier()  # the sums read below may be written by another thread
        X = SUMMED
    # From the row's end, which the caches still hold. The result must not evict it.
    blocks = tl.cdiv(N, BLOCK)
    for block in range(blocks):
        cols = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < N
        out = tl.load(X + cols, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32) * rstd
        if HAS_WEIGHT:
            out = out * tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + cols, out.to(OUT.dtype.element_ty), mask=inside, eviction_policy=ONCE)
    tl.store(RSTD + row, rstd)


@triton.jit
def _backward_kernel(
    DY, DSUMMED, X, W, RSTD, DX, DBRANCH, PARTIAL_DW, M, N, stride_dy, stride_dsummed, stride_x,
    HAS_DSUMMED: tl.constexpr, HAS_DBRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEED_DW: tl.constexpr,
    STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of every P-th group of ROWS rows, and their sums of dw, kept in registers."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(0))
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    if HAS_WEIGHT:
        weight = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (program + step * programs) * ROWS + tl.arange(0, ROWS)
        row_inside = rows < M
        mask = row_inside[:, None] & inside[None, :]
        x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + rows, mask=row_inside, other=0.0)
        xhat = x * rstd[:, None]
        wdy = dy
        if HAS_WEIGHT:
            wdy = dy * weight[None, :]
        if NEED_DW:
            dw += dy * xhat
        c1 = tl.sum(xhat * wdy, axis=1) / N  # (ROWS,)
        dx = (wdy - xhat * c1[:, None]) * rstd[:, None]
        if HAS_DSUMMED:
            dsummed = tl.load(DSUMMED + rows[:, None] * stride_dsummed + cols[None, :], mask=mask, other=0.0)
            dx += dsummed.to(tl.float32)
        offsets = rows[:, None] * N + cols[None, :]
        tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
        if HAS_DBRANCH:
            tl.store(DBRANCH + offsets, dx.to(DBRANCH.dtype.element_ty), mask=mask)
    if NEED_DW:
        tl.store(PARTIAL_DW + program * N + cols, tl.sum(dw, axis=0), mask=inside)


@triton.jit
def _backward_long_kernel(
    DY, DSUMMED, X, W, RSTD, DX, DBRANCH, PARTIAL_DW, M, N, stride_dy, stride_dsummed, stride_x,
    HAS_DSUMMED: tl.constexpr, HAS_DBRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEED_DW: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A team's share of the rows, as many at a time as the team has members.

    Each member computes dx of one of these rows, and then the sums of dw of its block of columns over all of them, which
    the team has just read into cache.
    """
    member = tl.program_id(0)
    members = tl.num_programs(0)
    teams = tl.num_programs(1)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    own = member * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    # The last read of x and dy lets the caches evict them.
    SECOND: tl.constexpr = AGAIN if NEED_DW else ONCE
    for step in range(tl.cdiv(tl.cdiv(M, members), teams)):
        first = (tl.program_id(1) + step * teams).to(tl.int64) * members
        row = first + member
        read = tl.where(row < M, N, 0)
        rstd = tl.load(RSTD + row, mask=row < M, other=0.0)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, read, DEPTH * LANES):
            cols = start + tile
            inside = cols < read
            x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0, eviction_policy=AGAIN)
            wdy = tl.load(DY + row * stride_dy + cols, mask=inside, other=0.0, eviction_policy=AGAIN)
            wdy = wdy.to(tl.float32)
            if HAS_WEIGHT:
                wdy *= tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(x.to(tl.float32) * wdy, axis=0)
        slope = -tl.sum(total, axis=0) / N * rstd * rstd * rstd
        # From the row's end, which the first-level cache still holds.
        blocks = tl.cdiv(read, DEPTH * LANES)
        for block in range(blocks):
            cols = (blocks - 1 - block) * (DEPTH * LANES) + tile
            inside = cols < read
            x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0, eviction_policy=SECOND)
            wdy = tl.load(DY + row * stride_dy + cols, mask=inside, other=0.0, eviction_policy=SECOND).to(tl.float32)
            if HAS_WEIGHT:
                wdy *= tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
            dx = wdy * rstd + x.to(tl.float32) * slope
            if HAS_DSUMMED:
                dsummed = DSUMMED + row * stride_dsummed + cols
                dx += tl.load(dsummed, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
            offsets = row * N + cols
            tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=inside, eviction_policy=ONCE)
            if HAS_DBRANCH:
                branch = dx.to(DBRANCH.dtype.element_ty)
                tl.store(DBRANCH + offsets, branch, mask=inside, eviction_policy=ONCE)
        if NEED_DW:
            for start in range(0, members, ROWS):
                index = start + tl.arange(0, ROWS)
                rows = first + index
                row_inside = (index < members) & (rows < M)
                inside = row_inside[:, None] & (own < N)[None, :]
                dy = DY + rows[:, None] * stride_dy + own[None, :]
                dy = tl.load(dy, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
                x = X + rows[:, None] * stride_x + own[None, :]
                x = tl.load(x, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
                dw += dy * (x * tl.load(RSTD + rows, mask=row_inside, other=0.0)[:, None])
    if NEED_DW:
        tl.store(PARTIAL_DW + tl.program_id(1).to(tl.int64) * N + own, tl.sum(dw, axis=0), mask=own < N)


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``(out, rstd)``: out like x and contiguous, rstd float32 of shape ``x.shape[:-1]``."""
    out, _, rstd = _forward(x, None, weight, eps)
    return out, rstd


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, summed, rstd)``: as `rms_norm_forward` of the sum, which is contiguous and has residual's dtype."""
    out, summed, rstd = _forward(x, residual, weight, eps)
    assert summed is not None
    return out, summed, rstd


@planned
def _forward_launch(
    device: Hardware, itemsize: int, rows: int, columns: int, stride: int, stride_residual: int, eps: float,
    has_residual: bool, has_weight: bool, mixed: bool,
) -> Launch:  # fmt: skip
    """`itemsize`: bytes of an element that is normalised; `mixed`: residual stream and branch differ in dtype."""
    flags = {"HAS_RESIDUAL": has_residual, "HAS_WEIGHT": has_weight}
    strides = (stride, stride_residual, eps)
    if columns > FORWARD_BLOCK >> mixed:
        threads = rereading_threads(columns * itemsize)
        constants = {"BLOCK": 16 * threads, "num_warps": threads // device.warp_size} | registers(device, 1024)
        return Launch(_forward_long_kernel, (rows,), (columns, *strides), **flags, **constants)
    constants = whole_rows(device, columns, 16)
    return Launch(
        _forward_kernel, (cdiv(rows, constants["ROWS"]),), (rows, columns, *strides), **flags, **constants
    )  # fmt: skip


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    out = contiguous_like(x)
    summed = None if residual is None else contiguous_like(residual)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() == 0:
        return out, summed, rstd.zero_()
    x, rows, columns, stride = rows_and_stride(x)
    stride_residual = 0
    if residual is not None:
        residual, _, _, stride_residual = rows_and_stride(residual)
    weight = weight if weight is None else weight.contiguous()
    mixed = residual is not None and residual.dtype != x.dtype
    launch = _forward_launch(
        hardware(x), (x if residual is None else residual).itemsize, rows, columns, stride, stride_residual, eps,
        residual is not None, weight is not None, mixed
    )  # fmt: skip
    with on_device(x):
        launch(x, residual, weight, out, summed, rstd)
    return out, summed, rstd


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_weight)``: the last float32 of shape ``(N,)``, or empty where not needed."""
    grad_x, _, grad_weight = add_rms_norm_backward(grad_out, None, x, weight, rstd, need_weight, False)
    return grad_x, grad_weight


@planned
def _backward_launch(
    device: Hardware, read: tuple[int, ...], rows: int, columns: int, stride_dy: int, stride_dsummed: int, stride: int,
    mixed: bool, branch: bool, has_weight: bool, need_weight: bool,
) -> tuple[Launch, int]:  # fmt: skip
    """The launch, and how many partial sums of each column it makes.

    `read`: bytes an element of the sum, of dy, and of dsummed if there is one.
    """
    flags = {"HAS_DSUMMED": len(read) == 3, "HAS_DBRANCH": branch, "HAS_WEIGHT": has_weight}
    flags |= {"NEED_DW": need_weight}
    itemsize = max(read[:2])
    if columns <= BACKWARD_BLOCK >> mixed:
        tile = whole_rows(device, columns, 32 // itemsize, warps=8)
        grid, constants = share_rows(device, tile, rows, columns, read)
        kernel, parts = _backward_kernel, grid[0]
    else:
        grid, constants = team_rows(device, rows, columns, itemsize, (stride, stride_dy))
        kernel, parts = _backward_long_kernel, grid[1]
    return Launch(kernel, grid, (rows, columns, stride_dy, stride_dsummed, stride), **flags, **constants), parts


def add_rms_norm_backward(
    grad_out: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_weight: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_residual, grad_x, grad_weight)``: grad_x is empty where not needed, or equal to grad_residual."""
    columns, mixed = summed.shape[-1], grad_out.dtype != summed.dtype
    branch = need_x and mixed
    grad_residual = contiguous_like(summed)
    grad_x = contiguous_like(grad_out) if branch else grad_out.new_empty(0)
    grad_weight = summed.new_empty(columns if need_weight else 0, dtype=torch.float32)
    if summed.numel() == 0:
        return grad_residual, grad_x, grad_weight.zero_()
    summed, rows, _, stride = rows_and_stride(summed)
    grad_out, _, _, stride_dy = rows_and_stride(grad_out)
    stride_dsummed = 0
    if grad_summed is not None:
        grad_summed, _, _, stride_dsummed = rows_and_stride(grad_summed)
    weight = weight if weight is None else weight.contiguous()
    read = tuple(t.element_size() for t in (summed, grad_out, grad_summed) if t is not None)
    launch, parts = _backward_launch(
        hardware(summed), read, rows, columns, stride_dy, stride_dsummed, stride,
        mixed, branch, weight is not None, need_weight,
    )  # fmt: skip
    partial = summed.new_empty((int(need_weight), parts, columns), dtype=torch.float32)
    with on_device(summed):
        launch(
            grad_out, grad_summed, summed, weight, rstd, grad_residual, grad_x, partial
        )  # fmt: skip
        sum_partials(partial, [grad_weight] if need_weight else [])
    return grad_residual, grad_x, grad_weight
