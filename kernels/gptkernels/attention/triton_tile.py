"""What the attention kernels share: loads, the ranges of a tile's keys and queries, masks, dropout."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, rows, cols, ROWS_END, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """Loads a tile of rows x cols, with a mask only where the tile may extend beyond the tensor.

    `cols` is the axis of head_dim; either may be the tile's first axis.
    """
    if EVEN:
        if HEAD_DIM == BLOCK_D:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, mask=cols < HEAD_DIM, other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            x = tl.load(pointers, mask=rows < ROWS_END, other=0.0)
        else:
            x = tl.load(pointers, mask=(rows < ROWS_END) & (cols < HEAD_DIM), other=0.0)
    return x


@triton.jit
def sequence_of(CU_QUERIES, CU_KEYS, batch, Tq, Tk, PACKED: tl.constexpr):
    """``(first query row, first key row, queries, keys)`` of one sequence; rows are counted within its batch entry."""
    first_query = batch * 0
    first_key = batch * 0
    if PACKED:
        first_query = tl.load(CU_QUERIES + batch).to(tl.int64)
        first_key = tl.load(CU_KEYS + batch).to(tl.int64)
        Tq = (tl.load(CU_QUERIES + batch + 1) - first_query).to(tl.int32)
        Tk = (tl.load(CU_KEYS + batch + 1) - first_key).to(tl.int32)
    return first_query, first_key, Tq, Tk


@triton.jit
def keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS: tl.constexpr):
    """The number of this sequence's keys that are not padding."""
    keys = Tk
    if HAS_LENGTHS:
        keys = tl.maximum(tl.minimum(tl.load(KEY_LENGTHS + batch).to(tl.int32), Tk), 0)
    return keys


@triton.jit
def key_range(
    start_m, diagonal, keys, window,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``(begin, from_, to, end)`` for a tile of BLOCK_M queries, which see no keys but those of [begin, end).

    Every query of the tile sees all keys of [from_, to). All but `end` are multiples of BLOCK_N.
    """
    begin = 0
    from_ = 0
    end = keys
    to = keys
    if IS_CAUSAL:
        first_hidden = start_m + diagonal + 1  # of the tile's first query
        end = tl.maximum(tl.minimum(keys, first_hidden + BLOCK_M - 1), 0)
        to = tl.maximum(tl.minimum(keys, first_hidden), 0)
    to = to // BLOCK_N * BLOCK_N
    if HAS_MASK:
        to = to * 0
    if HAS_WINDOW:
        first_seen = start_m + diagonal - window + 1  # by the tile's first query
        begin = tl.maximum(first_seen, 0) // BLOCK_N * BLOCK_N
        to = tl.maximum(to, begin)
        from_ = tl.minimum(tl.cdiv(tl.maximum(first_seen + BLOCK_M - 1, 0), BLOCK_N) * BLOCK_N, to)
    return begin, from_, to, end


@triton.jit
def visible(
    queries, keys, keys_end, KEY_MASK, diagonal, window,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Which queries see which keys; `queries` and `keys` are index tensors that broadcast to the tile."""
    seen = keys < keys_end
    if HAS_MASK:
        seen = seen & (tl.load(KEY_MASK + keys, mask=seen, other=0) != 0)
    if IS_CAUSAL:
        seen = seen & (keys <= queries + diagonal)
    if HAS_WINDOW:
        seen = seen & (keys > queries + diagonal - window)
    return seen


@triton.jit
def kept(seed, head, queries, start_n, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a tile (queries, keys) dropout keeps: `dropout.kept` at the tile's positions.

    One evaluation of Philox serves eight adjacent keys; `interleave` puts its four words side by side again.
    """
    zero = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
    eighths = start_n // 8 + tl.arange(0, BLOCK_N // 8)
    w0, w1, w2, w3 = tl.philox(
        seed, zero + eighths[None, :], zero + queries[:, None], zero + head.to(tl.int32), zero, n_rounds=7
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # (M, N / 2), in the keys' order
    low = (words & 0xFFFF).to(tl.int32) >= threshold
    high = (words >> 16).to(tl.int32) >= threshold
    return tl.interleave(low.to(tl.int8), high.to(tl.int8)) != 0  # (M, N)
