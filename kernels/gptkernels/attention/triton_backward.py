"""The backward kernels: first delta for every query, then dK with dV by tiles of keys, and dQ by tiles of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from gptkernels.attention.triton_tile import kept, key_range, keys_in_use, load_tile, sequence_of, visible


@triton.jit
def _delta_kernel(
    OUT, DOUT, SUMS, DLSE, DELTA, CU_QUERIES, CU_KEYS, H, Tq, MAX_QUERIES,
    stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt, stride_lb, stride_lh,
    PACKED: tl.constexpr, HAS_DLSE: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout) - dlse, which softmax's backward subtracts from every row of dP.

    With `SUMS`, delta is rowsum(out * dout) divided by the row's sum of exponentials, by which dout is divided before dP
    is computed. dP - delta then cancels as it should, and dlse is added to the difference. With WHOLE_ROWS, delta is -dlse.
    """
    blocks = tl.cdiv(MAX_QUERIES, BLOCK_M)
    program = tl.program_id(0)
    start_m = program % blocks * BLOCK_M
    head_index = program // blocks
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    first_query, first_key, Tq, Tk = sequence_of(CU_QUERIES, CU_KEYS, batch, Tq, 0, PACKED)
    row = tl.arange(0, BLOCK_M)
    queries = start_m + row
    dims = tl.arange(0, BLOCK_D)
    start = first_query + start_m
    OUT += batch * stride_ob + head * stride_oh + start * stride_ot
    DOUT += batch * stride_db + head * stride_dh + start * stride_dt
    statistics = batch * stride_lb + head * stride_lh + start + row
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if not WHOLE_ROWS:
        mask = (queries[:, None] < Tq) & (dims[None, :] < HEAD_DIM)
        out = tl.load(OUT + row[:, None] * stride_ot + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(DOUT + row[:, None] * stride_dt + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        if SUMS is None:
            delta = tl.sum(out * dout, axis=1)
        else:  # summed in the order of the product dP: where one key has all the weight, their difference is exactly 0
            dout *= _reciprocals(SUMS, statistics, queries < Tq)[:, None]
            products = tl.dot(dout, tl.trans(out), input_precision="ieee")
            delta = tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), axis=1)
    if HAS_DLSE and SUMS is None:
        delta -= tl.load(DLSE + statistics, mask=queries < Tq, other=0.0)
    tl.store(DELTA + statistics, delta, mask=queries < Tq)


@triton.jit
def _reciprocals(SUMS, rows, mask):
    """1 / each row's sum of exponentials; 1 for a row that sees no key."""
    l = tl.load(SUMS + rows, mask=mask, other=0.0)
    return 1.0 / tl.where(l == 0.0, 1.0, l)


