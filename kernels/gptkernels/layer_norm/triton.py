"""Layer normalisation in Triton, alone or after a residual sum: rows that fit stay in registers, longer ones are read again.

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

# The longest row that one program holds in registers: forward 32 float32 a thread; backward 16 of x, dy, weight, dw and db
# each.
# Half of that where a 16-bit branch is added to a float32 stream: their layouts differ, and a thread needs more registers.
FORWARD_BLOCK = 32768
BACKWARD_BLOCK = 8192
# Eviction policies: data that is read once leaves the caches first, data that is read again leaves them last.
ONCE, AGAIN = tl.constexpr("evict_first"), tl.constexpr("evict_last")


@triton.jit
def _forward_kernel(
    X, RESIDUAL, W, B, OUT, SUMMED, MEAN, RSTD, M, N, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    mean = tl.sum(x, axis=1) / N  # (ROWS,)
    centred = tl.where(mask, x - mean[:, None], 0.0)
    # The mean of the deviations is the mean's rounding error: correct it, in registers.
    rest = tl.sum(centred, axis=1) / N
    mean += rest
    centred = tl.where(mask, centred - rest[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / N + eps)
    out = centred * rstd[:, None]
    if HAS_WEIGHT:
        out = out * tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out = out + tl.load(B + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + offsets, out.to(OUT.dtype.element_ty), mask=mask)
    tl.store(MEAN + rows, mean, mask=rows < M)
    tl.store(RSTD + rows, rstd, mask=rows < M)


@triton.jit
def _forward_long_kernel(
    X, RESIDUAL, W, B, OUT, SUMMED, MEAN, RSTD, N, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row longer than a block: one read for the statistics, by Chan's pairwise update, a second one for the result."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    OUT += row * N
    if HAS_RESIDUAL:
        RESIDUAL += row * stride_residual
        SUMMED += row * N
    mean = 0.0
    m2 = 0.0  # sum of squared deviations from the running mean
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < N
        x = tl.load(X + cols, mask=inside, other=0.0, eviction_policy=ONCE if HAS_RESIDUAL else AGAIN).to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(RESIDUAL + cols, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
            summed = (x + residual).to(SUMMED.dtype.element_ty)
            tl.store(SUMMED + cols, summed, mask=inside, eviction_policy=AGAIN)
            x = summed.to(tl.float32)
        count = tl.minimum(N - start, BLOCK).to(tl.float32)
        block_mean = tl.sum(x, axis=0) / count
        centred = tl.where(inside, x - block_mean, 0.0)
        delta = block_mean - mean
        share = count / (start + count)
        m2 += tl.sum(centred * centred, axis=0) + delta * delta * start * share
        mean += delta * share
    rstd = 1.0 / tl.sqrt(m2 / N + eps)
    if HAS_RESIDUAL:
        tl.debug_barrier()  # the sums read below may be written by another thread
        X = SUMMED
    # From the row's end, which the caches still hold. The result must not evict it.
    blocks = tl.cdiv(N, BLOCK)
    for block in range(blocks):
        cols = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < N
        x = tl.load(X + cols, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
        out = (x - mean) * rstd
        if HAS_WEIGHT:
            out = out * tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            out = out + tl.load(B + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + cols, out.to(OUT.dtype.element_ty), mask=inside, eviction_policy=ONCE)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@triton.jit
def _backward_kernel(
    DY, DSUMMED, X, W, MEAN, RSTD, DX, DBRANCH, PARTIAL_DW, PARTIAL_DB,
    M, N, stride_dy, stride_dsummed, stride_x,
    HAS_DSUMMED: tl.constexpr, HAS_DBRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of every P-th group of ROWS rows, and their sums of dw and db, kept in registers."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(0))
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    if HAS_WEIGHT:
        weight = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    FOLD: tl.constexpr = min(BLOCK, 8)  # neighbours that belong to one thread
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (program + step * programs) * ROWS + tl.arange(0, ROWS)
        row_inside = rows < M
        mask = row_inside[:, None] & inside[None, :]
        x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + rows, mask=row_inside, other=0.0)
        rstd = tl.load(RSTD + rows, mask=row_inside, other=0.0)
        xhat = (x - mean[:, None]) * rstd[:, None]  # beyond the row it is multiplied by a dy of 0
        wdy = dy
        if HAS_WEIGHT:
            wdy = dy * weight[None, :]
        if NEED_DW:
            dw += dy * xhat
        if NEED_DB:
            db += dy
        # Reduce both at once: a program's threads synchronise half as often.
        c1 = tl.sum(tl.reshape(xhat * wdy, (ROWS, BLOCK // FOLD, FOLD)), axis=2)
        c2 = tl.sum(tl.reshape(wdy, (ROWS, BLOCK // FOLD, FOLD)), axis=2)
        c1, c2 = tl.split(tl.sum(tl.join(c1, c2), axis=1) / N)  # (ROWS,) each
        dx = (wdy - xhat * c1[:, None] - c2[:, None]) * rstd[:, None]
        if HAS_DSUMMED:
            dsummed = tl.load(DSUMMED + rows[:, None] * stride_dsummed + cols[None, :], mask=mask, other=0.0)
            dx += dsummed.to(tl.float32)
        offsets = rows[:, None] * N + cols[None, :]
        tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
        if HAS_DBRANCH:
            tl.store(DBRANCH + offsets, dx.to(DBRANCH.dtype.element_ty), mask=mask)
    if NEED_DW:
        tl.store(PARTIAL_DW + program * N + cols, tl.sum(dw, axis=0), mask=inside)
    if NEED_DB:
        tl.store(PARTIAL_DB + program * N + cols, tl.sum(db, axis=0), mask=inside)


@triton.jit
def _backward_long_kernel(
    DY, DSUMMED, X, W, MEAN, RSTD, DX, DBRANCH, PARTIAL_DW, PARTIAL_DB,
    M, N, stride_dy, stride_dsummed, stride_x,
    HAS_DSUMMED: tl.constexpr, HAS_DBRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A team's share of the rows, as many at a time as the team has members.

    Each member computes dx of one of these rows, and then the sums of dw and db of its block of columns over all of them,
    which the team has just read into cache.
    """
    member = tl.program_id(0)
    members = tl.num_programs(0)
    teams = tl.num_programs(1)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    own = member * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    # The last read of x and dy lets the caches evict them.
    SECOND: tl.constexpr = AGAIN if NEED_DW or NEED_DB else ONCE
    for step in range(tl.cdiv(tl.cdiv(M, members), teams)):
        first = (tl.program_id(1) + step * teams).to(tl.int64) * members
        row = first + member
        read = tl.where(row < M, N, 0)
        mean = tl.load(MEAN + row, mask=row < M, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < M, other=0.0)
        sum_1 = tl.zeros((LANES,), tl.float32)
        sum_2 = tl.zeros((LANES,), tl.float32)
        for start in range(0, read, DEPTH * LANES):
            cols = start + tile
            inside = cols < read
            x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0, eviction_policy=AGAIN)
            wdy = tl.load(DY + row * stride_dy + cols, mask=inside, other=0.0, eviction_policy=AGAIN)
            wdy = wdy.to(tl.float32)
            if HAS_WEIGHT:
                wdy *= tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
            sum_1 += tl.sum((x.to(tl.float32) - mean) * wdy, axis=0)  # wdy is 0 beyond the row
            sum_2 += tl.sum(wdy, axis=0)
        slope = -tl.sum(sum_1, axis=0) / N * rstd * rstd * rstd
        shift = -tl.sum(sum_2, axis=0) / N * rstd
        # From the row's end, which the first-level cache still holds.
        blocks = tl.cdiv(read, DEPTH * LANES)
        for block in range(blocks):
            cols = (blocks - 1 - block) * (DEPTH * LANES) + tile
            inside = cols < read
            x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0, eviction_policy=SECOND)
            wdy = tl.load(DY + row * stride_dy + cols, mask=inside, other=0.0, eviction_policy=SECOND).to(tl.float32)
            if HAS_WEIGHT:
                wdy *= tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
            dx = wdy * rstd + ((x.to(tl.float32) - mean) * slope + shift)
            if HAS_DSUMMED:
                dsummed = DSUMMED + row * stride_dsummed + cols
                dx += tl.load(dsummed, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
            offsets = row * N + cols
            tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=inside, eviction_policy=ONCE)
            if HAS_DBRANCH:
                branch = dx.to(DBRANCH.dtype.element_ty)
                tl.store(DBRANCH + offsets, branch, mask=inside, eviction_policy=ONCE)
        if NEED_DW or NEED_DB:
            for start in range(0, members, ROWS):
                index = start + tl.arange(0, ROWS)
                rows = first + index
                row_inside = (index < members) & (rows < M)
                inside = row_inside[:, None] & (own < N)[None, :]
                dy = DY + rows[:, None] * stride_dy + own[None, :]
                dy = tl.load(dy, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
                if NEED_DW:
                    x = X + rows[:, None] * stride_x + own[None, :]
                    x = tl.load(x, mask=inside, other=0.0, eviction_policy=ONCE).to(tl.float32)
                    mean_ = tl.load(MEAN + rows, mask=row_inside, other=0.0)
                    rstd_ = tl.load(RSTD + rows, mask=row_inside, other=0.0)
                    dw += dy * (x - mean_[:, None]) * rstd_[:, None]
                if NEED_DB:
                    db += dy
    partial = tl.program_id(1).to(tl.int64) * N + own
    if NEED_DW:
        tl.store(PARTIAL_DW + partial, tl.sum(dw, axis=0), mask=own < N)
    if NEED_DB:
        tl.store(PARTIAL_DB + partial, tl.sum(db, axis=0), mask=own < N)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, mean, rstd)``: out like x and contiguous, the statistics float32 of shape ``x.shape[:-1]``."""
    out, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return out, mean, rstd


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out, summed, mean, rstd)``: as `layer_norm_forward` of the sum, which is contiguous and has residual's dtype."""
    out, summed, mean, rstd = _forward(x, residual, weight, bias, eps)
    assert summed is not None
    return out, summed, mean, rstd


