"""Attention in Triton: tiles with an online softmax forward, and two deterministic loops backward.

Each kernel walks the tiles that need no mask in one loop and the others (the causal diagonal, the ragged end) in a second,
so that most of the work is free of comparisons. Scores are kept raw: ``qk * scale - max`` is one fused
multiply-add, exponentials are base 2, and the saved log-sum-exp is base 2 too. The derivation is in MATH.md.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels._triton import FP_FUSION, architecture, next_power_of_2, on_device
from gptkernels.attention.api import empty_like_heads
from gptkernels.attention.tiles import tile

LOG2_E = math.log2(math.e)
DELTA_BLOCK = 64


@triton.jit
def _load(pointers, rows, cols, ROWS_END, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """A tile of rows x cols (either may be the head_dim axis); masks only where the tile can stick out."""
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
def _keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS: tl.constexpr):
    """How many keys of this sequence exist."""
    keys = Tk
    if HAS_LENGTHS:
        keys = tl.maximum(tl.minimum(tl.load(KEY_LENGTHS + batch).to(tl.int32), Tk), 0)
    return keys


@triton.jit
def _key_range(start_m, Tq, Tk, keys, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """For a tile of queries: where its unmasked tiles of keys end, and where its keys end."""
    end = keys
    unmasked = keys
    if IS_CAUSAL:
        first_hidden = start_m + Tk - Tq + 1  # of the tile's first query
        end = tl.maximum(tl.minimum(keys, first_hidden + BLOCK_M - 1), 0)
        unmasked = tl.maximum(tl.minimum(keys, first_hidden), 0)
    unmasked = unmasked // BLOCK_N * BLOCK_N
    if HAS_MASK:
        unmasked = unmasked * 0
    return unmasked, end


@triton.jit
def _visible(queries, keys, keys_end, KEY_MASK, diagonal, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which keys which queries see; `queries` and `keys` are index tensors that broadcast to the tile."""
    visible = keys < keys_end
    if HAS_MASK:
        visible = visible & (tl.load(KEY_MASK + keys, mask=visible, other=0) != 0)
    if IS_CAUSAL:
        visible = visible & (keys <= queries + diagonal)
    return visible


