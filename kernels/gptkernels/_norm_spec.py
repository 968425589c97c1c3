"""Inputs, shapes and costs of the norms, alone and after a residual sum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec, Output


def _case(
    *shape: int,
    weight: bool = True,
    bias: bool = True,
    parameter_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
) -> Case:
    name = "x".join(map(str, shape))
    name += "" if weight else "-noweight"
    name += "" if bias else "-nobias"
    name += "" if parameter_dtype is None else f"-{str(parameter_dtype).removeprefix('torch.')}_parameters"
    name += "" if residual_dtype is None else f"-{str(residual_dtype).removeprefix('torch.')}_residual"
    name += "" if layout == "contiguous" else f"-{layout}"
    return Case(
        name,
        {
            "shape": shape,
            "weight": weight,
            "bias": bias,
            "parameter_dtype": parameter_dtype,
            "residual_dtype": residual_dtype,
            "layout": layout,
        },
    )


def _make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    draws = Draws(device, seed)
    p = case.parameters
    *lead, columns = p["shape"]
    # A mean far from zero would reveal a variance computed as E[x^2] - E[x]^2.
    if p["layout"] == "slice":  # rows inside a wider tensor, as in a packed projection
        x = (draws.normal(*lead, columns + 5) + 3.0).to(device, dtype)[..., 2 : 2 + columns]
    elif p["layout"] == "transposed":
        x = (draws.normal(columns, *lead) + 3.0).to(device, dtype).movedim(0, -1)
    else:
        x = (draws.normal(*lead, columns) + 3.0).to(device, dtype)
    parameter_dtype = p["parameter_dtype"] or dtype
    weight = (1 + 0.5 * draws.normal(columns)).to(device, parameter_dtype)
    bias = draws.normal(columns).to(device, parameter_dtype)
    return Inputs({"x": x, "weight": weight if p["weight"] else None, "bias": bias if p["bias"] else None})


def _make_add_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    inputs = _make_inputs(case, dtype, device, seed)
    x = inputs.tensors["x"]
    assert x is not None
    residual = Draws(device, seed + 1).normal(*x.shape)
    residual = residual.to(device, case.parameters["residual_dtype"] or dtype)
    return Inputs({"x": x, "residual": residual} | inputs.tensors)


def _cost(case: Case, dtype: torch.dtype) -> Cost:
    *lead, columns = case.parameters["shape"]
    rows = math.prod(lead)
    elements, itemsize = rows * columns, dtype.itemsize
    parameters = 2 * columns * itemsize
    return Cost(
        forward_flops=8 * elements,
        backward_flops=14 * elements,
        forward_bytes=2 * elements * itemsize + parameters + 8 * rows,
        backward_bytes=3 * elements * itemsize + parameters * 3 // 2 + 8 * rows,
    )


def norm(name: str, function: Callable[..., Output], reference: Callable[..., Output]) -> OpSpec:
    """The specification of a norm."""
    return OpSpec(
        name=name,
        function=function,
        reference=reference,
        make_inputs=_make_inputs,
        cost=_cost,
        cases=(
            _case(7),
            _case(1, 1),
            _case(3, 1),
            _case(5, 2),
            _case(33, 17),
            _case(2, 3, 65),
            _case(9, 768),
            _case(70, 100),
            _case(4, 1023),
            _case(3, 4097),
            _case(20, 8193),
            _case(5, 20011),
            _case(3, 20011, weight=False, bias=False),
            _case(2, 33001),
            _case(9, 65, weight=False, bias=False),
            _case(9, 65, weight=False),
            _case(9, 65, bias=False),
            _case(9, 96, parameter_dtype=torch.float32),
            _case(4, 9, 33, layout="slice"),
            _case(6, 40, layout="transposed"),
        ),
        bench_cases=(
            *(_case(4096, columns) for columns in (768, 1024, 2048, 4096, 8192, 32768)),
            _case(32768, 1024),
        ),
        cpu_cases=(_case(4096, 768),),
        compile_cases=(
            _case(4096, 768),
            _case(4096, 8192),
            _case(4096, 16384, parameter_dtype=torch.float32),
            _case(4096, 65536, weight=False, bias=False),
        ),
    )


def _add_cost(case: Case, dtype: torch.dtype) -> Cost:
    alone, stream = _cost(case, dtype), math.prod(case.parameters["shape"])
    itemsize = (case.parameters["residual_dtype"] or dtype).itemsize
    return Cost(
        forward_flops=alone.forward_flops + stream,
        backward_flops=alone.backward_flops + stream,
        forward_bytes=alone.forward_bytes + 2 * stream * itemsize,
        backward_bytes=alone.backward_bytes + stream * itemsize,
    )


def add_norm(name: str, function: Callable[..., Output], reference: Callable[..., Output]) -> OpSpec:
    """The specification of a residual sum and its norm."""
    return OpSpec(
        name=name,
        function=function,
        reference=reference,
        make_inputs=_make_add_inputs,
        cost=_add_cost,
        cases=(
            _case(7),
            _case(1, 1),
            _case(3, 1),
            _case(5, 2),
            _case(33, 17),
            _case(0, 9),
            _case(2, 3, 65),
            _case(70, 100),
            _case(9, 768, residual_dtype=torch.float32),
            _case(9, 96, parameter_dtype=torch.float32, residual_dtype=torch.float32),
            _case(3, 20011),
            _case(12, 8193, residual_dtype=torch.float32),
            _case(9, 65, weight=False, bias=False),
            _case(9, 65, bias=False, residual_dtype=torch.float32),
            _case(4, 9, 33, layout="slice"),
            _case(6, 40, layout="transposed"),
        ),
        bench_cases=tuple(_case(4096, columns) for columns in (768, 1024, 4096)),
        cpu_cases=(_case(4096, 768),),
        compile_cases=(
            _case(4096, 768),
            _case(4096, 8192, parameter_dtype=torch.float32, residual_dtype=torch.float32),
            _case(4096, 65536),
        ),
    )


def without_bias(other: OpSpec) -> OpSpec:
    """Returns `other` for a norm without a bias, without the cases that differ only in the bias."""

    def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = other.make_inputs(case, dtype, device, seed)
        return Inputs({name: t for name, t in inputs.tensors.items() if name != "bias"})

    def distinct(cases: tuple[Case, ...]) -> tuple[Case, ...]:
        return tuple(
            Case(case.name.replace("-nobias", ""), {**case.parameters, "bias": False})
            for case in cases
            if case.parameters["bias"] or not case.parameters["weight"]
        )

    return dataclasses.replace(
        other,
        make_inputs=make_inputs,
        cases=distinct(other.cases),
        compile_cases=distinct(other.compile_cases),
    )
