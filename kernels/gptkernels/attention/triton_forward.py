"""The forward kernels: for each tile of queries all its keys; for few queries, the keys split over programs."""

from __future__ import annotations

import triton
import triton.language as tl

from gptkernels.attention.triton_tile import kept, key_range, keys_in_use, load_tile, sequence_of, visible


@triton.jit
def _forward_loop(
    acc, l, m, q, K, V, KEY_MASK, start, end, queries, keys_end, diagonal, window, scale,
    stride_kt, stride_vt, seed, head, threshold,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    k_offsets = row[:, None] * stride_kt + dims[None, :]
    v_offsets = row[:, None] * stride_vt + dims[None, :]
    K += tl.cast(start, tl.int64) * stride_kt
    V += tl.cast(start, tl.int64) * stride_vt
    for n in range(start, end, BLOCK_N):
        keys = n + row
        k = load_tile(K + k_offsets, keys[:, None], dims[None, :], keys_end, HEAD_DIM, BLOCK_D, not MASKED)  # (N, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, N)
        if MASKED:
            seen = visible(queries[:, None], keys[None, :], keys_end, KEY_MASK, diagonal, window, IS_CAUSAL, HAS_MASK, HAS_WINDOW)  # fmt: skip
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        shift = m_new
        if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scale - shift[:, None])
        correction = tl.exp2(m - shift)
        l = l * correction + tl.sum(p, axis=1)
        if HAS_DROPOUT:  # after the sum, which counts all weights
            p = tl.where(kept(seed, head, queries, n, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        v = load_tile(V + v_offsets, keys[:, None], dims[None, :], keys_end, HEAD_DIM, BLOCK_D, not MASKED)  # (N, D)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        m = m_new
        K += BLOCK_N * stride_kt
        V += BLOCK_N * stride_vt
    return acc, l, m


@triton.jit
def _attend(
    q, K, V, KEY_MASK, begin, from_, to, end, queries, keys_end, diagonal, window, scale,
    stride_kt, stride_vt, seed, head, threshold,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``(weighted sum of values, sum of weights, maximum)`` over keys [begin, end), without a mask from `from_` to `to`.

    The maximum is that of the scores times `scale`; the weights are 2 to the power of score times `scale` minus maximum.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if HAS_WINDOW:
        acc, l, m = _forward_loop(
            acc, l, m, q, K, V, KEY_MASK, begin, from_, queries, keys_end, diagonal, window, scale,
            stride_kt, stride_vt, seed, head, threshold, True, IS_CAUSAL, HAS_MASK, HAS_WINDOW, HAS_DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    acc, l, m = _forward_loop(
        acc, l, m, q, K, V, KEY_MASK, from_, to, queries, keys_end, diagonal, window, scale,
        stride_kt, stride_vt, seed, head, threshold, False, IS_CAUSAL, HAS_MASK, HAS_WINDOW, HAS_DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    return _forward_loop(
        acc, l, m, q, K, V, KEY_MASK, to, end, queries, keys_end, diagonal, window, scale,
        stride_kt, stride_vt, seed, head, threshold, True, IS_CAUSAL, HAS_MASK, HAS_WINDOW, HAS_DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _store_statistics(m, l, SHIFTS, SUMS, rows, mask):
    """Stores what the backward recomputes weights from: maximum and sum, or without `SUMS` the log-sum-exp in base 2.

    For a row that sees no key, the log-sum-exp is +inf, so that its weights become 0; maximum and sum are 0.
    """
    if SUMS is None:
        shift = tl.where(l == 0.0, float("inf"), m + tl.log2(l))
    else:
        shift = tl.where(l == 0.0, 0.0, m)
        tl.store(SUMS + rows, l, mask=mask)
    tl.store(SHIFTS + rows, shift, mask=mask)


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, SHIFTS, SUMS, KEY_LENGTHS, KEY_MASK, CU_QUERIES, CU_KEYS, SEEDS, scale, rescale, threshold, window,
    H, GROUP, Tq, Tk, MAX_QUERIES,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh,
    IS_CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PACKED: tl.constexpr, EVEN_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head against all keys they see. `scale` includes log2(e)."""
    blocks = tl.cdiv(MAX_QUERIES, BLOCK_M)
    program = tl.program_id(0)
    # Late queries see most keys: start with them, and end with the short tiles, which fill the gaps.
    start_m = (blocks - 1 - program % blocks) * BLOCK_M
    head_index = program // blocks
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    first_query, first_key, Tq, Tk = sequence_of(CU_QUERIES, CU_KEYS, batch, Tq, Tk, PACKED)
    if PACKED:
        if start_m >= Tq:  # a sequence shorter than the longest
            return
    row = tl.arange(0, BLOCK_M)
    queries = start_m + row
    dims = tl.arange(0, BLOCK_D)
    start = first_query + start_m
    Q += batch * stride_qb + head * stride_qh + start * stride_qt
    K += batch * stride_kb + head // GROUP * stride_kh + first_key * stride_kt
    V += batch * stride_vb + head // GROUP * stride_vh + first_key * stride_vt
    OUT += batch * stride_ob + head * stride_oh + start * stride_ot
    if HAS_MASK:
        KEY_MASK += batch * Tk
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEEDS + batch)

    keys_end = keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS)
    diagonal = Tk - Tq
    begin, from_, to, end = key_range(start_m, diagonal, keys_end, window, IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N)  # fmt: skip
    q = load_tile(Q + row[:, None] * stride_qt + dims[None, :], queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # fmt: skip
    if Q.dtype.element_ty == tl.float32:  # scale the queries: scores are then in base 2, and the maximum is not rounded
        q *= scale
        scale = 1.0
    acc, l, m = _attend(
        q, K, V, KEY_MASK, begin, from_, to, end, queries, keys_end, diagonal, window, scale,
        stride_kt, stride_vt, seed, head, threshold, IS_CAUSAL, HAS_MASK, HAS_WINDOW, HAS_DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    if HAS_DROPOUT:
        out *= rescale
    statistics = batch * stride_lb + head * stride_lh + start + row
    _store_statistics(m, l, SHIFTS, SUMS, statistics, queries < Tq)
    tl.store(
        OUT + row[:, None] * stride_ot + dims[None, :],
        out.to(OUT.dtype.element_ty),
        mask=(queries[:, None] < Tq) & (dims[None, :] < HEAD_DIM),
    )


@triton.jit
def _decode_kernel(
    Q, K, V, PARTIAL, MAXIMA, SUMS, KEY_LENGTHS, KEY_MASK, scale, window, H, GROUP, Tq, Tk, CHUNK,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    IS_CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Few queries: all queries of all heads of one group, against CHUNK of the keys.

    Row r of the tile is query ``r % Tq`` of the group's head ``r // Tq``. Each key is read once for all rows.
    """
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    head_index = tl.program_id(1)
    kv_heads = H // GROUP
    batch = (head_index // kv_heads).to(tl.int64)
    kv_head = (head_index % kv_heads).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    queries = row % Tq
    inside = row < GROUP * Tq
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + row // Tq
    Q += batch * stride_qb
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    if HAS_MASK:
        KEY_MASK += batch * Tk
    q = tl.load(
        Q + head[:, None] * stride_qh + queries[:, None] * stride_qt + dims[None, :],
        mask=inside[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    keys_end = keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS)
    diagonal = Tk - Tq
    # The keys that all queries see end with those of the first query, 0, and begin with those of the last, Tq - 1.
    begin = split * CHUNK
    end = tl.minimum(begin + CHUNK, keys_end)
    to = end
    from_ = begin
    if IS_CAUSAL:
        to = tl.minimum(to, diagonal + 1)
    if HAS_WINDOW:
        begin = tl.maximum(begin, (diagonal - window + 1) // BLOCK_N * BLOCK_N)
        from_ = tl.maximum(begin, tl.cdiv(tl.maximum(Tq + diagonal - window, 0), BLOCK_N) * BLOCK_N)
    if HAS_MASK:
        to = begin
    to = tl.maximum(to // BLOCK_N * BLOCK_N, begin)
    from_ = tl.minimum(from_, to)
    if Q.dtype.element_ty == tl.float32:
        q *= scale
        scale = 1.0
    acc, l, m = _attend(
        q, K, V, KEY_MASK, begin, from_, to, end, queries, keys_end, diagonal, window, scale,
        stride_kt, stride_vt, 0, 0, 0, IS_CAUSAL, HAS_MASK, HAS_WINDOW, False, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # (batch * kv_heads, splits, group * Tq, D), not yet divided by the sums.
    rows = (head_index.to(tl.int64) * splits + split) * (GROUP * Tq) + row
    tl.store(MAXIMA + rows, m, mask=inside)
    tl.store(SUMS + rows, l, mask=inside)
    tl.store(PARTIAL + rows[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside[:, None] & (dims[None, :] < HEAD_DIM))


@triton.jit
def _combine_kernel(
    PARTIAL, PARTIAL_MAXIMA, PARTIAL_SUMS, OUT, SHIFTS, SUMS, H, GROUP, Tq, SPLITS, stride_ob, stride_oh, stride_ot,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one query of one head in order, relative to their common maximum, as a loop joins its tiles."""
    program = tl.program_id(0)
    query = (program % Tq).to(tl.int64)
    head_index = program // Tq
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    kv_index = batch * (H // GROUP) + head // GROUP
    row = head % GROUP * Tq + query
    split = tl.arange(0, BLOCK_S)
    inside = split < SPLITS
    dims = tl.arange(0, BLOCK_D)
    rows = (kv_index * SPLITS + split) * (GROUP * Tq) + row
    maxima = tl.load(PARTIAL_MAXIMA + rows, mask=inside, other=float("-inf"))
    m = tl.max(maxima, axis=0)
    corrections = tl.exp2(maxima - tl.where(m == float("-inf"), 0.0, m))
    l = tl.sum(tl.load(PARTIAL_SUMS + rows, mask=inside, other=0.0) * corrections, axis=0)
    partial = tl.load(
        PARTIAL + rows[:, None] * HEAD_DIM + dims[None, :],
        mask=inside[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    out = tl.sum(corrections[:, None] * partial, axis=0) / tl.where(l == 0.0, 1.0, l)
    _store_statistics(m, l, SHIFTS, SUMS, head_index.to(tl.int64) * Tq + query, None)
    OUT += batch * stride_ob + head * stride_oh + query * stride_ot
    tl.store(OUT + dims, out.to(OUT.dtype.element_ty), mask=dims < HEAD_DIM)
