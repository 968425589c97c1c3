"""Inputs, shapes and costs of linear_cross_entropy."""

from __future__ import annotations

import torch

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec
from gptkernels.linear_cross_entropy import reference
from gptkernels.linear_cross_entropy.api import linear_cross_entropy


def _case(
    tokens: tuple[int, ...],
    width: int,
    classes: int,
    *,
    bias: bool = False,
    reduction: str = "mean",
    ignored: float = 0.0,
    layout: str = "contiguous",
) -> Case:
    name = "x".join(map(str, tokens)) + f"-C{width}-V{classes}" + ("-bias" if bias else "")
    name += "" if reduction == "mean" else f"-{reduction}"
    name += "" if ignored == 0.0 else f"-ignored{ignored:g}"
    name += "" if layout == "contiguous" else f"-{layout}"
    parameters = {"tokens": tokens, "width": width, "classes": classes, "bias": bias, "reduction": reduction}
    return Case(name, parameters | {"ignored": ignored, "layout": layout})


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draws = Draws(device, seed)
    p = case.parameters
    tokens, width, classes = p["tokens"], p["width"], p["classes"]
    if p["layout"] == "slice":
        x = draws.normal(*tokens, width + 5).to(device, dtype)[..., 2 : 2 + width]
    elif p["layout"] == "transposed":
        x = draws.normal(width, *tokens).to(device, dtype).movedim(0, -1)
    else:
        x = draws.normal(*tokens, width).to(device, dtype)
    # Logits with a spread of about two units.
    weight = (2 * draws.normal(classes, width) / width**0.5).to(device, dtype)
    bias = draws.normal(classes).to(device, dtype) if p["bias"] else None
    target = draws.integers(classes, *tokens)
    target[draws.uniform(*tokens) < p["ignored"]] = -100
    tensors = {"x": x, "weight": weight, "target": target.to(device), "bias": bias}
    return Inputs(tensors, {"reduction": p["reduction"]})


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    p = case.parameters
    tokens, width, classes = torch.Size(p["tokens"]).numel(), p["width"], p["classes"]
    product = 2 * tokens * width * classes
    read = (tokens * width + classes * width) * dtype.itemsize
    return Cost(forward_flops=product, backward_flops=2 * product, forward_bytes=read, backward_bytes=2 * read)


SPEC = OpSpec(
    name="linear_cross_entropy",
    function=linear_cross_entropy,
    reference=reference.linear_cross_entropy,
    make_inputs=_make_inputs,
    cost=_cost,
    cases=(
        _case((1,), 1, 1),
        _case((3,), 5, 2),
        _case((33,), 16, 17),
        _case((33,), 16, 17, bias=True, reduction="sum"),
        _case((33,), 16, 17, bias=True, reduction="none"),
        _case((0,), 16, 17, bias=True, reduction="sum"),
        _case((2, 3), 64, 65),
        _case((70,), 96, 300, ignored=0.5),
        _case((9,), 33, 1000, ignored=0.5, bias=True, reduction="none"),
        _case((20,), 40, 100, layout="slice"),
        _case((20,), 40, 100, layout="transposed"),
        _case((6,), 8, 40_003, bias=True, ignored=0.5),
    ),
    bench_cases=(_case((1024,), 768, 50257), _case((4096,), 256, 4096), _case((16384,), 768, 50257)),
    cpu_cases=(_case((1024,), 768, 50257),),
    compile_cases=(_case((16384,), 768, 50257, bias=True), _case((4096,), 4096, 32000, reduction="none")),
)
