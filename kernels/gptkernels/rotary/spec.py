"""Inputs, shapes and costs of rotary."""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec
from gptkernels.rotary import reference
from gptkernels.rotary.api import rotary


def _case(
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    *,
    rotated: int | None = None,
    interleaved: bool = False,
    positions: str = "shared",
    table_dtype: torch.dtype | None = None,
    layout: str = "transposed",
) -> Case:
    name = f"B{batch}-H{heads}-T{tokens}-D{head_dim}"
    name += "" if rotated is None else f"-R{rotated}"
    name += "-interleaved" if interleaved else ""
    name += "" if positions == "shared" else f"-{positions}"
    name += "" if table_dtype is None else f"-{str(table_dtype).removeprefix('torch.')}_tables"
    name += "" if layout == "transposed" else f"-{layout}"
    parameters = {
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
        "head_dim": head_dim,
        "rotated": rotated or head_dim // 2 * 2,
        "interleaved": interleaved,
        "positions": positions,
        "table_dtype": table_dtype,
        "layout": layout,
    }
    return Case(name, parameters)


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    p = case.parameters
    draws = Draws(device, seed)
    batch, heads, tokens, head_dim, rotated = (p[n] for n in ("batch", "heads", "tokens", "head_dim", "rotated"))

    def draw(*shape: int) -> Tensor:
        return draws.normal(*shape).to(device, dtype)

    if p["layout"] == "transposed":  # a projection's (B, T, H D), split into heads
        x = draw(batch, tokens, heads, head_dim).transpose(1, 2)
    elif p["layout"] == "packed":  # the key's slice of one qkv projection
        x = draw(batch, tokens, 3, heads, head_dim)[:, :, 1].transpose(1, 2)
    elif p["layout"] == "contiguous":
        x = draw(batch, heads, tokens, head_dim)
    else:  # head_dim is not the adjacent dimension
        assert p["layout"] == "scattered"
        x = draw(batch, heads, head_dim, tokens).transpose(2, 3)

    position = torch.arange(tokens, device=draws.device)
    if p["positions"] == "own":  # each sequence is padded on its left
        padding = draws.integers(tokens + 1, batch, 1)
        position = (position - padding).clamp(min=0)  # (B, T)
    frequencies = 10_000.0 ** -(torch.arange(0, rotated, 2) / rotated)
    angles = position[..., None] * frequencies  # (T, R/2) or (B, T, R/2)
    cos, sin = (table.to(device, p["table_dtype"] or dtype) for table in (angles.cos(), angles.sin()))
    # Tables are not differentiated: options, not tensors.
    return Inputs({"x": x}, {"cos": cos, "sin": sin, "interleaved": p["interleaved"]})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    p = case.parameters
    rows = p["batch"] * p["heads"] * p["tokens"]
    angles = (p["batch"] if p["positions"] == "own" else 1) * p["tokens"] * p["rotated"] // 2
    flops = 3 * rows * p["rotated"]
    moved = 2 * rows * p["head_dim"] * dtype.itemsize + 2 * angles * (p["table_dtype"] or dtype).itemsize
    return Cost(forward_flops=flops, backward_flops=flops, forward_bytes=moved, backward_bytes=moved)


SPEC = OpSpec(
    name="rotary",
    function=rotary,
    reference=reference.rotary,
    make_inputs=_make_inputs,
    cost=_cost,
    cases=(
        _case(1, 1, 1, 2),
        _case(1, 1, 1, 2, interleaved=True),
        _case(0, 2, 3, 8),
        _case(2, 3, 0, 8, interleaved=True),
        _case(2, 3, 19, 64),
        _case(2, 3, 19, 64, interleaved=True),
        _case(2, 4, 9, 128, table_dtype=torch.float32),
        _case(3, 8, 1, 64, positions="own", table_dtype=torch.float32),
        _case(1, 6, 33, 80, interleaved=True, table_dtype=torch.float32),
        _case(1, 2, 17, 96, rotated=24),
        _case(1, 2, 17, 96, rotated=24, interleaved=True),
        _case(1, 4, 7, 71, rotated=22),
        _case(1, 4, 7, 71, rotated=22, interleaved=True),
        _case(1, 1, 5, 1100),
        _case(1, 2, 3, 1100, interleaved=True),
        _case(3, 2, 21, 32, positions="own"),
        _case(3, 2, 21, 32, positions="own", interleaved=True, layout="packed"),
        _case(2, 5, 40, 64, layout="packed"),
        _case(2, 4, 70, 24, layout="contiguous"),
        _case(2, 3, 11, 16, layout="scattered"),
    ),
    bench_cases=(
        _case(4, 32, 4096, 128),
        _case(4, 8, 4096, 128),
        _case(4, 32, 4096, 128, interleaved=True),
        _case(4, 32, 4096, 128, table_dtype=torch.float32),
        _case(8, 12, 1024, 64, layout="packed"),
        _case(8, 12, 1024, 64, interleaved=True, layout="packed"),
        _case(4, 32, 2048, 80, rotated=32),
        _case(4, 16, 2048, 256, rotated=64, interleaved=True),
        _case(64, 32, 1, 128, positions="own"),
    ),
    cpu_cases=(_case(8, 12, 1024, 64, layout="packed"),),
    compile_cases=(
        _case(4, 32, 4096, 128),
        _case(8, 12, 1024, 64, interleaved=True, layout="packed"),
        _case(4, 32, 2048, 80, rotated=32, table_dtype=torch.float32),
        _case(64, 32, 1, 128, positions="own"),
    ),
)
