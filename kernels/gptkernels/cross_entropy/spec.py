"""Inputs, shapes and costs of cross_entropy."""

from __future__ import annotations

import math

import torch

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec
from gptkernels.cross_entropy import reference
from gptkernels.cross_entropy.api import cross_entropy


def _case(*shape: int, reduction: str = "mean", ignored: float = 0.0, layout: str = "contiguous") -> Case:
    name = "x".join(map(str, shape)) + ("" if reduction == "mean" else f"-{reduction}")
    name += "" if ignored == 0.0 else f"-ignored{ignored:g}"
    name += "" if layout == "contiguous" else f"-{layout}"
    return Case(name, {"shape": shape, "reduction": reduction, "ignored": ignored, "layout": layout})


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draws = Draws(device, seed)
    p = case.parameters
    *lead, classes = p["shape"]
    # Logits of a trained model: a spread of a few units, far from zero.
    if p["layout"] == "slice":
        logits = (4 * draws.normal(*lead, classes + 5) + 20.0).to(device, dtype)[..., 2 : 2 + classes]
    elif p["layout"] == "transposed":
        logits = (4 * draws.normal(classes, *lead) + 20.0).to(device, dtype).movedim(0, -1)
    else:
        logits = (4 * draws.normal(*lead, classes) + 20.0).to(device, dtype)
    target = draws.integers(classes, *lead)
    target[draws.uniform(*lead) < p["ignored"]] = -100
    return Inputs({"logits": logits, "target": target.to(device)}, {"reduction": p["reduction"]})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    elements = math.prod(case.parameters["shape"])
    return Cost(
        forward_flops=4 * elements,
        backward_flops=3 * elements,
        forward_bytes=elements * dtype.itemsize,
        backward_bytes=2 * elements * dtype.itemsize,
    )


SPEC = OpSpec(
    name="cross_entropy",
    function=cross_entropy,
    reference=reference.cross_entropy,
    make_inputs=_make_inputs,
    cost=_cost,
    cases=(
        _case(1, 1),
        _case(3, 1),
        _case(5, 2),
        _case(33, 17),
        _case(33, 17, reduction="sum"),
        _case(33, 17, reduction="none"),
        _case(700, 2),
        _case(300, 3, reduction="none", ignored=0.5),
        _case(0, 9, reduction="sum"),
        _case(0, 9, reduction="none"),
        _case(2, 3, 65),
        _case(9, 1023, ignored=0.5),
        _case(9, 1023, ignored=0.5, reduction="sum"),
        _case(9, 100, ignored=0.5, reduction="none"),
        _case(4, 50257),
        _case(2, 131072, reduction="none"),
        _case(9, 33003, reduction="none", ignored=0.3),
        _case(3, 33003, layout="slice"),
        _case(70, 100, layout="slice"),
        _case(6, 40, layout="transposed"),
        _case(6, 40, layout="transposed", reduction="none"),
    ),
    bench_cases=(
        _case(1024, 50257),
        _case(4096, 4096),
        _case(16384, 50257),
        _case(8192, 32000),
        _case(4096, 128256),
        _case(262144, 2),
    ),
    cpu_cases=(_case(256, 50257),),
    compile_cases=(_case(16384, 50257), _case(8192, 32000), _case(4096, 128256, reduction="none")),
)
