"""Inputs, shapes and costs of rms_norm and add_rms_norm: layer_norm's, without the bias."""

from __future__ import annotations

import dataclasses

import torch

from gptkernels._spec import Case, Inputs, OpSpec
from gptkernels.layer_norm import spec as layer_norm
from gptkernels.rms_norm import reference
from gptkernels.rms_norm.api import add_rms_norm, rms_norm


def _without_bias(other: OpSpec) -> OpSpec:
    """`other`'s inputs, and its cases that differ in more than the bias."""

    def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        inputs = other.make_inputs(case, dtype, device, seed)
        return Inputs({name: t for name, t in inputs.tensors.items() if name != "bias"})

    def without_bias(cases: tuple[Case, ...]) -> tuple[Case, ...]:
        return tuple(
            Case(case.name.replace("-nobias", ""), {**case.parameters, "bias": False})
            for case in cases
            if case.parameters["bias"] or not case.parameters["weight"]
        )

    return dataclasses.replace(
        other,
        make_inputs=make_inputs,
        cases=without_bias(other.cases),
        compile_cases=without_bias(other.compile_cases),
    )


SPEC = dataclasses.replace(
    _without_bias(layer_norm.SPEC), name="rms_norm", function=rms_norm, reference=reference.rms_norm
)
ADD_SPEC = dataclasses.replace(
    _without_bias(layer_norm.ADD_SPEC), name="add_rms_norm", function=add_rms_norm, reference=reference.add_rms_norm
)
