"""Inputs, shapes and costs of attention, padded and packed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec
from gptkernels.attention import reference
from gptkernels.attention.api import attention, attention_varlen


def _case(
    batch: int,
    heads: int,
    queries: int,
    head_dim: int,
    *,
    keys: int | None = None,
    kv_heads: int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    lengths: tuple[int, ...] | None = None,
    left_padding: tuple[int, ...] | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    layout: str = "contiguous",
) -> Case:
    name = f"B{batch}-H{heads}-T{queries}-D{head_dim}" + ("-causal" if is_causal else "-full")
    for label, value in (("keys", keys), ("kvheads", kv_heads), ("scale", scale), ("window", window)):
        name += "" if value is None else f"-{label}{value}"
    name += "" if lengths is None else "-lengths"
    name += "" if left_padding is None else "-leftpadded"
    name += f"-dropout{dropout_p:g}" if dropout_p else ""
    name += "-lse" if return_lse else ""
    name += "" if layout == "contiguous" else f"-{layout}"
    parameters = {
        "batch": batch,
        "heads": heads,
        "queries": queries,
        "keys": keys or queries,
        "head_dim": head_dim,
        "kv_heads": kv_heads or heads,
        "is_causal": is_causal,
        "scale": scale,
        "lengths": lengths,
        "left_padding": left_padding,
        "window": window,
        "dropout_p": dropout_p,
        "return_lse": return_lse,
        "layout": layout,
    }
    return Case(name, parameters)


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    p = case.parameters
    draws = Draws(device, seed)
    batch, heads, kv_heads, head_dim = p["batch"], p["heads"], p["kv_heads"], p["head_dim"]

    def draw(count: int, tokens: int) -> Tensor:
        if p["layout"] == "contiguous":
            return draws.normal(batch, count, tokens, head_dim).to(device, dtype)
        if p["layout"] == "transposed":  # head_dim is not the adjacent dimension
            x = draws.normal(batch, count, head_dim, tokens).to(device, dtype)
            return x.transpose(2, 3)
        raise ValueError(f"layout: got {p['layout']!r}")

    if p["layout"] == "packed":  # slices of one qkv projection, (B, T, 3 H D) in memory
        packed = draws.normal(batch, p["queries"], 3, heads, head_dim).to(device, dtype)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
    else:
        query = draw(heads, p["queries"])
        key, value = draw(kv_heads, p["keys"]), draw(kv_heads, p["keys"])
    tensors: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    if p["lengths"] is not None:
        tensors["key_lengths"] = torch.tensor(p["lengths"], device=device)
    if p["left_padding"] is not None:
        padding = torch.tensor(p["left_padding"], device=device)[:, None]
        tensors["key_mask"] = torch.arange(p["keys"], device=device)[None, :] >= padding
    if p["dropout_p"]:
        tensors["dropout_seed"] = _seeds(batch, draws).to(device)
    return Inputs(tensors, {name: p[name] for name in ("is_causal", "scale", "window", "dropout_p", "return_lse")})


def _seeds(sequences: int, draws: Draws) -> Tensor:
    return draws.integers(2**63 - 1, sequences)


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    p = case.parameters
    batch, heads, queries, keys, head_dim = (p[n] for n in ("batch", "heads", "queries", "keys", "head_dim"))
    pairs = queries * keys
    if p["is_causal"]:  # the convention of the FlashAttention papers: half of the square
        pairs = queries * keys - queries * queries // 2 if keys >= queries else keys * keys // 2
    if p["window"] is not None:
        pairs = min(pairs, queries * p["window"])
    product = 2 * batch * heads * pairs * head_dim
    q = batch * heads * queries * head_dim * dtype.itemsize
    kv = 2 * batch * p["kv_heads"] * keys * head_dim * dtype.itemsize
    return Cost(
        forward_flops=2 * product,
        backward_flops=5 * product,
        forward_bytes=2 * q + kv,
        backward_bytes=4 * q + 2 * kv,
    )


SPEC = OpSpec(
    name="attention",
    function=attention,
    reference=reference.attention,
    make_inputs=_make_inputs,
    cost=_cost,
    cases=(
        _case(1, 1, 1, 16),
        _case(2, 3, 37, 64),
        _case(1, 2, 64, 64),
        _case(1, 1, 65, 128),
        _case(1, 1, 33, 256),
        _case(1, 2, 50, 72),
        _case(1, 1, 40, 80),
        _case(1, 1, 31, 96),
        _case(1, 1, 20, 5),
        _case(2, 2, 45, 32, is_causal=False),
        _case(1, 2, 7, 64, keys=70),
        _case(1, 2, 7, 64, keys=70, is_causal=False),
        _case(1, 1, 1, 64, keys=77),
        _case(1, 2, 70, 16, keys=33),
        _case(2, 6, 35, 16, kv_heads=2),
        _case(1, 4, 9, 32, keys=40, kv_heads=1, is_causal=False),
        _case(1, 2, 40, 16, scale=1.7),
        _case(4, 2, 40, 16, lengths=(40, 17, 1, 0)),
        _case(3, 2, 40, 16, lengths=(33, 32, 0), is_causal=False),
        _case(3, 2, 35, 16, left_padding=(0, 20, 35)),
        _case(2, 4, 35, 16, kv_heads=2, left_padding=(3, 18), is_causal=False),
        _case(1, 2, 70, 16, window=9),
        _case(2, 4, 9, 16, keys=90, kv_heads=2, window=33, lengths=(90, 50)),
        _case(1, 2, 3, 16, keys=150, window=70),
        _case(2, 2, 60, 16, window=200, left_padding=(0, 30)),
        _case(2, 6, 5, 16, keys=150, kv_heads=2, lengths=(150, 20)),
        _case(2, 2, 1, 16, keys=150, left_padding=(149, 3)),
        _case(2, 2, 40, 16, dropout_p=0.3),
        _case(1, 4, 33, 24, keys=50, kv_heads=2, is_causal=False, dropout_p=0.7),
        _case(2, 2, 4, 16, keys=71, window=20, dropout_p=0.1, left_padding=(0, 67)),
        _case(2, 2, 40, 16, return_lse=True),
        _case(2, 2, 5, 16, keys=70, is_causal=False, lengths=(70, 9), return_lse=True),
        _case(1, 2, 35, 16, window=5, dropout_p=0.2, return_lse=True),
        _case(2, 2, 40, 24, layout="packed"),
        _case(1, 2, 33, 16, layout="transposed"),
    ),
    bench_cases=(
        *(_case(16384 // tokens, 12, tokens, 64) for tokens in (512, 1024, 2048, 4096, 8192)),
        *(_case(16384 // tokens, 16, tokens, 128) for tokens in (1024, 2048, 4096, 8192)),
        _case(4, 12, 1024, 64, is_causal=False),
        _case(4, 12, 4096, 64, window=512),
        _case(16, 12, 1024, 64, dropout_p=0.1),
        _case(16, 32, 1, 128, keys=4096, kv_heads=8),
    ),
    cpu_cases=(_case(4, 12, 1024, 64),),
    compile_cases=(
        _case(16, 12, 1024, 64),
        _case(4, 16, 4096, 128, is_causal=False),
        _case(4, 16, 2048, 128, kv_heads=4, lengths=(2048, 100, 7, 1)),
        _case(4, 16, 4096, 128, window=512, dropout_p=0.1),
        _case(16, 32, 1, 128, keys=4096, kv_heads=8),
        _case(2, 16, 128, 128, keys=30, left_padding=(0, 2)),  # few keys: one tile holds all of them for float32 inputs
    ),
)


def _packed_case(lengths: tuple[tuple[int, int], ...], heads: int, head_dim: int, **changes: Any) -> Case:
    """`lengths` are the numbers of queries and keys of each sequence."""
    parameters: dict[str, Any] = {
        "lengths": lengths, "heads": heads, "head_dim": head_dim, "kv_heads": heads,
        "is_causal": True, "window": None, "dropout_p": 0.0, "return_lse": False,
    }  # fmt: skip
    name = "T" + "+".join(str(q) if q == k else f"{q}:{k}" for q, k in lengths) + f"-H{heads}-D{head_dim}"
    name += "".join(f"-{option}{value}" for option, value in changes.items())
    return Case(name, parameters | changes)


def _make_packed_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    p = case.parameters
    draws = Draws(device, seed)
    lengths = torch.tensor([(0, 0), *p["lengths"]], dtype=torch.int32)
    cu_queries, cu_keys = lengths.cumsum(0, dtype=torch.int32).unbind(1)
    shapes = ((cu_queries, p["heads"]), (cu_keys, p["kv_heads"]), (cu_keys, p["kv_heads"]))
    query, key, value = (
        draws.normal(int(cumulative[-1]), heads, p["head_dim"]).to(device, dtype) for cumulative, heads in shapes
    )
    tensors: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    tensors |= {"cu_seqlens_q": cu_queries.contiguous().to(device), "cu_seqlens_k": cu_keys.contiguous().to(device)}
    if p["dropout_p"]:
        tensors["dropout_seed"] = _seeds(len(p["lengths"]), draws).to(device)
    most_queries, most_keys = lengths.max(0).values.tolist()
    options = {name: p[name] for name in ("is_causal", "window", "dropout_p", "return_lse")}
    return Inputs(tensors, {"max_seqlen_q": most_queries, "max_seqlen_k": most_keys} | options)


def _packed_cost(case: Case, dtype: torch.dtype) -> Cost:
    p = case.parameters
    shared = {name: p[name] for name in ("heads", "head_dim", "kv_heads", "is_causal", "window")}
    alone = [
        _cost(Case("", shared | {"batch": 1, "queries": queries, "keys": keys}), dtype)
        for queries, keys in p["lengths"]
    ]
    return Cost(*(sum(getattr(cost, field.name) for cost in alone) for field in fields(Cost)))


VARLEN_SPEC = OpSpec(
    name="attention_varlen",
    function=attention_varlen,
    reference=reference.attention_varlen,
    make_inputs=_make_packed_inputs,
    cost=_packed_cost,
    cases=(
        _packed_case(((37, 37), (1, 1), (20, 20)), 2, 16),
        _packed_case(((5, 40), (33, 33), (0, 7), (12, 12)), 4, 16, kv_heads=2),
        _packed_case(((19, 30), (40, 9)), 2, 24, is_causal=False),
        _packed_case(((70, 70), (4, 60)), 2, 16, window=11),
        _packed_case(((40, 40), (9, 25)), 2, 16, dropout_p=0.4, return_lse=True),
        _packed_case(((8, 0), (33, 20)), 1, 16),
    ),
    # The reference's scores are quadratic in the whole batch's tokens: its float64 gradients take 8 GiB.
    bench_cases=(_packed_case(tuple((n, n) for n in (2048, 1024, 512, 256, 256, 1024)), 12, 64),),
    cpu_cases=(_packed_case(tuple((n, n) for n in (512, 256, 128, 128)), 12, 64),),
)
