"""Attention in Triton: tiles with an online softmax forward, and two deterministic loops backward. The launchers.

The kernels (`triton_forward`, `triton_backward`) walk the tiles that need no mask in one loop and the others (the causal
diagonal, a window's edge, the ragged end) in loops of their own, so that most of the work is free of comparisons. Scores
are kept raw: ``qk * scale - max`` is one fused multiply-add, exponentials are base 2, and the saved log-sum-exp is base 2
too. The derivation is in MATH.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from gptkernels._triton import FP_FUSION, architecture, multiprocessors, next_power_of_2, on_device
from gptkernels.attention import dropout
from gptkernels.attention.api import empty_like_heads
from gptkernels.attention.tiles import tile, whole_rows
from gptkernels.attention.triton_backward import _delta_kernel, _dkdv_kernel, _dq_kernel
from gptkernels.attention.triton_forward import _combine_kernel, _decode_kernel, _forward_kernel

LOG2_E = math.log2(math.e)
DELTA_BLOCK = 32
# Up to so many queries share a program with their group's other heads, the keys split over programs.
DECODE_QUERIES = 8
DECODE_ROWS = 64
# Within a tile of at most 128 tokens, offsets are 32 bits: twice as many registers would be spilled for wider ones.
MAX_TOKEN_STRIDE = 2**24
# The fewest tiles of keys that are worth a program of their own.
DECODE_TILES = 4


def _readable(x: Tensor) -> Tensor:
    """`x` itself where head_dim has stride 1 (slices of a packed projection have) and tokens lie close enough, else a copy."""
    adjacent = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if adjacent and x.stride(-2) < MAX_TOKEN_STRIDE else x.contiguous()


def _block_d(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))  # the matrix units' smallest inner dimension is 16


class _Problem:
    """What every launch is told: sizes, strides, masks and options, in the kernels' form."""

    def __init__(
        self, query: Tensor, key: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None, cu_queries: Tensor | None,
        cu_keys: Tensor | None, dropout_seed: Tensor | None, max_queries: int, max_keys: int, is_causal: bool,
        window: int | None, dropout_p: float,
    ) -> None:  # fmt: skip
        self.packed = cu_queries is not None
        self.sequences = cu_queries.shape[0] - 1 if cu_queries is not None else query.shape[0]
        _, self.heads, self.queries, self.head_dim = query.shape
        self.kv_heads, self.keys = key.shape[1], key.shape[2]
        self.max_queries = max_queries if self.packed else self.queries
        self.max_keys = max_keys if self.packed else self.keys
        self.block_d = _block_d(self.head_dim)
        self.has_dropout = dropout.threshold(dropout_p) > 0
        others = (window, key_lengths, key_mask, cu_queries)
        self.is_plain = not self.has_dropout and all(x is None for x in others)
        self.masks = tuple(x if x is None else x.contiguous() for x in (key_lengths, key_mask))
        self.sequence = tuple(x if x is None else x.contiguous() for x in (cu_queries, cu_keys))
        self.tensors = (*self.masks, *self.sequence, dropout_seed if self.has_dropout else None)
        self.options = (dropout.rescale(dropout_p), dropout.threshold(dropout_p), window or 0)
        self.sizes = (self.heads, self.heads // max(self.kv_heads, 1), self.queries, self.keys)
        # Of a packed batch the one batch entry holds all sequences.
        self.statistics_strides = (0 if self.packed else self.heads * self.queries, self.queries)
        self.flags: dict[str, Any] = {
            "IS_CAUSAL": is_causal,
            "HAS_LENGTHS": key_lengths is not None,
            "HAS_MASK": key_mask is not None,
            "HAS_WINDOW": window is not None,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
        }

    def empty(self) -> bool:
        return 0 in (self.sequences, self.heads, self.head_dim, self.max_queries, self.max_keys)

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """The (batch, head, token) strides of each."""
        found = []
        for x in tensors:
            batch, head, token, _ = x.stride()
            found += [0 if self.packed else batch, head, token]
        return tuple(found)

    def even(self, block_m: int) -> bool:
        return not self.packed and self.queries % block_m == 0


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    dropout_seed: Tensor | None,
    max_queries: int,
    max_keys: int,
    is_causal: bool,
    window: int | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``(out, statistics)``: out (B, H, Tq, D) laid out (B, Tq, H, D), statistics float32 (1, B, H, Tq) or (2, B, H, Tq).

    They are each row's log-sum-exp in base 2, +inf where it sees no key; of float32 inputs its maximum in those units and
    its sum of exponentials over it, 0 and 0 where it sees no key.
    """
    out = empty_like_heads(query)
    numbers = 2 if query.dtype == torch.float32 else 1
    statistics = torch.empty((numbers, *query.shape[:3]), dtype=torch.float32, device=query.device)
    shifts, sums = _shifts_and_sums(statistics)
    p = _Problem(
        query, key, key_lengths, key_mask, cu_queries, cu_keys, dropout_seed, max_queries, max_keys, is_causal, window, dropout_p
    )  # fmt: skip
    if p.empty():
        return out.zero_(), statistics.fill_(math.inf if sums is None else 0.0)
    query, key, value = _readable(query), _readable(key), _readable(value)
    few = p.queries <= DECODE_QUERIES and p.queries * p.heads // p.kv_heads <= DECODE_ROWS
    if few and not p.packed and not p.has_dropout:
        _decode(p, query, key, value, scale, out, statistics)
        return out, statistics
    t = tile("forward", architecture(query), query.dtype.itemsize, p.block_d, p.has_dropout, p.is_plain)
    with on_device(query):
        _forward_kernel[(triton.cdiv(p.max_queries, t.block_m) * p.sequences * p.heads,)](
            query, key, value, out, shifts, sums, *p.tensors, scale * LOG2_E, *p.options, *p.sizes, p.max_queries,
            *p.strides(query, key, value, out), *p.statistics_strides,
            **p.flags, HAS_DROPOUT=p.has_dropout, PACKED=p.packed, EVEN_Q=p.even(t.block_m),
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, **t.options, **FP_FUSION,
        )  # fmt: skip
    return out, statistics


def _shifts_and_sums(statistics: Tensor) -> tuple[Tensor, Tensor | None]:
    """``(log-sum-exp, None)``, or of float32 inputs ``(maximum, sum)``."""
    return statistics[0], statistics[1] if len(statistics) == 2 else None


def _decode(
    p: _Problem, query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, statistics: Tensor
) -> None:
    """The forward of few queries: as many splits of the keys as fill the GPU twice, then their union."""
    rows = p.queries * p.heads // p.kv_heads
    t = tile("decode", architecture(query), query.dtype.itemsize, p.block_d)
    kv_heads = p.sequences * p.kv_heads
    wanted = triton.cdiv(2 * multiprocessors(query), kv_heads)
    tiles = triton.cdiv(p.keys, t.block_n)
    chunk = max(DECODE_TILES, triton.cdiv(tiles, wanted)) * t.block_n
    splits = triton.cdiv(p.keys, chunk)
    partial = torch.empty((kv_heads, splits, rows, p.head_dim), dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty((2, kv_heads, splits, rows), dtype=torch.float32, device=query.device)
    with on_device(query):
        _decode_kernel[(splits, kv_heads)](
            query, key, value, partial, maxima, sums, *p.masks, scale * LOG2_E, p.options[-1], *p.sizes, chunk,
            *p.strides(query, key, value), **p.flags, BLOCK_M=max(t.block_m, next_power_of_2(rows)), BLOCK_N=t.block_n,
            **t.options, **FP_FUSION,
        )  # fmt: skip
        _combine_kernel[(p.sequences * p.heads * p.queries,)](
            partial, maxima, sums, out, *_shifts_and_sums(statistics), *p.sizes[:3], splits, *out.stride()[:3],
            HEAD_DIM=p.head_dim, BLOCK_D=p.block_d, BLOCK_S=next_power_of_2(splits), num_warps=4, **FP_FUSION,
        )  # fmt: skip


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    dropout_seed: Tensor | None,
    max_queries: int,
    max_keys: int,
    is_causal: bool,
    window: int | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_query, grad_key, grad_value)``, each laid out as the forward's output; the same bits on every run."""
    grad_query, grad_key, grad_value = empty_like_heads(query), empty_like_heads(key), empty_like_heads(value)
    p = _Problem(
        query, key, key_lengths, key_mask, cu_queries, cu_keys, dropout_seed, max_queries, max_keys, is_causal, window, dropout_p
    )  # fmt: skip
    if p.empty():
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    query, key, value, grad_out = _readable(query), _readable(key), _readable(value), _readable(grad_out)
    grad_lse = grad_lse if grad_lse is None else grad_lse.contiguous()
    arch, itemsize = architecture(query), query.dtype.itemsize
    dkdv = tile("dkdv", arch, itemsize, p.block_d, p.has_dropout, p.is_plain).at_most(next_power_of_2(p.max_queries))
    dq = tile("dq", arch, itemsize, p.block_d, p.has_dropout, p.is_plain)
    shifts, sums = _shifts_and_sums(statistics)
    whole = sums is not None and whole_rows(next_power_of_2(p.max_keys), p.block_d)
    if whole:
        (dkdv, dq), sums = whole, None
    delta = torch.empty_like(shifts)
    inputs = (query, key, value, grad_out, shifts, sums, delta, grad_lse)
    numbers = (scale, scale * LOG2_E, *p.options, *p.sizes)
    strides = (*p.strides(query, key, value, grad_out), *p.statistics_strides)
    flags = {**p.flags, "HAS_DROPOUT": p.has_dropout, "PACKED": p.packed, "WHOLE_ROWS": bool(whole)}
    with on_device(query):
        _delta_kernel[(triton.cdiv(p.max_queries, DELTA_BLOCK) * p.sequences * p.heads,)](
            out, grad_out, sums, grad_lse, delta, *p.sequence, p.heads, p.queries, p.max_queries,
            *p.strides(out, grad_out), *p.statistics_strides, PACKED=p.packed, HAS_DLSE=grad_lse is not None, WHOLE_ROWS=bool(whole),
            HEAD_DIM=p.head_dim, BLOCK_D=p.block_d, BLOCK_M=DELTA_BLOCK, num_warps=4, **FP_FUSION,
        )  # fmt: skip
        _dkdv_kernel[(triton.cdiv(p.max_keys, dkdv.block_n) * p.sequences * p.kv_heads,)](
            *inputs, grad_key, grad_value, *p.tensors, *numbers, p.max_keys, *strides, *p.strides(grad_key, grad_value),
            **flags, EVEN_Q=p.even(dkdv.block_m), EVEN_K=not p.packed and p.keys % dkdv.block_n == 0,
            BLOCK_M=dkdv.block_m, BLOCK_N=dkdv.block_n, **dkdv.options, **FP_FUSION,
        )  # fmt: skip
        _dq_kernel[(triton.cdiv(p.max_queries, dq.block_m) * p.sequences * p.heads,)](
            *inputs, grad_query, *p.tensors, *numbers, p.max_queries, *strides, *p.strides(grad_query),
            **flags, EVEN_Q=p.even(dq.block_m),
            BLOCK_M=dq.block_m, BLOCK_N=dq.block_n, **dq.options, **FP_FUSION,
        )  # fmt: skip
    return grad_query, grad_key, grad_value
