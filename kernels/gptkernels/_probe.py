"""Finds out whether a module from another library computes what one of our functions computes, by running it.

A module's class may do anything: clamp large numbers, apply dropout in training, treat one dtype specially, count its
calls. Therefore its forward runs in both modes and four dtypes on numbers of 1e-3 to 1e4, infinities and NaN, and its
gradients are compared too.

The forward runs on a stand-in that has only the attributes that our own forward reads. If it reads another attribute that
is a constant, the constant is recorded in `relies_on`, and `gptkernels.swap` compares it at every call. If it does anything
else with an attribute, the module is left alone. The module itself and the caller's random state, devices and modes are not
changed, and do not affect the result.
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
"""The other module's forward, as a function of ``(training, **inputs)``."""
Exact = Callable[..., tuple[Tensor, Tensor | float]]
"""Our formula: the result for ``**inputs``, and the size of the numbers that are rounded on the way to it."""


class Inconclusive(Exception):
    """A module does something that comparing results cannot judge. The message continues a sentence after its name."""


class Missing:
    """The recorded value of an attribute that a module tried to read and does not have."""


_CONSTANTS = (
    bool, int, float, str, type, type(None), torch.dtype,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial,
)  # fmt: skip
_CODE = (types.FunctionType, staticmethod, classmethod, property)


def _is_constant(value: Any) -> bool:
    return all(map(_is_constant, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANTS)


@contextmanager
def isolated() -> Iterator[None]:
    """Runs code on the CPU in PyTorch's initial state, and restores the caller's state afterwards.

    Inside, the caller's default device, FakeTensorMode and other modes, autocast, inference mode, default dtype and warnings
    have no effect. The state of the random generators is restored.
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


def probed(module: nn.Module, attributes: Callable[..., dict[str, Any]], relies_on: dict[str, Any]) -> Compute:
    """The forward of `module`'s class, run on a stand-in with `attributes`, which are made from the inputs other than ``x``.

    Every other constant that it reads is recorded in `relies_on`. It raises `Inconclusive` if it sets an attribute, or reads
    another one that is not a constant.
    """
    original: Any = type(module)

    def compute(training: bool, x: Tensor, **others: Tensor) -> Tensor:
        own = {**vars(nn.Module()), **attributes(**others), "training": training}
        doubts: list[str] = []

        def read(self: Any, name: str) -> Any:
            of_class = inspect.getattr_static(original, name, Missing)
            if name in own or (isinstance(of_class, _CODE) and name not in vars(module)):
                return original.__getattribute__(self, name)
            state = {**module._parameters, **module._buffers, **module._modules}
            value = vars(module).get(name, state.get(name, of_class))
            if value is Missing:
                relies_on[name] = Missing
                return absent(self, name)
            if not _is_constant(value):
                doubts.append(f"reads its {name!r}, which may change")
                raise Inconclusive(doubts[0])
            relies_on[name] = value
            if isinstance(value, types.MethodType) and value.__self__ is module:
                return types.MethodType(value.__func__, self)
            return value

        def absent(self: Any, name: str) -> Any:
            raise AttributeError(f"{original.__name__!r} object has no attribute {name!r}")

        def write(self: Any, name: str, *value: Any) -> None:
            doubts.append(f"changes its {name!r} when it is called")
            raise Inconclusive(doubts[0])

        body = {"__getattribute__": read, "__getattr__": absent, "__setattr__": write, "__delattr__": write}
        double: Any = object.__new__(type(original.__name__, (_AcceptsSubclass, original), body))
        object.__getattribute__(double, "__dict__").update(own)
        try:
            return original.forward(double, x)
        finally:
            if doubts:  # the forward may have caught the exception
                raise Inconclusive(doubts[0])

    return compute


def probe_key(module: nn.Module) -> Hashable:
    """A key that is equal for modules that probing cannot tell apart."""
    return (
        type(module),
        *((name, value) for name, value in vars(module).items() if _is_constant(value)),
        *((name, value.shape) for name, value in (*module.named_parameters(), *module.named_buffers())),
        *((name, type(child)) for name, child in module.named_children()),
    )


class _AcceptsSubclass:
    """The first base of a stand-in: keeps the other class's ``__init_subclass__`` from running."""

    def __init_subclass__(cls) -> None:
        pass


def agrees(compute: Compute, exact: Exact, inputs: dict[str, Tensor], precision: float) -> bool:
    """Whether `compute` gives the values and gradients of `exact` in both modes and every dtype; False if it fails.

    Args:
        compute: called with `training` and the inputs in each dtype; it must return a tensor of that dtype.
        inputs: float64, on the CPU.
        precision: the relative error to allow, or eight roundings to the dtype if that is more.

    Raises:
        Inconclusive: it does something that its results do not show.
    """
    with isolated():
        before, python = torch.get_rng_state(), random.getstate()
        try:
            same = all(
                _values_agree(
                    compute, exact, {name: value.to(dtype) for name, value in inputs.items()}, mode, precision
                )
                for mode, dtype in product((True, False), DTYPES)
            ) and _gradients_agree(compute, exact, inputs)
        except Inconclusive:
            raise
        except Exception:
            return False
        if not torch.equal(torch.get_rng_state(), before) or random.getstate() != python:
            raise Inconclusive("draws random numbers")
        return same


def _values_agree(compute: Compute, exact: Exact, given: dict[str, Tensor], training: bool, precision: float) -> bool:
    kept = {name: value.clone() for name, value in given.items()}
    with torch.set_grad_enabled(training):
        found = compute(training, **given)
    if not all(torch.equal(value.nan_to_num(), kept[name].nan_to_num()) for name, value in given.items()):
        raise Inconclusive("changes its input")
    with torch.no_grad():
        wide, slack = exact(**kept)
        dtype = kept["x"].dtype
        if type(found) is not Tensor or found.dtype != dtype or found.shape != wide.shape:
            return False
        largest, wide = torch.finfo(dtype).max, wide.double()
        expected, got = wide.to(dtype).double(), found.double()
        error = max(precision, 8 * torch.finfo(dtype).eps) * (expected.abs() + slack)
        right = torch.where(expected.isfinite(), (got - expected).abs() <= error, got == expected)
        right |= ~expected.isfinite() & got.isnan()  # PyTorch's own vectorised GELU of infinity is NaN
        right |= (wide.abs() > largest / 2) & (
            wide.abs() < 2 * largest
        )  # rounding decides whether such a number overflows
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