@triton.jit
def _whole_rows_weights(s, seen, scale, AXIS: tl.constexpr):
    """Softmax of scores of which AXIS holds all keys: a lone key's weight is exactly 1."""
    s = tl.where(seen, s, float("-inf"))
    m = tl.max(s, axis=AXIS, keep_dims=True)
    p = tl.exp2((s - tl.where(m == float("-inf"), 0.0, m)) * scale)
    l = tl.sum(p, axis=AXIS, keep_dims=True)
    return tl.where(seen, p / tl.where(l == 0.0, 1.0, l), 0.0)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, Q, DOUT, SHIFTS, SUMS, DELTA, DLSE, statistics, start, end, keys, seen, start_n, diagonal, window, scale, Tq,
    stride_qt, stride_dt, seed, head, threshold, rescale,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_DROPOUT: tl.constexpr, EVEN_Q: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_offsets = row[:, None] * stride_qt + dims[None, :]
    do_offsets = row[:, None] * stride_dt + dims[None, :]
    Q += tl.cast(start, tl.int64) * stride_qt
    DOUT += tl.cast(start, tl.int64) * stride_dt
    for m in range(start, end, BLOCK_M):
        queries = m + row
        inside = queries < Tq
        q = load_tile(Q + q_offsets, queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # (M, D)
        if SUMS is not None:  # scaled before the product, as in the forward
            q *= scale
        st = tl.dot(k, tl.trans(q), input_precision="ieee")  # (N, M): scores transposed, so that P^T feeds a product
        if MASKED:  # keys beyond the end are masked when dk and dv are stored
            shown = keys[:, None] <= queries[None, :] + diagonal
            if HAS_WINDOW:
                shown = shown & (keys[:, None] > queries[None, :] + diagonal - window)
        if WHOLE_ROWS:
            visible = seen[:, None]
            if MASKED:
                visible = visible & shown
            pt = _whole_rows_weights(st, visible, scale, 0)
        else:
            shift = tl.load(SHIFTS + statistics + queries, mask=inside, other=0.0)
            pt = tl.exp2((st if SUMS is not None else st * scale) - shift[None, :])
            if MASKED:
                pt = tl.where(shown, pt, 0.0)
        do = load_tile(DOUT + do_offsets, queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # (M, D)
        if SUMS is not None:
            reciprocals = _reciprocals(SUMS, statistics + queries, inside)
            do *= reciprocals[:, None]
        if HAS_DROPOUT:  # dv is rescaled when it is stored
            keep = tl.trans(kept(seed, head, queries, start_n, threshold, BLOCK_M, BLOCK_N))
            dv = tl.dot(tl.where(keep, pt, 0.0).to(do.dtype), do, dv, input_precision="ieee")
        else:
            dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
        delta = tl.load(DELTA + statistics + queries, mask=inside, other=0.0)
        dpt = tl.dot(v, tl.trans(do), input_precision="ieee")  # (N, M)
        if HAS_DROPOUT:
            dpt = tl.where(keep, dpt * rescale, 0.0)
        if WHOLE_ROWS:  # subtract rowsum(out * dout), computed from the weights
            dpt -= tl.sum(pt * tl.where(visible, dpt, 0.0), axis=0)[None, :]
        dpt -= delta[None, :]
        if SUMS is not None and DLSE is not None:
            dpt += (tl.load(DLSE + statistics + queries, mask=inside, other=0.0) * reciprocals)[None, :]
        dst = pt * dpt
        dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
        Q += BLOCK_M * stride_qt
        DOUT += BLOCK_M * stride_dt
    return dk, dv


@triton.jit
def _dkdv_kernel(
    Q, K, V, DOUT, SHIFTS, SUMS, DELTA, DLSE, DK, DV, KEY_LENGTHS, KEY_MASK, CU_QUERIES, CU_KEYS, SEEDS,
    scale, scale_log2, rescale, threshold, window, H, GROUP, Tq, Tk, MAX_KEYS,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_lb, stride_lh,
    stride_gkb, stride_gkh, stride_gkt, stride_gvb, stride_gvh, stride_gvt,
    IS_CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PACKED: tl.constexpr, WHOLE_ROWS: tl.constexpr, EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, over all query heads of the group and all queries that see it, in fixed order."""
    blocks = tl.cdiv(MAX_KEYS, BLOCK_N)
    program = tl.program_id(0)
    start_n = program % blocks * BLOCK_N  # most queries see the early keys: start with them
    head_index = program // blocks
    kv_heads = H // GROUP
    batch = (head_index // kv_heads).to(tl.int64)
    kv_head = (head_index % kv_heads).to(tl.int64)
    first_query, first_key, Tq, Tk = sequence_of(CU_QUERIES, CU_KEYS, batch, Tq, Tk, PACKED)
    if PACKED:
        if start_n >= Tk:  # a sequence shorter than the longest
            return
    row = tl.arange(0, BLOCK_N)
    keys = start_n + row
    dims = tl.arange(0, BLOCK_D)
    start = first_key + start_n
    K += batch * stride_kb + kv_head * stride_kh + start * stride_kt
    V += batch * stride_vb + kv_head * stride_vh + start * stride_vt
    if HAS_MASK:
        KEY_MASK += batch * Tk
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEEDS + batch)

    keys_end = keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS)
    k = load_tile(K + row[:, None] * stride_kt + dims[None, :], keys[:, None], dims[None, :], Tk, HEAD_DIM, BLOCK_D, EVEN_K)  # fmt: skip
    v = load_tile(V + row[:, None] * stride_vt + dims[None, :], keys[:, None], dims[None, :], Tk, HEAD_DIM, BLOCK_D, EVEN_K)  # fmt: skip
    # Queries [first, last) see part of this tile, [from_, to) all of it; all but `last` are multiples of BLOCK_M.
    diagonal = Tk - Tq
    first = 0
    from_ = 0
    last = tl.where(start_n < keys_end, Tq, 0)  # no work for a tile of padding
    if IS_CAUSAL:
        first = tl.minimum(tl.maximum(start_n - diagonal, 0) // BLOCK_M * BLOCK_M, Tq)
        from_ = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - diagonal, 0), BLOCK_M) * BLOCK_M
    if HAS_WINDOW:
        last = tl.minimum(last, tl.maximum(start_n + BLOCK_N - 1 - diagonal + window, 0))
    from_ = tl.minimum(from_, tl.cdiv(last, BLOCK_M) * BLOCK_M)
    to = last
    if HAS_WINDOW:
        to = tl.maximum(tl.minimum(last, tl.maximum(start_n - diagonal + window, 0) // BLOCK_M * BLOCK_M), from_)
    seen = keys < keys_end
    if HAS_MASK:
        seen = seen & (tl.load(KEY_MASK + keys, mask=seen, other=0) != 0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head = Q + batch * stride_qb + head * stride_qh + first_query * stride_qt
        do_head = DOUT + batch * stride_db + head * stride_dh + first_query * stride_dt
        statistics = batch * stride_lb + head * stride_lh + first_query
        # The loop without a mask comes first: with the diagonal first, ptxas spills more.
        dk, dv = _dkdv_loop(
            dk, dv, k, v, q_head, do_head, SHIFTS, SUMS, DELTA, DLSE, statistics, from_, to, keys, seen, start_n,
            diagonal, window, scale_log2, Tq, stride_qt, stride_dt, seed, head, threshold, rescale,
            False, HAS_WINDOW, HAS_DROPOUT, EVEN_Q, WHOLE_ROWS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if IS_CAUSAL:
            dk, dv = _dkdv_loop(
                dk, dv, k, v, q_head, do_head, SHIFTS, SUMS, DELTA, DLSE, statistics, first, from_, keys, seen, start_n,
                diagonal, window, scale_log2, Tq, stride_qt, stride_dt, seed, head, threshold, rescale,
                True, HAS_WINDOW, HAS_DROPOUT, EVEN_Q, WHOLE_ROWS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if HAS_WINDOW:
            dk, dv = _dkdv_loop(
                dk, dv, k, v, q_head, do_head, SHIFTS, SUMS, DELTA, DLSE, statistics, to, last, keys, seen, start_n,
                diagonal, window, scale_log2, Tq, stride_qt, stride_dt, seed, head, threshold, rescale,
                True, HAS_WINDOW, HAS_DROPOUT, EVEN_Q, WHOLE_ROWS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    if HAS_DROPOUT:
        dv *= rescale
    if SUMS is not None:  # the queries were already multiplied by scale_log2
        scale /= scale_log2
    dk = tl.where(seen[:, None], dk * scale, 0.0)
    dv = tl.where(seen[:, None], dv, 0.0)
    # Computed after the loops, which would otherwise keep these addresses in registers.
    DK += batch * stride_gkb + kv_head * stride_gkh + start * stride_gkt
    DV += batch * stride_gvb + kv_head * stride_gvh + start * stride_gvt
    mask = (keys[:, None] < Tk) & (dims[None, :] < HEAD_DIM)
    tl.store(DK + row[:, None] * stride_gkt + dims[None, :], dk.to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + row[:, None] * stride_gvt + dims[None, :], dv.to(DV.dtype.element_ty), mask=mask)


@triton.jit
def _dq_loop(
    dq, q, do, shift, delta, dlse, K, V, KEY_MASK, start, end, queries, keys_end, diagonal, window, scale,
    stride_kt, stride_vt, seed, head, threshold, rescale,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WHOLE_ROWS: tl.constexpr,
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
        if WHOLE_ROWS or MASKED:
            seen = visible(queries[:, None], keys[None, :], keys_end, KEY_MASK, diagonal, window, IS_CAUSAL, HAS_MASK, HAS_WINDOW)  # fmt: skip
        if WHOLE_ROWS:
            p = _whole_rows_weights(s, seen, scale, 1)
        else:
            p = tl.exp2(s * scale - shift[:, None])
            if MASKED:
                p = tl.where(seen, p, 0.0)
        v = load_tile(V + v_offsets, keys[:, None], dims[None, :], keys_end, HEAD_DIM, BLOCK_D, not MASKED)  # (N, D)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if HAS_DROPOUT:
            dp = tl.where(kept(seed, head, queries, n, threshold, BLOCK_M, BLOCK_N), dp * rescale, 0.0)
        if WHOLE_ROWS:  # subtract rowsum(out * dout), computed from the weights
            dp -= tl.sum(p * tl.where(seen, dp, 0.0), axis=1)[:, None]
        dp -= delta[:, None]
        if dlse is not None:
            dp += dlse[:, None]
        ds = p * dp
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        K += BLOCK_N * stride_kt
        V += BLOCK_N * stride_vt
    return dq


@triton.jit
def _dq_kernel(
    Q, K, V, DOUT, SHIFTS, SUMS, DELTA, DLSE, DQ, KEY_LENGTHS, KEY_MASK, CU_QUERIES, CU_KEYS, SEEDS,
    scale, scale_log2, rescale, threshold, window, H, GROUP, Tq, Tk, MAX_QUERIES,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_lb, stride_lh, stride_gb, stride_gh, stride_gt,
    IS_CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PACKED: tl.constexpr, WHOLE_ROWS: tl.constexpr, EVEN_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, over all keys they see, in the forward's order."""
    blocks = tl.cdiv(MAX_QUERIES, BLOCK_M)
    program = tl.program_id(0)
    start_m = (blocks - 1 - program % blocks) * BLOCK_M
    head_index = program // blocks
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    first_query, first_key, Tq, Tk = sequence_of(CU_QUERIES, CU_KEYS, batch, Tq, Tk, PACKED)
    if PACKED:
        if start_m >= Tq:
            return
    row = tl.arange(0, BLOCK_M)
    queries = start_m + row
    dims = tl.arange(0, BLOCK_D)
    start = first_query + start_m
    Q += batch * stride_qb + head * stride_qh + start * stride_qt
    K += batch * stride_kb + head // GROUP * stride_kh + first_key * stride_kt
    V += batch * stride_vb + head // GROUP * stride_vh + first_key * stride_vt
    DOUT += batch * stride_db + head * stride_dh + start * stride_dt
    DQ += batch * stride_gb + head * stride_gh + start * stride_gt
    if HAS_MASK:
        KEY_MASK += batch * Tk
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEEDS + batch)

    keys_end = keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS)
    diagonal = Tk - Tq
    begin, from_, to, end = key_range(start_m, diagonal, keys_end, window, IS_CAUSAL, HAS_MASK, HAS_WINDOW, BLOCK_M, BLOCK_N)  # fmt: skip
    q = load_tile(Q + row[:, None] * stride_qt + dims[None, :], queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # fmt: skip
    do = load_tile(DOUT + row[:, None] * stride_dt + dims[None, :], queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # fmt: skip
    statistics = batch * stride_lb + head * stride_lh + start + row
    shift = tl.load(SHIFTS + statistics, mask=queries < Tq, other=0.0)
    delta = tl.load(DELTA + statistics, mask=queries < Tq, other=0.0)
    if SUMS is not None:
        q *= scale_log2
        scale_log2 = 1.0
        reciprocals = _reciprocals(SUMS, statistics, queries < Tq)
        do *= reciprocals[:, None]
    dlse = None
    if SUMS is not None and DLSE is not None:
        dlse = tl.load(DLSE + statistics, mask=queries < Tq, other=0.0) * reciprocals
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_WINDOW:
        dq = _dq_loop(
            dq, q, do, shift, delta, dlse, K, V, KEY_MASK, begin, from_, queries, keys_end, diagonal, window,
            scale_log2, stride_kt, stride_vt, seed, head, threshold, rescale,
            True, IS_CAUSAL, HAS_MASK, HAS_WINDOW, HAS_DROPOUT, WHOLE_ROWS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    dq = _dq_loop(
        dq, q, do, shift, delta, dlse, K, V, KEY_MASK, from_, to, queries, keys_end, diagonal, window,
        scale_log2, stride_kt, stride_vt, seed, head, threshold, rescale,
        False, IS_CAUSAL, HAS_MASK, HAS_WINDOW, HAS_DROPOUT, WHOLE_ROWS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dq = _dq_loop(
        dq, q, do, shift, delta, dlse, K, V, KEY_MASK, to, end, queries, keys_end, diagonal, window,
        scale_log2, stride_kt, stride_vt, seed, head, threshold, rescale,
        True, IS_CAUSAL, HAS_MASK, HAS_WINDOW, HAS_DROPOUT, WHOLE_ROWS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tl.store(
        DQ + row[:, None] * stride_gt + dims[None, :],
        (dq * scale).to(DQ.dtype.element_ty),
        mask=(queries[:, None] < Tq) & (dims[None, :] < HEAD_DIM),
    )