@triton.jit
def _forward_loop(
    acc, l, m, q, k_pointers, v_pointers, KEY_MASK, start, end, queries, keys_end, diagonal, scale,
    stride_kt, stride_vt,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for n in range(start, end, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k = _load(k_pointers, keys[None, :], dims[:, None], keys_end, HEAD_DIM, BLOCK_D, not MASKED)  # (D, N)
        s = tl.dot(q, k, input_precision="ieee")  # (M, N)
        if MASKED:
            visible = _visible(queries[:, None], keys[None, :], keys_end, KEY_MASK, diagonal, IS_CAUSAL, HAS_MASK)
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        shift = m_new * scale
        if MASKED:  # a row that has seen nothing: -inf - -inf would be NaN
            shift = tl.where(m_new == float("-inf"), 0.0, shift)
        p = tl.exp2(s * scale - shift[:, None])
        correction = tl.exp2(m * scale - shift)
        l = l * correction + tl.sum(p, axis=1)
        v = _load(v_pointers, keys[:, None], dims[None, :], keys_end, HEAD_DIM, BLOCK_D, not MASKED)  # (N, D)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
        m = m_new
        k_pointers += BLOCK_N * stride_kt
        v_pointers += BLOCK_N * stride_vt
    return acc, l, m, k_pointers, v_pointers


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, LSE, KEY_LENGTHS, KEY_MASK, scale, H, GROUP, Tq, Tk,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    IS_CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, EVEN_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head against all keys they see. `scale` includes log2(e)."""
    blocks = tl.cdiv(Tq, BLOCK_M)
    program = tl.program_id(0)
    # Late queries see most keys: start with them, and end with the light tiles that fill the gaps.
    start_m = (blocks - 1 - program % blocks) * BLOCK_M
    head_index = program // blocks
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    queries = start_m + row
    dims = tl.arange(0, BLOCK_D)
    Q += batch * stride_qb + head * stride_qh + start_m.to(tl.int64) * stride_qt
    K += batch * stride_kb + head // GROUP * stride_kh
    V += batch * stride_vb + head // GROUP * stride_vh
    OUT += batch * stride_ob + head * stride_oh + start_m.to(tl.int64) * stride_ot
    if HAS_MASK:
        KEY_MASK += batch * Tk

    keys_end = _keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS)
    unmasked, end = _key_range(start_m, Tq, Tk, keys_end, IS_CAUSAL, HAS_MASK, BLOCK_M, BLOCK_N)
    q = _load(Q + row[:, None] * stride_qt + dims[None, :], queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # fmt: skip
    key = tl.arange(0, BLOCK_N)
    k_pointers = K + key[None, :] * stride_kt + dims[:, None]
    v_pointers = V + key[:, None] * stride_vt + dims[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    diagonal = Tk - Tq
    acc, l, m, k_pointers, v_pointers = _forward_loop(
        acc, l, m, q, k_pointers, v_pointers, KEY_MASK, 0, unmasked, queries, keys_end, diagonal, scale,
        stride_kt, stride_vt, False, IS_CAUSAL, HAS_MASK, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, l, m, k_pointers, v_pointers = _forward_loop(
        acc, l, m, q, k_pointers, v_pointers, KEY_MASK, unmasked, end, queries, keys_end, diagonal, scale,
        stride_kt, stride_vt, True, IS_CAUSAL, HAS_MASK, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    lse = tl.where(l == 0.0, float("-inf"), m * scale + tl.log2(l))
    tl.store(LSE + head_index.to(tl.int64) * Tq + queries, lse, mask=queries < Tq)
    tl.store(
        OUT + row[:, None] * stride_ot + dims[None, :],
        out.to(OUT.dtype.element_ty),
        mask=(queries[:, None] < Tq) & (dims[None, :] < HEAD_DIM),
    )


@triton.jit
def _delta_kernel(
    OUT, DOUT, DELTA, H, Tq, stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout), what softmax's backward subtracts from every row of dP."""
    blocks = tl.cdiv(Tq, BLOCK_M)
    program = tl.program_id(0)
    start_m = program % blocks * BLOCK_M
    head_index = program // blocks
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    queries = start_m + row
    dims = tl.arange(0, BLOCK_D)
    OUT += batch * stride_ob + head * stride_oh + start_m.to(tl.int64) * stride_ot
    DOUT += batch * stride_db + head * stride_dh + start_m.to(tl.int64) * stride_dt
    mask = (queries[:, None] < Tq) & (dims[None, :] < HEAD_DIM)
    out = tl.load(OUT + row[:, None] * stride_ot + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(DOUT + row[:, None] * stride_dt + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(DELTA + head_index.to(tl.int64) * Tq + queries, tl.sum(out * dout, axis=1), mask=queries < Tq)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, q_pointers, do_pointers, LSE, DELTA, start, end, keys, diagonal, scale, Tq,
    stride_qt, stride_dt,
    MASKED: tl.constexpr, EVEN_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for m in range(start, end, BLOCK_M):
        queries = m + tl.arange(0, BLOCK_M)
        inside = queries < Tq
        q = _load(q_pointers, queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # (M, D)
        lse = tl.load(LSE + queries, mask=inside, other=0.0)
        st = tl.dot(k, tl.trans(q), input_precision="ieee")  # (N, M): scores transposed, so that P^T feeds a product
        pt = tl.exp2(st * scale - lse[None, :])
        if MASKED:  # keys beyond the end are dropped when dk and dv are stored
            pt = tl.where(keys[:, None] <= queries[None, :] + diagonal, pt, 0.0)
        do = _load(do_pointers, queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # (M, D)
        dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
        delta = tl.load(DELTA + queries, mask=inside, other=0.0)
        dpt = tl.dot(v, tl.trans(do), input_precision="ieee")  # (N, M)
        dst = pt * (dpt - delta[None, :])
        dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
        q_pointers += BLOCK_M * stride_qt
        do_pointers += BLOCK_M * stride_dt
    return dk, dv, q_pointers, do_pointers


@triton.jit
def _dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, KEY_LENGTHS, KEY_MASK, scale, scale_log2, H, GROUP, Tq, Tk,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_gkb, stride_gkh, stride_gkt, stride_gvb, stride_gvh, stride_gvt,
    IS_CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr,
    EVEN_Q: tl.constexpr, EVEN_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: all query heads of the group, all queries that see it, in fixed order."""
    blocks = tl.cdiv(Tk, BLOCK_N)
    program = tl.program_id(0)
    start_n = program % blocks * BLOCK_N  # early keys are seen by most queries: they come first
    head_index = program // blocks
    kv_heads = H // GROUP
    batch = (head_index // kv_heads).to(tl.int64)
    kv_head = (head_index % kv_heads).to(tl.int64)
    row = tl.arange(0, BLOCK_N)
    keys = start_n + row
    dims = tl.arange(0, BLOCK_D)
    start = start_n.to(tl.int64)
    K += batch * stride_kb + kv_head * stride_kh + start * stride_kt
    V += batch * stride_vb + kv_head * stride_vh + start * stride_vt
    DK += batch * stride_gkb + kv_head * stride_gkh + start * stride_gkt
    DV += batch * stride_gvb + kv_head * stride_gvh + start * stride_gvt
    if HAS_MASK:
        KEY_MASK += batch * Tk

    keys_end = _keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS)
    k = _load(K + row[:, None] * stride_kt + dims[None, :], keys[:, None], dims[None, :], Tk, HEAD_DIM, BLOCK_D, EVEN_K)  # fmt: skip
    v = _load(V + row[:, None] * stride_vt + dims[None, :], keys[:, None], dims[None, :], Tk, HEAD_DIM, BLOCK_D, EVEN_K)  # fmt: skip
    # Queries [first, masked) see part of this tile, [masked, last) all of it.
    diagonal = Tk - Tq
    first = 0
    masked = 0
    if IS_CAUSAL:
        first = tl.minimum(tl.maximum(start_n - diagonal, 0) // BLOCK_M * BLOCK_M, Tq)
        masked = tl.maximum(start_n + BLOCK_N - 1 - diagonal, 0)
        masked = tl.minimum(tl.cdiv(masked, BLOCK_M) * BLOCK_M, tl.cdiv(Tq, BLOCK_M) * BLOCK_M)
    last = tl.where(start_n < keys_end, Tq, 0)  # a tile of padding has no work
    masked = tl.minimum(masked, last)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    row_m = tl.arange(0, BLOCK_M)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        # Tiles start at multiples of BLOCK_M, which `first` is: pointers advance with the loops.
        q_pointers = Q + batch * stride_qb + head * stride_qh + (row_m + first).to(tl.int64)[:, None] * stride_qt + dims[None, :]  # fmt: skip
        do_pointers = DOUT + batch * stride_db + head * stride_dh + (row_m + first).to(tl.int64)[:, None] * stride_dt + dims[None, :]  # fmt: skip
        statistics = (batch * H + head) * Tq
        if IS_CAUSAL:
            dk, dv, q_pointers, do_pointers = _dkdv_loop(
                dk, dv, k, v, q_pointers, do_pointers, LSE + statistics, DELTA + statistics,
                first, masked, keys, diagonal, scale_log2, Tq, stride_qt, stride_dt,
                True, EVEN_Q, HEAD_DIM, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        dk, dv, q_pointers, do_pointers = _dkdv_loop(
            dk, dv, k, v, q_pointers, do_pointers, LSE + statistics, DELTA + statistics,
            masked, last, keys, diagonal, scale_log2, Tq, stride_qt, stride_dt,
            False, EVEN_Q, HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    seen = keys < keys_end
    if HAS_MASK:
        seen = seen & (tl.load(KEY_MASK + keys, mask=seen, other=0) != 0)
    dk = tl.where(seen[:, None], dk * scale, 0.0)
    dv = tl.where(seen[:, None], dv, 0.0)
    mask = (keys[:, None] < Tk) & (dims[None, :] < HEAD_DIM)
    tl.store(DK + row[:, None] * stride_gkt + dims[None, :], dk.to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + row[:, None] * stride_gvt + dims[None, :], dv.to(DV.dtype.element_ty), mask=mask)


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, k_pointers, v_pointers, KEY_MASK, start, end, queries, keys_end, diagonal, scale,
    stride_kt, stride_vt,
    MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    for n in range(start, end, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k = _load(k_pointers, keys[:, None], dims[None, :], keys_end, HEAD_DIM, BLOCK_D, not MASKED)  # (N, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, N)
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            visible = _visible(queries[:, None], keys[None, :], keys_end, KEY_MASK, diagonal, IS_CAUSAL, HAS_MASK)
            p = tl.where(visible, p, 0.0)
        v = _load(v_pointers, keys[:, None], dims[None, :], keys_end, HEAD_DIM, BLOCK_D, not MASKED)  # (N, D)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        k_pointers += BLOCK_N * stride_kt
        v_pointers += BLOCK_N * stride_vt
    return dq, k_pointers, v_pointers


@triton.jit
def _dq_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, KEY_LENGTHS, KEY_MASK, scale, scale_log2, H, GROUP, Tq, Tk,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, stride_gb, stride_gh, stride_gt,
    IS_CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, EVEN_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries against all keys they see; the walk is the forward's."""
    blocks = tl.cdiv(Tq, BLOCK_M)
    program = tl.program_id(0)
    start_m = (blocks - 1 - program % blocks) * BLOCK_M
    head_index = program // blocks
    batch = (head_index // H).to(tl.int64)
    head = (head_index % H).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    queries = start_m + row
    dims = tl.arange(0, BLOCK_D)
    start = start_m.to(tl.int64)
    Q += batch * stride_qb + head * stride_qh + start * stride_qt
    K += batch * stride_kb + head // GROUP * stride_kh
    V += batch * stride_vb + head // GROUP * stride_vh
    DOUT += batch * stride_db + head * stride_dh + start * stride_dt
    DQ += batch * stride_gb + head * stride_gh + start * stride_gt
    if HAS_MASK:
        KEY_MASK += batch * Tk

    keys_end = _keys_in_use(KEY_LENGTHS, batch, Tk, HAS_LENGTHS)
    unmasked, end = _key_range(start_m, Tq, Tk, keys_end, IS_CAUSAL, HAS_MASK, BLOCK_M, BLOCK_N)
    q = _load(Q + row[:, None] * stride_qt + dims[None, :], queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # fmt: skip
    do = _load(DOUT + row[:, None] * stride_dt + dims[None, :], queries[:, None], dims[None, :], Tq, HEAD_DIM, BLOCK_D, EVEN_Q)  # fmt: skip
    statistics = head_index.to(tl.int64) * Tq + queries
    lse = tl.load(LSE + statistics, mask=queries < Tq, other=0.0)
    delta = tl.load(DELTA + statistics, mask=queries < Tq, other=0.0)
    key = tl.arange(0, BLOCK_N)
    k_pointers = K + key[:, None] * stride_kt + dims[None, :]
    v_pointers = V + key[:, None] * stride_vt + dims[None, :]
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    diagonal = Tk - Tq
    dq, k_pointers, v_pointers = _dq_loop(
        dq, q, do, lse, delta, k_pointers, v_pointers, KEY_MASK, 0, unmasked, queries, keys_end, diagonal,
        scale_log2, stride_kt, stride_vt, False, IS_CAUSAL, HAS_MASK, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq, k_pointers, v_pointers = _dq_loop(
        dq, q, do, lse, delta, k_pointers, v_pointers, KEY_MASK, unmasked, end, queries, keys_end, diagonal,
        scale_log2, stride_kt, stride_vt, True, IS_CAUSAL, HAS_MASK, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    tl.store(
        DQ + row[:, None] * stride_gt + dims[None, :],
        (dq * scale).to(DQ.dtype.element_ty),
        mask=(queries[:, None] < Tq) & (dims[None, :] < HEAD_DIM),
    )


def _adjacent(x: Tensor) -> Tensor:
    """`x` itself where its head_dim has stride 1 (slices of a packed projection have), else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _block_d(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))  # the matrix units' smallest inner dimension is 16


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``: out (B, H, Tq, D) laid out (B, Tq, H, D); lse (B, H, Tq) float32, base 2, -inf where nothing is seen."""
    out = empty_like_heads(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    batch, heads, queries, head_dim = query.shape
    if query.numel() == 0 or key.shape[2] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    query, key, value = _adjacent(query), _adjacent(key), _adjacent(value)
    key_mask = key_mask if key_mask is None else key_mask.contiguous()
    key_lengths = key_lengths if key_lengths is None else key_lengths.contiguous()
    block_d = _block_d(head_dim)
    t = tile("forward", architecture(query), query.dtype.itemsize, block_d)
    with on_device(query):
        _forward_kernel[(triton.cdiv(queries, t.block_m) * batch * heads,)](
            query, key, value, out, lse, key_lengths, key_mask, scale * LOG2_E,
            heads, heads // key.shape[1], queries, key.shape[2],
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            IS_CAUSAL=is_causal, HAS_LENGTHS=key_lengths is not None, HAS_MASK=key_mask is not None,
            EVEN_Q=queries % t.block_m == 0,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=t.block_m, BLOCK_N=t.block_n,
            num_warps=t.num_warps, num_stages=t.num_stages, **FP_FUSION,
        )  # fmt: skip
    return out, lse


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(grad_query, grad_key, grad_value)``, each laid out as the forward's output; the same bits on every run."""
    grad_query, grad_key, grad_value = empty_like_heads(query), empty_like_heads(key), empty_like_heads(value)
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if query.numel() == 0 or keys == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    query, key, value, grad_out = _adjacent(query), _adjacent(key), _adjacent(value), _adjacent(grad_out)
    key_mask = key_mask if key_mask is None else key_mask.contiguous()
    key_lengths = key_lengths if key_lengths is None else key_lengths.contiguous()
    block_d = _block_d(head_dim)
    arch, itemsize = architecture(query), query.dtype.itemsize
    delta = torch.empty_like(lse)
    sizes = (heads, heads // kv_heads, queries, keys)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3])
    flags = {
        "IS_CAUSAL": is_causal,
        "HAS_LENGTHS": key_lengths is not None,
        "HAS_MASK": key_mask is not None,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
    }
    with on_device(query):
        _delta_kernel[(triton.cdiv(queries, DELTA_BLOCK) * batch * heads,)](
            out, grad_out, delta, heads, queries, *out.stride()[:3], *grad_out.stride()[:3],
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=DELTA_BLOCK, num_warps=4, **FP_FUSION,
        )  # fmt: skip
        t = tile("dkdv", arch, itemsize, block_d)
        _dkdv_kernel[(triton.cdiv(keys, t.block_n) * batch * kv_heads,)](
            query, key, value, grad_out, lse, delta, grad_key, grad_value, key_lengths, key_mask,
            scale, scale * LOG2_E, *sizes, *strides, *grad_key.stride()[:3], *grad_value.stride()[:3],
            **flags, EVEN_Q=queries % t.block_m == 0, EVEN_K=keys % t.block_n == 0,
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, num_warps=t.num_warps, num_stages=t.num_stages, **FP_FUSION,
        )  # fmt: skip
        t = tile("dq", arch, itemsize, block_d)
        _dq_kernel[(triton.cdiv(queries, t.block_m) * batch * heads,)](
            query, key, value, grad_out, lse, delta, grad_query, key_lengths, key_mask,
            scale, scale * LOG2_E, *sizes, *strides, *grad_query.stride()[:3],
            **flags, EVEN_Q=queries % t.block_m == 0,
            BLOCK_M=t.block_m, BLOCK_N=t.block_n, num_warps=t.num_warps, num_stages=t.num_stages, **FP_FUSION,
        )  # fmt: skip
    return grad_query, grad_key, grad_value
