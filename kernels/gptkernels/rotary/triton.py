"""Rotary position embedding in Triton: a program rotates some heads of a block of tokens by angles that it reads once.

All arithmetic is float32. Tokens are addressed in int64. The derivation and the traffic are in MATH.md.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from gptkernels._layout import empty_like_heads
from gptkernels._triton import Launch, cdiv, next_power_of_2, on_device, planned

# A program's elements of each head, and the most heads, which share the angles. A thread has 16 elements of each head, so
# that it has 128 bytes of 16-bit input in flight.
ELEMENTS = 2048
MAX_HEADS = 4


@triton.jit
def _rotate_kernel(
    X, COS, SIN, OUT, T, head_groups,
    stride_xb, stride_xh, stride_xt, stride_cb, stride_ct, stride_sb, stride_st, stride_ob, stride_oh, stride_ot,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotates PAIRS pairs of TOKENS tokens of HEADS heads, and copies the REST of the dimensions."""
    program = tl.program_id(0)
    group = program % head_groups  # neighbouring programs share a block of tokens, and so the tables
    block = program // head_groups
    blocks = tl.cdiv(T, TOKENS)
    batch = (block // blocks).to(tl.int64)
    heads = (group * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None, None]
    tokens = ((block % blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[None, :, None]
    pairs = tl.arange(0, BLOCK)[None, None, :]
    mask = (tokens < T) & (pairs < PAIRS)  # (1, TOKENS, BLOCK)
    cos = tl.load(COS + batch * stride_cb + tokens * stride_ct + pairs, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(SIN + batch * stride_sb + tokens * stride_st + pairs, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    X += batch * stride_xb + heads * stride_xh + tokens * stride_xt  # (HEADS, TOKENS, 1)
    OUT += batch * stride_ob + heads * stride_oh + tokens * stride_ot
    # Every read comes before the first write. Neither the compiler nor the GPU moves a read ahead of a write that may be to
    # the same memory: a read after a write would wait for it.
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, None, :]
        rest_mask = (tokens < T) & (rest < REST)
        unchanged = tl.load(X + 2 * PAIRS + rest, mask=rest_mask)
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)[None, None, :]
        both_mask = (tokens < T) & (both < 2 * PAIRS)
        ab = tl.load(X + both, mask=both_mask, other=0.0).to(tl.float32)  # (HEADS, TOKENS, 2 BLOCK)
        a, b = tl.split(tl.reshape(ab, (HEADS, TOKENS, BLOCK, 2)))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (HEADS, TOKENS, 2 * BLOCK))
        tl.store(OUT + both, turned.to(OUT.dtype.element_ty), mask=both_mask)
    else:
        a = tl.load(X + pairs, mask=mask, other=0.0).to(tl.float32)  # (HEADS, TOKENS, BLOCK)
        b = tl.load(X + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
        tl.store(OUT + pairs, (a * cos - b * sin).to(OUT.dtype.element_ty), mask=mask)
        tl.store(OUT + PAIRS + pairs, (b * cos + a * sin).to(OUT.dtype.element_ty), mask=mask)
    if REST > 0:
        tl.store(OUT + 2 * PAIRS + rest, unchanged, mask=rest_mask)


def _adjacent(x: Tensor) -> Tensor:
    """Returns `x` itself if its last dimension is adjacent in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@planned
def _launch(
    shape: tuple[int, ...], pairs: int, strides: tuple[int, ...], cos_strides: tuple[int, int],
    sin_strides: tuple[int, int], out_strides: tuple[int, ...], interleaved: bool, inverse: bool,
) -> Launch:  # fmt: skip
    batch, heads, tokens, head_dim = shape
    rest = head_dim - 2 * pairs
    block, block_rest = next_power_of_2(pairs), next_power_of_2(rest) if rest else 0
    row = next_power_of_2(2 * block + block_rest)
    per_program = min(next_power_of_2(tokens), max(1, ELEMENTS // row))
    together = math.gcd(heads, MAX_HEADS)
    head_groups = heads // together
    return Launch(
        _rotate_kernel, (batch * cdiv(tokens, per_program) * head_groups,),
        (tokens, head_groups, *strides[:3], *cos_strides, *sin_strides, *out_strides[:3]),
        PAIRS=pairs, REST=rest, INTERLEAVED=interleaved, INVERSE=inverse,
        HEADS=together, TOKENS=per_program, BLOCK=block, BLOCK_REST=block_rest,
        num_warps=max(1, min(16, per_program * row // 512)),
    )  # fmt: skip


def _table_strides(table: Tensor) -> tuple[int, int]:
    """The strides between sequences (0 if all share the table) and between tokens."""
    strides = table.stride()
    return strides[0] if len(strides) == 3 and table.shape[0] > 1 else 0, strides[-2]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    out = empty_like_heads(x)
    if x.numel() == 0:
        return out
    x, cos, sin = _adjacent(x), _adjacent(cos), _adjacent(sin)
    launch = _launch(
        x.shape, cos.shape[-1], x.stride(), _table_strides(cos), _table_strides(sin), out.stride(), interleaved, inverse
    )  # fmt: skip
    with on_device(x):
        launch(x, cos, sin, out)
    return out


def rotary_forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, T, D) with its pairs rotated, laid out (B, T, H, D)."""
    return _rotate(x, cos, sin, interleaved, inverse=False)


def rotary_backward(grad_out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """grad_out (B, H, T, D) with its pairs rotated back, laid out (B, T, H, D)."""
    return _rotate(grad_out, cos, sin, interleaved, inverse=True)
