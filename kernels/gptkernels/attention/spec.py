"""Inputs, shapes and costs of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels._spec import Case, Cost, Inputs, OpSpec
from gptkernels.attention import reference
from gptkernels.attention.api import attention


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
    layout: str = "contiguous",
) -> Case:
    name = f"B{batch}-H{heads}-T{queries}-D{head_dim}" + ("-causal" if is_causal else "-full")
    for label, value in (("keys", keys), ("kvheads", kv_heads), ("scale", scale)):
        name += "" if value is None else f"-{label}{value}"
    name += "" if lengths is None else "-lengths"
    name += "" if left_padding is None else "-leftpadded"
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
        "layout": layout,
    }
    return Case(name, parameters)


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    p = case.parameters
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, head_dim = p["batch"], p["heads"], p["kv_heads"], p["head_dim"]

    def draw(count: int, tokens: int) -> Tensor:
        if p["layout"] == "contiguous":
            return torch.randn(batch, count, tokens, head_dim, generator=generator).to(device, dtype)
        if p["layout"] == "transposed":  # head_dim is not the adjacent dimension
            x = torch.randn(batch, count, head_dim, tokens, generator=generator).to(device, dtype)
            return x.transpose(2, 3)
        raise ValueError(f"layout: got {p['layout']!r}")

    if p["layout"] == "packed":  # slices of one qkv projection, (B, T, 3 H D) in memory
        packed = torch.randn(batch, p["queries"], 3, heads, head_dim, generator=generator).to(device, dtype)
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
    return Inputs(tensors, {"is_causal": p["is_causal"], "scale": p["scale"]})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    p = case.parameters
    batch, heads, queries, keys, head_dim = (p[n] for n in ("batch", "heads", "queries", "keys", "head_dim"))
    pairs = queries * keys
    if p["is_causal"]:  # the convention of the FlashAttention papers: half of the square
        pairs = queries * keys - queries * queries // 2 if keys >= queries else keys * keys // 2
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
        _case(2, 2, 40, 24, layout="packed"),
        _case(1, 2, 33, 16, layout="transposed"),
    ),
    bench_cases=(
        *(_case(16384 // tokens, 12, tokens, 64) for tokens in (512, 1024, 2048, 4096)),
        *(_case(16384 // tokens, 16, tokens, 128) for tokens in (1024, 4096)),
        _case(4, 12, 1024, 64, is_causal=False),
    ),
)
