"""What a ``spec.py`` consists of: an operation's cases, which tests and benches iterate over, and what each costs."""

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


class Draws:
    """Draws random tensors from one seed: on the GPU if `device` is one, since billions of numbers take a CPU minutes.

    Else they are drawn on the default device, which may be "meta" (tensors without data).
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device if device.type == "cuda" else None
        self._generator = torch.Generator(self.device or "cpu").manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Normal, mean 0 and variance 1, float32."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform from 0 to 1, float32."""
        return torch.rand(shape, generator=self._generator, device=self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Uniform from 0 to ``below - 1``, int64."""
        return torch.randint(below, shape, generator=self._generator, device=self.device)


@dataclass(frozen=True)
class Cost:
    """The work of one call: floating-point operations, and the fewest bytes that must move (each tensor read or written once)."""

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class OpSpec:
    """Everything that tests and benches need to know about one operation.

    `make_inputs(case, dtype, device, seed)` draws the inputs by `Draws`. `reference` takes the keyword arguments of
    `function` but `backend`. `compile_cases` are for compile_report, where tensors have no data: each variant of the Triton
    kernels once or twice, at sizes that users run. bench.cpu times `cpu_cases`; `bench_cases` are sized for a GPU.
    """

    name: str
    function: Callable[..., Output]
    reference: Callable[..., Output]
    make_inputs: Callable[[Case, torch.dtype, torch.device, int], Inputs]
    cost: Callable[[Case, torch.dtype], Cost]
    cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    compile_cases: tuple[Case, ...] = ()
    cpu_cases: tuple[Case, ...] = ()
