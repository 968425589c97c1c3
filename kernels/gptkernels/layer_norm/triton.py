"""Layer normalisation in Triton, alone and after a residual sum: whole rows in registers while they fit, loops beyond.

All arithmetic is float32. Rows are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import (
    FP_FUSION,
    on_device,
    registers,
    rereading_threads,
    rows_and_stride,
    share_rows,
    sum_partials,
    team_rows,
    warp_size,
    whole_rows,
)

# The longest row that one program holds in registers: forward 32 float32 a thread; backward 16 of each of x, dy, weight,
# dw and db.
# Half of it where a 16-bit branch meets a float32 stream: their layouts differ, and a thread needs more.
FORWARD_BLOCK = 32768
BACKWARD_BLOCK = 8192
# What is read once is to leave the caches first, what is read again last.
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
        # The statistics are those of the sum that goes on: of the rounded one.
        summed = (x + residual.to(tl.float32)).to(SUMMED.dtype.element_ty)
        tl.store(SUMMED + offsets, summed, mask=mask)
        x = summed.to(tl.float32)
    mean = tl.sum(x, axis=1) / N  # (ROWS,)
    centred = tl.where(mask, x - mean[:, None], 0.0)
    # The mean's own rounding error is the mean of what it leaves: a second look, in registers, takes it out.
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
    """One row longer than a block: statistics by Chan's pairwise update in one read, the result in a second."""
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
        tl.debug_barrier()  # the sums below may be another thread's
        X = SUMMED
    # From the end: what was read last is what the caches still hold. The result is not to drive it out.
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
    """A share of the rows, every P-th group of ROWS: dx of each, and the sums of dw and db, in registers to the end."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(0))
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    if HAS_WEIGHT:
        weight = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    FOLD: tl.constexpr = min(BLOCK, 8)  # neighbours that a thread has for itself
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (program + step * programs) * ROWS + tl.arange(0, ROWS)
        row_inside = rows < M
        mask = row_inside[:, None] & inside[None, :]
        x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + rows, mask=row_inside, other=0.0)
        rstd = tl.load(RSTD + rows, mask=row_inside, other=0.0)
        xhat = (x - mean[:, None]) * rstd[:, None]  # beyond the row it only ever meets a dy of 0
        wdy = dy
        if HAS_WEIGHT:
            wdy = dy * weight[None, :]
        if NEED_DW:
            dw += dy * xhat
        if NEED_DB:
            db += dy
        # Both at once: a program's threads meet half as often.
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
    """A team's share of the rows, as many at a time as it has members: of these each member takes one row, for its dx, and
    then a block of columns, for its part of dw and db, which the team has just brought into cache."""
    member = tl.program_id(0)
    members = tl.num_programs(0)
    teams = tl.num_programs(1)
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    own = member * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    # Whoever reads x and dy last lets them go.
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
        # From the end: what was read last is what the first-level cache still holds.
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
    """``(out, summed, mean, rstd)``: as `layer_norm_forward` of the sum, itself in residual's dtype and contiguous."""
    out, summed, mean, rstd = _forward(x, residual, weight, bias, eps)
    assert summed is not None
    return out, summed, mean, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, summed, mean.zero_(), rstd.zero_()
    x, rows, columns, stride = rows_and_stride(x)
    stride_residual = 0
    if residual is not None:
        residual, _, _, stride_residual = rows_and_stride(residual)
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    tensors = (x, residual, weight, bias, out, summed, mean, rstd)
    flags = {"HAS_RESIDUAL": residual is not None, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    mixed = residual is not None and residual.dtype != x.dtype
    with on_device(x):
        if columns <= FORWARD_BLOCK >> mixed:
            constants = whole_rows(x, columns, 16)
            _forward_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                *tensors, rows, columns, stride, stride_residual, eps, **flags, **constants, **FP_FUSION
            )
        else:
            threads = rereading_threads(columns * (x if residual is None else residual).element_size())
            constants = {"BLOCK": 16 * threads, "num_warps": threads // warp_size(x)} | registers(x, 1024)
            _forward_long_kernel[(rows,)](
                *tensors, columns, stride, stride_residual, eps, **flags, **constants, **FP_FUSION
            )
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
    """``(grad_residual, grad_x, grad_weight, grad_bias)``: grad_x empty where grad_residual serves, or not needed."""
    columns, device = summed.shape[-1], summed.device
    branch = need_x and grad_out.dtype != summed.dtype
    grad_residual = torch.empty(summed.shape, dtype=summed.dtype, device=device)
    grad_x = torch.empty(summed.shape if branch else (0,), dtype=grad_out.dtype, device=device)
    grad_weight = torch.empty(columns if need_weight else 0, dtype=torch.float32, device=device)
    grad_bias = torch.empty(columns if need_bias else 0, dtype=torch.float32, device=device)
    if summed.numel() == 0:
        return grad_residual, grad_x, grad_weight.zero_(), grad_bias.zero_()
    summed, rows, _, stride = rows_and_stride(summed)
    grad_out, _, _, stride_dy = rows_and_stride(grad_out)
    stride_dsummed = 0
    if grad_summed is not None:
        grad_summed, _, _, stride_dsummed = rows_and_stride(grad_summed)
    weight = weight if weight is None else weight.contiguous()
    tensors = (grad_out, grad_summed, summed, weight, mean, rstd, grad_residual, grad_x)
    sizes = (rows, columns, stride_dy, stride_dsummed, stride)
    flags = {"HAS_DSUMMED": grad_summed is not None, "HAS_DBRANCH": branch, "HAS_WEIGHT": weight is not None}
    flags |= {"NEED_DW": need_weight, "NEED_DB": need_bias}
    read = [t for t in (summed, grad_out, grad_summed) if t is not None]
    if columns <= BACKWARD_BLOCK >> (grad_out.dtype != summed.dtype):
        kernel = _backward_kernel
        itemsize = max(summed.element_size(), grad_out.element_size())
        grid, constants = share_rows(whole_rows(summed, columns, 32 // itemsize, warps=8), rows, columns, read)
        parts = grid[0]
    else:
        kernel = _backward_long_kernel
        grid, constants = team_rows(rows, columns, [summed, grad_out], [stride, stride_dy])
        parts = grid[1]
    partial = torch.empty((need_weight + need_bias, parts, columns), dtype=torch.float32, device=device)
    with on_device(summed):
        kernel[grid](*tensors, partial[:1], partial[-1:], *sizes, **flags, **constants, **FP_FUSION)
        sum_partials(partial, [total for total in (grad_weight, grad_bias) if total.numel()])
    return grad_residual, grad_x, grad_weight, grad_bias
