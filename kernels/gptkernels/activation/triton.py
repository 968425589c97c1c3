"""GELU (with bias) and SwiGLU in Triton: one read and one write of each tensor.

A contiguous tensor without a bias is treated as one long row, so that every load is wide whatever its shape. All arithmetic is float32. Elements are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import math
from typing import Any

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
    next_power_of_2,
    on_device,
    planned,
    row_tile,
    rows_and_stride,
    share_rows,
    sum_partials,
)

# Elements of one program, 16 a thread.
TILE = 2048
# The logistic function's argument is z * (LINEAR + CUBIC * z^2), twice the argument of the tanh.
LINEAR = tl.constexpr(math.sqrt(8 / math.pi))
CUBIC = tl.constexpr(math.sqrt(8 / math.pi) * 0.044715)
CUBIC_SLOPE = tl.constexpr(math.sqrt(8 / math.pi) * 0.044715 * 3)
LINEAR_LOG2 = tl.constexpr(-math.log2(math.e) * math.sqrt(8 / math.pi))
CUBIC_LOG2 = tl.constexpr(-math.log2(math.e) * math.sqrt(8 / math.pi) * 0.044715)
HALF_LOG2 = tl.constexpr(-0.5 * math.log2(math.e))
DENSITY_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the standard normal, at 0
# The normal distribution's tail divided by exp(-z^2 / 2), as a polynomial in 1 / (1 + TAIL_SCALE |z|), fitted as MATH.md says.
TAIL_SCALE = tl.constexpr(0.278)
TAIL_1 = tl.constexpr(0.11713025967974411)
TAIL_2 = tl.constexpr(0.05675662422252564)
TAIL_3 = tl.constexpr(0.2964222935451365)
TAIL_4 = tl.constexpr(-0.2766224388705645)
TAIL_5 = tl.constexpr(0.41625785720180136)
TAIL_6 = tl.constexpr(-0.10994460294497274)


@triton.jit
def _logistic(v):
    """1 / (1 + exp(-v)) and its derivative, without overflow or cancellation at either end."""
    e = tl.exp(-tl.abs(v))
    s = 1.0 / (1.0 + e)
    return tl.where(v < 0, e * s, s), e * s * s


@triton.jit
def _normal(z):
    """The standard normal's distribution function and exp(-z^2 / 2), without cancellation; cheaper than erf and exp."""
    bell = tl.exp2(z * z * HALF_LOG2)
    t = 1.0 / (tl.abs(z) * TAIL_SCALE + 1.0)
    tail = bell * t * (((((t * TAIL_6 + TAIL_5) * t + TAIL_4) * t + TAIL_3) * t + TAIL_2) * t + TAIL_1)
    return tl.where(z < 0, tail, 1.0 - tail), bell


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        # z * logistic: where the exponential overflows, the quotient is 0, as it should be.
        return z / (1.0 + tl.exp2(z * (z * z * CUBIC_LOG2 + LINEAR_LOG2)))
    else:
        cdf, _ = _normal(z)
        return z * cdf


@triton.jit
def _gelu_slope(z, TANH: tl.constexpr):
    """d gelu / dz."""
    if TANH:
        square = tl.minimum(z * z, 1e4)  # for a large |z| the slope is 0, which must not be multiplied by inf
        cdf, slope = _logistic(z * (square * CUBIC + LINEAR))
        return cdf + z * slope * (square * CUBIC_SLOPE + LINEAR)
    else:
        cdf, bell = _normal(z)
        return cdf + z * bell * DENSITY_0


