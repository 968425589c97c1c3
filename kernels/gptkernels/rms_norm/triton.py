"""RMS normalisation in Triton, alone and after a residual sum: whole rows in registers while they fit, loops beyond.

All arithmetic is float32. Rows are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import (
    FP_FUSION,
    Hardware,
    Launch,
    cdiv,
    contiguous_like,
    hardware,
    on_device,
    planned,
    row_tile,
    rows_and_stride,
    share_rows,
    sum_partials,
    whole_rows,
)

# The longest row that one program holds in registers: forward 32 float32 a thread; backward 16 of each of x, dy, weight
# and dw.
# Half of it where a 16-bit branch meets a float32 stream: their layouts differ, and a thread needs more.
FORWARD_BLOCK = 32768
BACKWARD_BLOCK = 8192
# Columns that one program of the long-row kernels takes at a time.
LOOP_BLOCK = 4096


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
        # The mean square is that of the sum that goes on: of the rounded one.
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
    """One row longer than a block: the mean square in one read, the result in a second."""
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
        x = tl.load(X + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(RESIDUAL + cols, mask=inside, other=0.0).to(tl.float32)
            summed = (x + residual).to(SUMMED.dtype.element_ty)
            tl.store(SUMMED + cols, summed, mask=inside)
            x = summed.to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / N + eps)
    if HAS_RESIDUAL:
        tl.debug_barrier()  # the sums below may be another thread's
        X = SUMMED
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < N
        out = tl.load(X + cols, mask=inside, other=0.0).to(tl.float32) * rstd
        if HAS_WEIGHT:
            out = out * tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + cols, out.to(OUT.dtype.element_ty), mask=inside)
    tl.store(RSTD + row, rstd)


@triton.jit
def _backward_kernel(
    DY, DSUMMED, X, W, RSTD, C1, DX, DBRANCH, PARTIAL_DW, M, N, stride_dy, stride_dsummed, stride_x,
    HAS_DSUMMED: tl.constexpr, HAS_DBRANCH: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEED_DW: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A share of the rows, every P-th group of ROWS: dx of each, and the sums of dw, in registers to the end.

    WHOLE: BLOCK holds a row. Otherwise program (i, j) has the j-th block of columns, and c1 is read.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(0))
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
        if WHOLE:
            c1 = tl.sum(xhat * wdy, axis=1) / N  # (ROWS,)
        else:
            c1 = tl.load(C1 + rows, mask=row_inside, other=0.0)
        dx = (wdy - xhat * c1[:, None]) * rstd[:, None]
        if HAS_DSUMMED:
            dsummed = tl.load(DSUMMED + rows[:, None] * stride_dsummed + cols[None, :], mask=mask, other=0.0)
            dx += dsummed.to(tl.float32)
        offsets = rows[:, None] * N + cols[None, :]
        tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
        if HAS_DBRANCH:
            tl.store(DBRANCH + offsets, dx.to(DBRANCH.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += dy * xhat
    if NEED_DW:
        tl.store(PARTIAL_DW + program * N + cols, tl.sum(dw, axis=0), mask=inside)


@triton.jit
def _backward_means_kernel(
    DY, X, W, RSTD, C1, N, stride_dy, stride_x, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """c1 of one row longer than a block."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    DY += row * stride_dy
    c1 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < N
        wdy = tl.load(DY + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            wdy *= tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        c1 += tl.load(X + cols, mask=inside, other=0.0).to(tl.float32) * tl.load(RSTD + row) * wdy
    tl.store(C1 + row, tl.sum(c1, axis=0) / N)


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``(out, rstd)``: out like x and contiguous, rstd float32 of shape ``x.shape[:-1]``."""
    out, _, rstd = _forward(x, None, weight, eps)
    return out, rstd


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, summed, rstd)``: as `rms_norm_forward` of the sum, itself in residual's dtype and contiguous."""
    out, summed, rstd = _forward(x, residual, weight, eps)
    assert summed is not None
    return out, summed, rstd


@planned
def _forward_launch(
    device: Hardware, rows: int, columns: int, stride: int, stride_residual: int, eps: float,
    has_residual: bool, has_weight: bool, mixed: bool,
) -> Launch:  # fmt: skip
    """`mixed`: the residual stream's dtype is not the branch's."""
    flags = {"HAS_RESIDUAL": has_residual, "HAS_WEIGHT": has_weight}
    strides = (stride, stride_residual, eps)
    if columns > FORWARD_BLOCK >> mixed:
        return Launch(_forward_long_kernel, (rows,), (columns, *strides), **flags, BLOCK=LOOP_BLOCK, num_warps=8)
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
        hardware(x), rows, columns, stride, stride_residual, eps, residual is not None, weight is not None, mixed
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


def add_rms_norm_backward(
    grad_out: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    need_weight: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_residual, grad_x, grad_weight)``: grad_x empty where grad_residual serves, or not needed."""
    columns, device = summed.shape[-1], summed.device
    branch = need_x and grad_out.dtype != summed.dtype
    grad_residual = torch.empty(summed.shape, dtype=summed.dtype, device=device)
    grad_x = torch.empty(summed.shape if branch else (0,), dtype=grad_out.dtype, device=device)
    grad_weight = torch.empty(columns if need_weight else 0, dtype=torch.float32, device=device)
    if summed.numel() == 0:
        return grad_residual, grad_x, grad_weight.zero_()
    summed, rows, _, stride = rows_and_stride(summed)
    grad_out, _, _, stride_dy = rows_and_stride(grad_out)
    stride_dsummed = 0
    if grad_summed is not None:
        grad_summed, _, _, stride_dsummed = rows_and_stride(grad_summed)
    weight = weight if weight is None else weight.contiguous()
    whole = columns <= BACKWARD_BLOCK >> (grad_out.dtype != summed.dtype)
    tile = whole_rows(hardware(summed), columns, 8) if whole else row_tile(rows, columns)
    read = [t.element_size() for t in (summed, grad_out, grad_summed) if t is not None]
    grid, constants = share_rows(hardware(summed), tile, rows, columns, read)
    c1 = torch.empty(0 if whole else rows, dtype=torch.float32, device=device)
    partial = torch.empty((int(need_weight), grid[0], columns), dtype=torch.float32, device=device)
    with on_device(summed):
        if not whole:
            _backward_means_kernel[(rows,)](
                grad_out, summed, weight, rstd, c1, columns, stride_dy, stride,
                HAS_WEIGHT=weight is not None, BLOCK=LOOP_BLOCK, num_warps=8, **FP_FUSION,
            )  # fmt: skip
        _backward_kernel[grid](
            grad_out, grad_summed, summed, weight, rstd, c1, grad_residual, grad_x, partial,
            rows, columns, stride_dy, stride_dsummed, stride,
            HAS_DSUMMED=grad_summed is not None, HAS_DBRANCH=branch, HAS_WEIGHT=weight is not None,
            NEED_DW=need_weight, WHOLE=whole, **constants, **FP_FUSION,
        )  # fmt: skip
        sum_partials(partial, [grad_weight] if need_weight else [])
    return grad_residual, grad_x, grad_weight
