"""Inputs, shapes and costs of gelu and swiglu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec
from gptkernels.activation import reference
from gptkernels.activation.api import gelu, swiglu


def _case(
    *shape: int,
    bias: bool = True,
    approximate: str = "tanh",
    bias_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
) -> Case:
    name = "x".join(map(str, shape)) + ("" if bias else "-nobias") + ("" if approximate == "tanh" else "-exact")
    name += "" if bias_dtype is None else f"-{str(bias_dtype).removeprefix('torch.')}_bias"
    name += "" if layout == "contiguous" else f"-{layout}"
    parameters = {"shape": shape, "bias": bias, "approximate": approximate, "bias_dtype": bias_dtype}
    return Case(name, parameters | {"layout": layout})


def _draw(case: Case, dtype: torch.dtype, device: torch.device, draws: Draws) -> Tensor:
    *lead, columns = case.parameters["shape"]
    if case.parameters["layout"] == "slice":
        return (3 * draws.normal(*lead, columns + 5)).to(device, dtype)[..., 2 : 2 + columns]
    if case.parameters["layout"] == "transposed":
        return (3 * draws.normal(columns, *lead)).to(device, dtype).movedim(0, -1)
    return (3 * draws.normal(*lead, columns)).to(device, dtype)


def _gelu_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draws = Draws(device, seed)
    p = case.parameters
    x = _draw(case, dtype, device, draws)
    bias = draws.normal(x.shape[-1]).to(device, p["bias_dtype"] or dtype) if p["bias"] else None
    return Inputs({"x": x, "bias": bias}, {"approximate": p["approximate"]})


def _swiglu_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draws = Draws(device, seed)
    return Inputs({name: _draw(case, dtype, device, draws) for name in ("gate", "up")})


def _gelu_cost(case: Case, dtype: torch.dtype) -> Cost:
    elements = math.prod(case.parameters["shape"])
    moved = elements * dtype.itemsize
    return Cost(
        forward_flops=12 * elements, backward_flops=20 * elements, forward_bytes=2 * moved, backward_bytes=3 * moved
    )


def _swiglu_cost(case: Case, dtype: torch.dtype) -> Cost:
    elements = math.prod(case.parameters["shape"])
    moved = elements * dtype.itemsize
    return Cost(
        forward_flops=6 * elements, backward_flops=14 * elements, forward_bytes=3 * moved, backward_bytes=5 * moved
    )


GELU_SPEC = OpSpec(
    name="gelu",
    function=gelu,
    reference=reference.gelu,
    make_inputs=_gelu_inputs,
    cost=_gelu_cost,
    cases=(
        _case(7),
        _case(1, 1),
        _case(3, 1, approximate="none"),
        _case(5, 2),
        _case(33, 17),
        _case(33, 17, approximate="none"),
        _case(0, 9),
        _case(9, 0),
        _case(2, 3, 65, bias=False),
        _case(2, 3, 65, bias=False, approximate="none"),
        _case(70, 100, bias_dtype=torch.float32),
        _case(9, 3072),
        _case(8, 1024, bias=False),
        _case(4, 9, 33, layout="slice"),
        _case(4, 9, 33, bias=False, layout="slice"),
        _case(6, 40, layout="transposed"),
    ),
    bench_cases=(_case(4096, 3072), _case(4096, 3072, approximate="none"), _case(16384, 4096)),
    cpu_cases=(_case(4096, 3072),),
    compile_cases=(_case(4096, 3072), _case(16384, 4096, bias=False), _case(4096, 3072, layout="slice")),
)
SWIGLU_SPEC = OpSpec(
    name="swiglu",
    function=swiglu,
    reference=reference.swiglu,
    make_inputs=_swiglu_inputs,
    cost=_swiglu_cost,
    cases=(
        _case(7),
        _case(1, 1),
        _case(5, 2),
        _case(33, 17),
        _case(0, 9),
        _case(2, 3, 65),
        _case(9, 2048),
        _case(4, 9, 33, layout="slice"),
        _case(6, 40, layout="transposed"),
    ),
    bench_cases=(_case(4096, 3072), _case(16384, 4096)),
    cpu_cases=(_case(4096, 3072),),
    compile_cases=(_case(16384, 4096), _case(4096, 3072, layout="slice")),
)
