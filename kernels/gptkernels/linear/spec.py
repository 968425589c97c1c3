"""Inputs, shapes and costs of linear."""

from __future__ import annotations

import torch

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec
from gptkernels.linear import reference
from gptkernels.linear.api import linear


def _case(rows: tuple[int, ...], depth: int, n: int, *, bias: bool = True, layout: str = "contiguous") -> Case:
    name = f"{'x'.join(map(str, rows))}x{depth}-N{n}" + ("" if bias else "-nobias")
    name += "" if layout == "contiguous" else f"-{layout}"
    return Case(name, {"rows": rows, "depth": depth, "n": n, "bias": bias, "layout": layout})


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draws = Draws(device, seed)
    p = case.parameters
    rows, depth, n = p["rows"], p["depth"], p["n"]
    x = draws.normal(*rows, depth)
    weight = draws.normal(n, depth) / max(depth, 1) ** 0.5
    bias = draws.normal(n) if p["bias"] else None
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    if p["layout"] == "slice":  # of wider tensors, at odd addresses
        x = torch.cat([x, x[..., :1]], dim=-1)[..., :depth]
        weight = torch.cat([weight[:, :1], weight], dim=1)[:, 1:]
    elif p["layout"] == "transposed":
        x = x.mT.contiguous().mT
        weight = weight.T.contiguous().T
    return Inputs({"x": x, "weight": weight, "bias": None if bias is None else bias.to(device, dtype)})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    p = case.parameters
    rows, depth, n = torch.Size(p["rows"]).numel(), p["depth"], p["n"]
    product = 2 * rows * depth * n
    moved = (rows * (depth + n) + depth * n) * dtype.itemsize
    return Cost(forward_flops=product, backward_flops=2 * product, forward_bytes=moved, backward_bytes=2 * moved)


SPEC = OpSpec(
    name="linear",
    function=linear,
    reference=reference.linear,
    make_inputs=_make_inputs,
    cost=_cost,
    cases=(
        _case((1,), 1, 1),
        _case((1,), 768, 33),
        _case((2,), 17, 5, bias=False),
        _case((3,), 100, 70),
        _case((1, 4), 65, 130),
        _case((7,), 40, 64),
        _case((16,), 33, 31, bias=False),
        _case((17,), 33, 31),
        _case((0,), 17, 5),
        _case((3,), 0, 5),
        _case((2, 19), 96, 47, layout="slice"),
        _case((6,), 24, 50, layout="slice"),
        _case((2, 19), 96, 47, layout="transposed"),
        _case((6,), 24, 50, layout="transposed"),
        # Several blocks in each dimension, the last one shorter.
        _case((70,), 300, 140),
        _case((333,), 257, 600, bias=False),
    ),
    bench_cases=(
        _case((1,), 768, 50257, bias=False),
        _case((1,), 768, 3072),
        _case((4,), 3072, 768),
        _case((1024,), 768, 768),
        _case((1024,), 768, 3072),
    ),
    cpu_cases=(_case((1,), 768, 50257, bias=False),),
)
