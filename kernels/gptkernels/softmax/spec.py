"""Inputs, shapes and costs of softmax."""

from __future__ import annotations

import math

import torch

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec
from gptkernels.softmax import reference
from gptkernels.softmax.api import softmax


def _case(*shape: int, dim: int = -1, scale: float = 1.0, causal: bool = False, layout: str = "contiguous") -> Case:
    name = "x".join(map(str, shape))
    name += "" if dim == -1 else f"-dim{dim}"
    name += "" if scale == 1.0 else f"-scale{scale:g}"
    name += "-causal" if causal else ""
    name += "" if layout == "contiguous" else f"-{layout}"
    return Case(name, {"shape": shape, "dim": dim, "scale": scale, "causal": causal, "layout": layout})


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draws = Draws(device, seed)
    p = case.parameters
    *lead, columns = p["shape"]
    # Scores of a trained model: a spread of a few units, far from zero.
    if p["layout"] == "slice":  # rows inside a wider tensor
        x = (4 * draws.normal(*lead, columns + 5) + 20.0).to(device, dtype)[..., 2 : 2 + columns]
    elif p["layout"] == "transposed":
        x = (4 * draws.normal(columns, *lead) + 20.0).to(device, dtype).movedim(0, -1)
    elif p["layout"] == "masked":  # some columns, and one whole row, are -inf
        x = 4 * draws.normal(*lead, columns)
        x[draws.uniform(*x.shape) < 0.3] = -math.inf
        x.reshape(-1, columns)[0] = -math.inf
        x = x.to(device, dtype)
    else:
        x = (4 * draws.normal(*lead, columns) + 20.0).to(device, dtype)
    return Inputs({"x": x}, {"dim": p["dim"], "scale": p["scale"], "causal": p["causal"]})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    p = case.parameters
    written = math.prod(p["shape"])
    read = written
    if p["causal"]:  # only the triangle that the queries keep is read; all is written
        queries, keys = p["shape"][-2:]
        kept = sum(min(max(i + 1 + keys - queries, 0), keys) for i in range(queries))
        read = written // (queries * keys) * kept
    return Cost(
        forward_flops=5 * read,
        backward_flops=5 * read,
        forward_bytes=(read + written) * dtype.itemsize,
        backward_bytes=(2 * read + written) * dtype.itemsize,
    )


SPEC = OpSpec(
    name="softmax",
    function=softmax,
    reference=reference.softmax,
    make_inputs=_make_inputs,
    cost=_cost,
    cases=(
        _case(7),
        _case(1, 1),
        _case(3, 1),
        _case(5, 2),
        _case(33, 17),
        _case(0, 9),
        _case(9, 0),
        _case(2, 3, 65, scale=0.125),
        _case(40, 100, scale=3.0),
        _case(5, 1023),
        _case(2, 16385),
        _case(2, 32769),
        _case(3, 50257),
        _case(2, 131072, scale=0.5),
        _case(17, 9, dim=0),
        _case(4, 33, 70, dim=1, scale=0.5),
        _case(2, 300, 3, dim=-2),
        _case(5, 9, 1, dim=1),
        _case(2, 3, 37, 37, causal=True, scale=0.125),
        _case(2, 5, 64, causal=True),
        _case(2, 40, 33, causal=True),
        _case(40, 48, causal=True),
        _case(3, 40001, causal=True),
        _case(4, 9, 33, layout="slice"),
        _case(6, 40, layout="transposed"),
        _case(6, 40, layout="masked"),
        _case(6, 40, dim=0, layout="masked"),
        _case(2, 40001, layout="masked"),
    ),
    bench_cases=(
        *(_case(4096, columns) for columns in (1024, 4096, 8192, 32768, 50257, 131072)),
        _case(32768, 1024),
        _case(4, 12, 1024, 1024, scale=0.125, causal=True),
        _case(8, 1024, 1024, dim=1),
        _case(64, 65536, causal=True),
    ),
    cpu_cases=(_case(4096, 1024), _case(4, 12, 1024, 1024, causal=True)),
    compile_cases=(
        _case(4096, 768),
        _case(4096, 16384),
        _case(4096, 32768),
        _case(4096, 50257),
        _case(4, 12, 1024, 1024, scale=0.125, causal=True),
        _case(64, 65536, causal=True),
        _case(100_000, 64, 32, dim=1),
    ),
)
