"""Asks a module that somebody else wrote what it computes: the one probe behind everything that is recognised.

A module's class may do anything: clamp what is large, drop at random while training, treat one dtype in its own way, count
its calls. So its forward is run in both modes and in four dtypes on numbers of 1e-3 to 1e4, infinities and NaN among them,
and its gradients are compared too. It runs on a double which holds nothing but what our own forward reads. What else it
asks the double for is a constant, which `relies_on` notes and `gptkernels.swap` compares at every call, or a reason to
leave the module alone. Neither the module nor the caller's random numbers, devices and modes are touched, and none of
them have a say in the verdict.
"""

from __future__ import annotations

import functools
import inspect
import random
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Compute = Callable[..., Tensor]
"""What a stranger makes of ``(training, **inputs)``."""
Exact = Callable[..., tuple[Tensor, Tensor | float]]
"""What ours makes of ``**inputs``, and beside it what a rounding on the way to it is in proportion to."""


class Doubt(Exception):
    """A stranger does what no comparison of results can judge; the message says what, after its name."""


class Absent:
    """Stands for an attribute that a module was asked for and does not have."""


_CONSTANTS = (
    bool, int, float, str, type, type(None), torch.dtype,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial,
)  # fmt: skip
_CODE = (types.FunctionType, staticmethod, classmethod, property)


def _is_constant(value: Any) -> bool:
    return all(map(_is_constant, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANTS)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Runs strangers' code on the CPU in PyTorch's initial state, whatever the caller's; and gives that back after it.

    Default devices, FakeTensorMode and what else stands in PyTorch's mode stacks, autocast, inference mode, the default
    dtype and warnings do not reach it; random numbers that it draws are put back.
    """
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        drawn, python, dtype = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_rng_state(drawn)
            random.setstate(python)


def logarithmic(*shape: int, generator: torch.Generator) -> Tensor:
    """Numbers of either sign and of every magnitude from 1e-3 to 1e4, float64."""
    exponent = torch.empty(shape, dtype=torch.float64).uniform_(-3, 4, generator=generator)
    return torch.pow(10.0, exponent) * torch.empty_like(exponent).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def asked(module: nn.Module, attributes: Callable[..., dict[str, Any]], relies_on: dict[str, Any]) -> Compute:
    """What `module`'s class computes of ``x`` where a module has these attributes, made of the other inputs.

    Every constant that it reads beside them goes into `relies_on`. Attributes that it sets, and those that it reads and
    that are no constants, are a `Doubt`.
    """
    original: Any = type(module)

    def compute(training: bool, x: Tensor, **others: Tensor) -> Tensor:
        own = {**vars(nn.Module()), **attributes(**others), "training": training}
        doubts: list[str] = []

        def read(self: Any, name: str) -> Any:
            of_class = inspect.getattr_static(original, name, Absent)
            if name in own or (isinstance(of_class, _CODE) and name not in vars(module)):
                return original.__getattribute__(self, name)
            state = {**module._parameters, **module._buffers, **module._modules}
            value = vars(module).get(name, state.get(name, of_class))
            if value is Absent:
                relies_on[name] = Absent
                return absent(self, name)
            if not _is_constant(value):
                doubts.append(f"reads its {name!r}, which may change")
                raise Doubt(doubts[0])
            relies_on[name] = value
            if isinstance(value, types.MethodType) and value.__self__ is module:
                return types.MethodType(value.__func__, self)
            return value

        def absent(self: Any, name: str) -> Any:
            raise AttributeError(f"{original.__name__!r} object has no attribute {name!r}")

        def write(self: Any, name: str, *value: Any) -> None:
            doubts.append(f"changes its {name!r} when it is called")
            raise Doubt(doubts[0])

        body = {"__getattribute__": read, "__getattr__": absent, "__setattr__": write, "__delattr__": write}
        double: Any = object.__new__(type(original.__name__, (_Quiet, original), body))
        object.__getattribute__(double, "__dict__").update(own)
        try:
            return original.forward(double, x)
        finally:
            if doubts:  # though the stranger may have caught it
                raise Doubt(doubts[0])

    return compute


def likeness(module: nn.Module) -> Hashable:
    """Equal for modules that no probe can tell apart."""
    return (
        type(module),
        *((name, value) for name, value in vars(module).items() if _is_constant(value)),
        *((name, value.shape) for name, value in (*module.named_parameters(), *module.named_buffers())),
        *((name, type(child)) for name, child in module.named_children()),
    )


class _Quiet:
    """Before a stranger's class among the bases: that it gets a subclass is none of its business."""

    def __init_subclass__(cls) -> None:
        pass


def agrees(compute: Compute, exact: Exact, inputs: dict[str, Tensor], precision: float) -> bool:
    """Whether `compute` is `exact`, in both modes and every dtype, values and gradients; one that fails is not.

    Args:
        compute: called with `training` and the inputs, in each dtype; what it returns has to be a tensor of that dtype.
        inputs: float64, on the CPU.
        precision: the relative error to grant beside that of eight roundings to the dtype.

    Raises:
        Doubt: what it does cannot be judged by its results.
    """
    with undisturbed():
        before, python = torch.get_rng_state(), random.getstate()
        try:
            same = all(
                _values_agree(
                    compute, exact, {name: value.to(dtype) for name, value in inputs.items()}, mode, precision
                )
                for mode, dtype in product((True, False), DTYPES)
            ) and _gradients_agree(compute, exact, inputs)
        except Doubt:
            raise
        except Exception:
            return False
        if not torch.equal(torch.get_rng_state(), before) or random.getstate() != python:
            raise Doubt("draws random numbers")
        return same


def _values_agree(compute: Compute, exact: Exact, given: dict[str, Tensor], training: bool, precision: float) -> bool:
    kept = {name: value.clone() for name, value in given.items()}
    with torch.set_grad_enabled(training):
        found = compute(training, **given)
    if not all(torch.equal(value.nan_to_num(), kept[name].nan_to_num()) for name, value in given.items()):
        raise Doubt("changes its input")
    with torch.no_grad():
        wide, slack = exact(**kept)
        dtype = kept["x"].dtype
        if type(found) is not Tensor or found.dtype != dtype or found.shape != wide.shape:
            return False
        largest, wide = torch.finfo(dtype).max, wide.double()
        expected, got = wide.to(dtype).double(), found.double()
        error = max(precision, 8 * torch.finfo(dtype).eps) * (expected.abs() + slack)
        right = torch.where(expected.isfinite(), (got - expected).abs() <= error, got == expected)
        right |= ~expected.isfinite() & got.isnan()  # vectorised, PyTorch's own GELU of infinity is NaN
        right |= (wide.abs() > largest / 2) & (wide.abs() < 2 * largest)  # a rounding decides whether it overflows
        return bool(right.all())


def _gradients_agree(compute: Compute, exact: Exact, inputs: dict[str, Tensor]) -> bool:
    gradients = []
    for function in (functools.partial(compute, True), lambda **given: exact(**given)[0]):
        leaves = {name: torch.where(t.isfinite(), t, 1.0).requires_grad_() for name, t in inputs.items()}
        out = function(**leaves)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        gradients.append(torch.autograd.grad(out, list(leaves.values()), grad))
    return all(
        bool(((found - expected).abs() <= 1e-4 * expected.abs().amax(-1, keepdim=True)).all())
        for found, expected in zip(*gradients)
    )
