"""What an operation's ``spec.py`` is made of: cases that tests and benches iterate over, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Output = Tensor | tuple[Tensor, ...]
"""What an operation returns."""


@dataclass(frozen=True)
class Case:
    """One input of an operation: a readable name and the parameters that `OpSpec.make_inputs` builds it from."""

    name: str
    parameters: Mapping[str, Any]


@dataclass
class Inputs:
    """An operation's keyword arguments: tensors (floating ones are differentiated) and plain options."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    def differentiable(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.tensors.items() if t is not None and t.dtype.is_floating_point}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same inputs with `change` applied to every floating-point tensor."""
        floating = self.differentiable()
        tensors = {n: change(t) if t is not None and n in floating else t for n, t in self.tensors.items()}
        return Inputs(tensors, self.options)


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations, and the fewest bytes that must move (inputs read and outputs written once)."""

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class OpSpec:
    """Everything that tests and benches need to know of one operation.

    `make_inputs(case, dtype, device, seed)` draws the inputs on the CPU, so that every device gets the same numbers.
    `reference` takes the same keyword arguments as `function`, without `backend`. `compile_cases` are for compile_report
    alone, where tensors have no data: each variant of the Triton kernels once or twice, at the size that users run.
    """

    name: str
    function: Callable[..., Output]
    reference: Callable[..., Output]
    make_inputs: Callable[[Case, torch.dtype, torch.device, int], Inputs]
    cost: Callable[[Case, torch.dtype], Cost]
    cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    compile_cases: tuple[Case, ...] = ()