@planned
def _forward_launch(
    device: Hardware, itemsize: int, rows: int, columns: int, stride: int, stride_residual: int, eps: float,
    has_residual: bool, has_weight: bool, has_bias: bool, mixed: bool,
) -> Launch:  # fmt: skip
    """`itemsize`: bytes of an element that is normalised; `mixed`: residual stream and branch differ in dtype."""
    flags = {"HAS_RESIDUAL": has_residual, "HAS_WEIGHT": has_weight, "HAS_BIAS": has_bias}
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
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    out = contiguous_like(x)
    summed = None if residual is None else contiguous_like(residual)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, summed, mean.zero_(), rstd.zero_()
    x, rows, columns, stride = rows_and_stride(x)
    stride_residual = 0
    if residual is not None:
        residual, _, _, stride_residual = rows_and_stride(residual)
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    mixed = residual is not None and residual.dtype != x.dtype
    launch = _forward_launch(
        hardware(x), (x if residual is None else residual).itemsize, rows, columns, stride, stride_residual, eps,
        residual is not None, weight is not None, bias is not None, mixed
    )  # fmt: skip
    with on_device(x):
        launch(x, residual, weight, bias, out, summed, mean, rstd)
    return out, summed, mean, rstd


def layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_x, grad_weight, grad_bias)``: the last two float32 of shape ``(N,)``, or empty where not needed."""
    grad_x, _, grad_weight, grad_bias = add_layer_norm_backward(
        grad_out, None, x, weight, mean, rstd, need_weight, need_bias, False
    )
    return grad_x, grad_weight, grad_bias


@planned
def _backward_launch(
    device: Hardware, read: tuple[int, ...], rows: int, columns: int, stride_dy: int, stride_dsummed: int, stride: int,
    mixed: bool, branch: bool, has_weight: bool, need_weight: bool, need_bias: bool,
) -> tuple[Launch, int]:  # fmt: skip
    """The launch, and how many partial sums of each column it makes.

    `read`: bytes an element of the sum, of dy, and of dsummed if there is one.
    """
    flags = {"HAS_DSUMMED": len(read) == 3, "HAS_DBRANCH": branch, "HAS_WEIGHT": has_weight}
    flags |= {"NEED_DW": need_weight, "NEED_DB": need_bias}
    itemsize = max(read[:2])
    if columns <= BACKWARD_BLOCK >> mixed:
        tile = whole_rows(device, columns, 32 // itemsize, warps=8)
        grid, constants = share_rows(device, tile, rows, columns, read)
        kernel, parts = _backward_kernel, grid[0]
    else:
        grid, constants = team_rows(device, rows, columns, itemsize, (stride, stride_dy))
        kernel, parts = _backward_long_kernel, grid[1]
    return Launch(kernel, grid, (rows, columns, stride_dy, stride_dsummed, stride), **flags, **constants), parts


def add_layer_norm_backward(
    grad_out: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(grad_residual, grad_x, grad_weight, grad_bias)``: grad_x is empty where not needed, or equal to grad_residual."""
    columns, mixed = summed.shape[-1], grad_out.dtype != summed.dtype
    branch = need_x and mixed
    grad_residual = contiguous_like(summed)
    grad_x = contiguous_like(grad_out) if branch else grad_out.new_empty(0)
    grad_weight = summed.new_empty(columns if need_weight else 0, dtype=torch.float32)
    grad_bias = summed.new_empty(columns if need_bias else 0, dtype=torch.float32)
    if summed.numel() == 0:
        return grad_residual, grad_x, grad_weight.zero_(), grad_bias.zero_()
    summed, rows, _, stride = rows_and_stride(summed)
    grad_out, _, _, stride_dy = rows_and_stride(grad_out)
    stride_dsummed = 0
    if grad_summed is not None:
        grad_summed, _, _, stride_dsummed = rows_and_stride(grad_summed)
    weight = weight if weight is None else weight.contiguous()
    read = tuple(t.element_size() for t in (summed, grad_out, grad_summed) if t is not None)
    launch, parts = _backward_launch(
        hardware(summed), read, rows, columns, stride_dy, stride_dsummed, stride,
        mixed, branch, weight is not None, need_weight, need_bias,
    )  # fmt: skip
    partial = summed.new_empty((need_weight + need_bias, parts, columns), dtype=torch.float32)
    partial_bias = partial[1] if need_weight and need_bias else partial
    with on_device(summed):
        launch(
            grad_out, grad_summed, summed, weight, mean, rstd, grad_residual, grad_x, partial, partial_bias
        )  # fmt: skip
        sum_partials(partial, [total for total in (grad_weight, grad_bias) if total.numel()])
    return grad_residual, grad_x, grad_weight, grad_bias
