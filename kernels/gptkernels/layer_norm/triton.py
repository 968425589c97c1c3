"""Layer normalisation in Triton: a row per program while it fits on chip (several when rows are short), a loop beyond.

All arithmetic is float32. Rows are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import FP_FUSION, multiprocessors, next_power_of_2, on_device, rows_and_stride

# The longest row that one program holds in registers: 16,384 float32 over 16 warps are 32 registers a thread.
MAX_BLOCK = 16384
# Columns that one program of the long-row kernels takes at a time.
LOOP_BLOCK = 4096


@triton.jit
def _forward_kernel(
    X, W, B, OUT, MEAN, RSTD, M, N, stride_x, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows: one read, one write."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
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
    tl.store(OUT + rows[:, None] * N + cols[None, :], out.to(OUT.dtype.element_ty), mask=mask)
    tl.store(MEAN + rows, mean, mask=rows < M)
    tl.store(RSTD + rows, rstd, mask=rows < M)


@triton.jit
def _forward_long_kernel(
    X, W, B, OUT, MEAN, RSTD, N, stride_x, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row longer than a block: statistics by Chan's pairwise update in one read, the result in a second."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    OUT += row * N
    mean = 0.0
    m2 = 0.0  # sum of squared deviations from the running mean
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + cols, mask=cols < N, other=0.0).to(tl.float32)
        count = tl.minimum(N - start, BLOCK).to(tl.float32)
        block_mean = tl.sum(x, axis=0) / count
        centred = tl.where(cols < N, x - block_mean, 0.0)
        delta = block_mean - mean
        share = count / (start + count)
        m2 += tl.sum(centred * centred, axis=0) + delta * delta * start * share
        mean += delta * share
    rstd = 1.0 / tl.sqrt(m2 / N + eps)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < N
        out = (tl.load(X + cols, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            out = out * tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            out = out + tl.load(B + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(OUT + cols, out.to(OUT.dtype.element_ty), mask=inside)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@triton.jit
def _backward_kernel(
    DY, X, W, MEAN, RSTD, DX, PARTIAL_DW, PARTIAL_DB, M, N, stride_dy, stride_x,
    HAS_WEIGHT: tl.constexpr, NEED_DW: tl.constexpr, NEED_DB: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A contiguous share of the rows: dx of each, and this program's sums of dw and db, kept in registers to the end."""
    program = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(0))
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for group in range(groups):
        rows = (program * groups + group) * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & inside[None, :]
        x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + rows, mask=rows < M, other=0.0)
        rstd = tl.load(RSTD + rows, mask=rows < M, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        wdy = weight[None, :] * dy
        c1 = tl.sum(xhat * wdy, axis=1) / N  # (ROWS,)
        c2 = tl.sum(wdy, axis=1) / N
        dx = (wdy - xhat * c1[:, None] - c2[:, None]) * rstd[:, None]
        tl.store(DX + rows[:, None] * N + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += tl.sum(dy * xhat, axis=0)
        if NEED_DB:
            db += tl.sum(dy, axis=0)
    if NEED_DW:
        tl.store(PARTIAL_DW + program * N + cols, dw, mask=inside)
    if NEED_DB:
        tl.store(PARTIAL_DB + program * N + cols, db, mask=inside)


@triton.jit
def _backward_long_kernel(
    DY, X, W, MEAN, RSTD, DX, N, stride_dy, stride_x, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx of one row longer than a block: both means in one read, dx in a second."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    DY += row * stride_dy
    DX += row * N
    mean = tl.load(MEAN + row)
    rstd = tl.load(RSTD + row)
    c1 = 0.0
    c2 = 0.0
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < N
        xhat = (tl.load(X + cols, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        wdy = tl.load(DY + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            wdy *= tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        c1 += tl.sum(xhat * wdy, axis=0)  # wdy is 0 beyond the row
        c2 += tl.sum(wdy, axis=0)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < N
        xhat = (tl.load(X + cols, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        wdy = tl.load(DY + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            wdy *= tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
        dx = (wdy - xhat * (c1 / N) - c2 / N) * rstd
        tl.store(DX + cols, dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def _partials_long_kernel(
    DY, X, MEAN, RSTD, PARTIAL_DW, PARTIAL_DB, M, N, stride_dy, stride_x,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw and db of long rows: program (i, j) sums the i-th share of the rows over the j-th block of columns."""
    program = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(0))
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < N
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for group in range(groups):
        rows = (program * groups + group) * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & inside[None, :]
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_DW:
            x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(MEAN + rows, mask=rows < M, other=0.0)
            rstd = tl.load(RSTD + rows, mask=rows < M, other=0.0)
            dw += tl.sum(dy * (x - mean[:, None]) * rstd[:, None], axis=0)
        if NEED_DB:
            db += tl.sum(dy, axis=0)
    if NEED_DW:
        tl.store(PARTIAL_DW + program * N + cols, dw, mask=inside)
    if NEED_DB:
        tl.store(PARTIAL_DB + program * N + cols, db, mask=inside)


@triton.jit
def _sum_partials_kernel(PARTIAL, OUT, P, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Column sums of PARTIAL (P, N) in a fixed order."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < N
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < P)[:, None] & inside[None, :]
        total += tl.load(PARTIAL + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(OUT + cols, tl.sum(total, axis=0), mask=inside)


def _rows_per_program(block: int, elements: int) -> int:
    """Short rows share a program: `elements` is what one program should read to keep its loads wide."""
    return max(1, min(32, elements // block))


def _warps(elements: int) -> int:
    """About 16 elements a thread, a power of two of 32-thread warps."""
    return max(1, min(16, elements // 512))


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, mean, rstd)``: out like x and contiguous, the statistics float32 of shape ``x.shape[:-1]``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, mean.zero_(), rstd.zero_()
    x, rows, columns, stride = rows_and_stride(x)
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    with on_device(x):
        if columns <= MAX_BLOCK:
            block = next_power_of_2(columns)
            per_program = _rows_per_program(block, 2048)
            _forward_kernel[(triton.cdiv(rows, per_program),)](
                x, weight, bias, out, mean, rstd, rows, columns, stride, eps,
                **flags, ROWS=per_program, BLOCK=block, num_warps=_warps(block * per_program), **FP_FUSION,
            )  # fmt: skip
        else:
            _forward_long_kernel[(rows,)](
                x, weight, bias, out, mean, rstd, columns, stride, eps,
                **flags, BLOCK=LOOP_BLOCK, num_warps=8, **FP_FUSION,
            )  # fmt: skip
    return out, mean, rstd


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
    columns = x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(columns if need_weight else 0, dtype=torch.float32, device=x.device)
    grad_bias = torch.empty(columns if need_bias else 0, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    x, rows, columns, stride_x = rows_and_stride(x)
    grad_out, _, _, stride_dy = rows_and_stride(grad_out)
    weight = weight if weight is None else weight.contiguous()
    needs = {"NEED_DW": need_weight, "NEED_DB": need_bias}
    short = columns <= MAX_BLOCK
    block = next_power_of_2(columns) if short else 1024
    per_program = _rows_per_program(block, 2048) if short else 4
    # Enough programs to fill the GPU, few enough that their partial sums cost little to write and add.
    programs = min(triton.cdiv(rows, per_program), (8 if block <= 2048 else 4) * multiprocessors(x))
    partial_weight = torch.empty((programs if need_weight else 0, columns), dtype=torch.float32, device=x.device)
    partial_bias = torch.empty((programs if need_bias else 0, columns), dtype=torch.float32, device=x.device)
    with on_device(x):
        if short:
            _backward_kernel[(programs,)](
                grad_out, x, weight, mean, rstd, grad_x, partial_weight, partial_bias,
                rows, columns, stride_dy, stride_x,
                HAS_WEIGHT=weight is not None, **needs,
                ROWS=per_program, BLOCK=block, num_warps=_warps(block * per_program), **FP_FUSION,
            )  # fmt: skip
        else:
            _backward_long_kernel[(rows,)](
                grad_out, x, weight, mean, rstd, grad_x, columns, stride_dy, stride_x,
                HAS_WEIGHT=weight is not None, BLOCK=LOOP_BLOCK, num_warps=8, **FP_FUSION,
            )  # fmt: skip
            if need_weight or need_bias:
                programs = min(programs, triton.cdiv(rows, 64))
                _partials_long_kernel[(programs, triton.cdiv(columns, block))](
                    grad_out, x, mean, rstd, partial_weight, partial_bias,
                    rows, columns, stride_dy, stride_x, **needs, ROWS=per_program, BLOCK=block, num_warps=8, **FP_FUSION,
                )  # fmt: skip
        for partial, total in ((partial_weight, grad_weight), (partial_bias, grad_bias)):
            if total.numel():
                _sum_partials_kernel[(triton.cdiv(columns, 64),)](
                    partial,
                    total,
                    programs,
                    columns,
                    ROWS=32,
                    BLOCK=64,
                    num_warps=4,
                    **FP_FUSION,
                )
    return grad_x, grad_weight, grad_bias