@triton.jit
def _tile(M, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile of (M, N): rows (ROWS, 1), cols (1, BLOCK), and the mask of what is inside."""
    blocks = tl.cdiv(N, BLOCK).to(tl.int32)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return rows[:, None], cols[None, :], (rows < M)[:, None] & (cols < N)[None, :]


@triton.jit
def _gelu_forward_kernel(
    X, B, Y, M, N, stride_x, HAS_BIAS: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows, cols, inside = _tile(M, N, ROWS, BLOCK)
    z = tl.load(X + rows * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(B + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(Y + rows * N + cols, _gelu(z, TANH).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward_kernel(
    DY, X, B, DX, M, N, stride_dy, stride_x,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, cols, inside = _tile(M, N, ROWS, BLOCK)
    z = tl.load(X + rows * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + rows * stride_dy + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(B + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(DX + rows * N + cols, (dy * _gelu_slope(z, TANH)).to(DX.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward_bias_kernel(
    DY, X, B, DX, PARTIAL_DB, M, N, stride_dy, stride_x,
    TANH: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a block of columns in every P-th group of ROWS rows, and their sums of db, kept in registers."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(M, ROWS), tl.num_programs(0))
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(B + cols, mask=cols < N, other=0.0).to(tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (program + step * programs) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        x = tl.load(X + rows[:, None] * stride_x + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + rows[:, None] * stride_dy + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        dx = dy * _gelu_slope(x + bias[None, :], TANH)
        tl.store(DX + rows[:, None] * N + cols[None, :], dx.to(DX.dtype.element_ty), mask=inside)
        db += dx
    tl.store(PARTIAL_DB + program * N + cols, tl.sum(db, axis=0), mask=cols < N)


@triton.jit
def _swiglu_forward_kernel(
    GATE, UP, Y, M, N, stride_gate, stride_up, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows, cols, inside = _tile(M, N, ROWS, BLOCK)
    gate = tl.load(GATE + rows * stride_gate + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + rows * stride_up + cols, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(Y + rows * N + cols, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    DY, GATE, UP, DGATE, DUP, M, N, stride_dy, stride_gate, stride_up, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows, cols, inside = _tile(M, N, ROWS, BLOCK)
    dy = tl.load(DY + rows * stride_dy + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + rows * stride_gate + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + rows * stride_up + cols, mask=inside, other=0.0).to(tl.float32)
    share, slope = _logistic(gate)
    tl.store(DUP + rows * N + cols, (dy * gate * share).to(DUP.dtype.element_ty), mask=inside)
    dgate = dy * up * (share + gate * slope)
    tl.store(DGATE + rows * N + cols, dgate.to(DGATE.dtype.element_ty), mask=inside)


def _as_rows(*tensors: Tensor, bias: Tensor | None = None) -> tuple[list[Tensor], tuple[int, ...]]:
    """``(tensors, (M, N, stride of each))``: one row of all elements if each is contiguous and there is no bias."""
    if bias is None and all(x.is_contiguous() for x in tensors):
        size = tensors[0].numel()
        return list(tensors), (1, size, *[size] * len(tensors))
    found, rows, columns, strides = zip(*map(rows_and_stride, tensors))
    return list(found), (rows[0], columns[0], *strides)


def _tiled(kernel: Any, sizes: tuple[int, ...], **flags: bool) -> Launch:
    """The launch of a kernel over tiles; `sizes` are M, N and strides."""
    rows, columns = sizes[:2]
    block = TILE if rows == 1 and not flags.get("HAS_BIAS") else min(256, next_power_of_2(columns))
    grid = (cdiv(rows, TILE // block) * cdiv(columns, block),)
    return Launch(kernel, grid, sizes, **flags, ROWS=TILE // block, BLOCK=block, num_warps=4)


@planned
def _gelu_forward_launch(sizes: tuple[int, ...], has_bias: bool, tanh: bool) -> Launch:
    return _tiled(_gelu_forward_kernel, sizes, HAS_BIAS=has_bias, TANH=tanh)


@planned
def _gelu_backward_launch(sizes: tuple[int, ...], has_bias: bool, tanh: bool) -> Launch:
    return _tiled(_gelu_backward_kernel, sizes, HAS_BIAS=has_bias, TANH=tanh)


@planned
def _gelu_backward_bias_launch(
    device: Hardware, itemsize: int, rows: int, columns: int, stride_dy: int, stride: int, tanh: bool
) -> tuple[Launch, tuple[int, int, int]]:
    """The launch, and the shape of the partial sums."""
    grid, constants = share_rows(device, row_tile(rows, columns), rows, columns, [itemsize, itemsize])
    launch = Launch(_gelu_backward_bias_kernel, grid, (rows, columns, stride_dy, stride), TANH=tanh, **constants)
    return launch, (1, grid[0], columns)


@planned
def _swiglu_forward_launch(sizes: tuple[int, ...]) -> Launch:
    return _tiled(_swiglu_forward_kernel, sizes)


@planned
def _swiglu_backward_launch(sizes: tuple[int, ...]) -> Launch:
    return _tiled(_swiglu_backward_kernel, sizes)


def gelu_forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """``gelu(x + bias)`` in x's dtype, contiguous."""
    out = contiguous_like(x)
    if x.numel() == 0:
        return out
    bias = bias if bias is None else bias.contiguous()
    (x,), sizes = _as_rows(x, bias=bias)
    with on_device(x):
        _gelu_forward_launch(sizes, bias is not None, tanh)(x, bias, out)
    return out


def gelu_backward(
    grad_out: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """``(grad_x, grad_bias)``: the last float32 of shape ``(N,)``, or empty where not needed."""
    grad_x = contiguous_like(x)
    grad_bias = torch.empty(x.shape[-1] if need_bias else 0, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return grad_x, grad_bias.zero_()
    bias = bias if bias is None else bias.contiguous()
    with on_device(x):
        if need_bias:
            x, rows, columns, stride = rows_and_stride(x)
            grad_out, _, _, stride_dy = rows_and_stride(grad_out)
            launch, partial_shape = _gelu_backward_bias_launch(
                hardware(x), x.dtype.itemsize, rows, columns, stride_dy, stride, tanh
            )
            partial = torch.empty(partial_shape, dtype=torch.float32, device=x.device)
            launch(grad_out, x, bias, grad_x, partial)
            sum_partials(partial, [grad_bias])
        else:
            (grad_out, x), sizes = _as_rows(grad_out, x, bias=bias)
            _gelu_backward_launch(sizes, bias is not None, tanh)(grad_out, x, bias, grad_x)
    return grad_x, grad_bias


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * logistic(gate) * up`` in their dtype, contiguous."""
    out = contiguous_like(gate)
    if gate.numel() == 0:
        return out
    (gate, up), sizes = _as_rows(gate, up)
    with on_device(gate):
        _swiglu_forward_launch(sizes)(gate, up, out)
    return out


def swiglu_backward(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``(grad_gate, grad_up)`` in their dtype, contiguous."""
    grad_gate = contiguous_like(gate)
    grad_up = torch.empty_like(grad_gate)
    if gate.numel() == 0:
        return grad_gate, grad_up
    (grad_out, gate, up), sizes = _as_rows(grad_out, gate, up)
    with on_device(gate):
        _swiglu_backward_launch(sizes)(grad_out, gate, up, grad_gate, grad_up)
    return grad_gate, grad_up
