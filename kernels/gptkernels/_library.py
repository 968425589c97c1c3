"""Registers kernels as PyTorch dispatcher ops, which torch.compile treats as opaque calls with known outputs.

Each backend has its own namespace (``torch.ops.gptkernels_triton``, ``torch.ops.gptkernels_native``) with the same op
names and schemas. An autograd Function serves both backends: it is told which namespace to call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _flops

launchers: dict[str, Callable[[], Callable[..., Any]]] = {}
"""By op name, what imports and returns its Triton launcher. `register` fills it."""

FUSED: dict[str, tuple[str, ...]] = {}
"""By public function, the backends beside the reference that have a kernel for it. `register` fills it."""


def register(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    triton: bool = True,
    functions: tuple[str, ...] = (),
    flops: Callable[..., int] | None = None,
) -> None:
    """Defines the op ``{name}{schema}`` in the native namespace and, unless `triton` is False, in triton's.

    The native op is implemented in C++ (``native.cpp``), which `gptkernels._native` loads at first use. The Triton op is
    the function `name` of the ``triton.py`` in the folder of `fake`. It is imported at the op's first call: `import
    gptkernels` must work, and be quick, without triton.

    Args:
        name: ``<function>_forward`` or ``<function>_backward``.
        schema: arguments and results, as `torch.library.define` takes them.
        fake: returns the outputs' shapes, dtypes and layouts.
        triton: whether there is a Triton launcher.
        functions: the public functions that call the op, where there are others than the one in `name`.
        flops: returns what a call with these arguments counts in PyTorch's FlopCounterMode, by its conventions: two
            operations for each multiplication of a product of matrices, causal or not, and nothing for the rest.
    """
    for function in functions or (name.rpartition("_")[0],):
        FUSED[function] = ("triton", "native") if triton else ("native",)
    torch.library.define(f"gptkernels_native::{name}", schema)
    torch.library.register_fake(f"gptkernels_native::{name}", fake)
    if flops is not None:
        _flops.register(getattr(torch.ops.gptkernels_native, name), flops)
    if not triton:
        return

    @cache
    def load() -> Callable[..., Any]:
        folder = fake.__module__.rpartition(".")[0]
        return getattr(importlib.import_module(f"{folder}.triton"), name)

    launchers[name] = load

    def kernel(*args: Any) -> Any:
        return load()(*args)

    qualified = f"gptkernels_triton::{name}"
    torch.library.define(qualified, schema)
    # CPU tensors reach a Triton kernel only in the interpreter: backend.choose sees to that.
    torch.library.impl(qualified, ("CUDA", "CPU"), kernel)
    torch.library.register_fake(qualified, fake)
    if flops is not None:
        _flops.register(getattr(torch.ops.gptkernels_triton, name), flops)


def ops(backend: str) -> Any:
    """The namespace that holds `backend`'s ops."""
    return getattr(torch.ops, f"gptkernels_{backend}")


class _InferenceContext:
    """Stub ctx for inference: discards saved tensors."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Calls ``function.apply(*args)``, or only its forward where no gradient is recorded.

    That saves the 20 us of `apply`; a decoding step makes a hundred of these calls.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_InferenceContext(), *args)


def graph_wanted() -> bool:
    """In a Function's backward: whether its gradients will be differentiated again (``create_graph=True``).

    Autograd records nothing inside a kernel and would take its derivative for zero, so the backward must then call
    `differentiable_gradients`. False under torch.compile, which refuses second derivatives itself.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_gradients(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    *grad_outs: Tensor | None,
) -> list[Any]:
    """Returns the gradients of the plain PyTorch ``formula(*inputs)``, recorded so that they can be differentiated again.

    Args:
        formula: the operation in plain PyTorch.
        inputs: the tensors that the Function saved, still part of the forward's graph. One that needs no gradient gets
            None.
        grad_outs: the gradients of the formula's outputs, None for an output without one.
    """
    # Differentiate with respect to views: a tensor that is passed twice then gets two gradients, and an input that was
    # computed from another input does not add to that one's gradient.
    own = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    asked = {i: x for i, x in enumerate(own) if x is not None and x.requires_grad}
    with no_autocast(next(iter(asked.values()))):  # the inputs are already cast
        outs = formula(*own)
        reached = [(out, g) for out, g in zip(outs if isinstance(outs, tuple) else (outs,), grad_outs) if g is not None]
        grads = torch.autograd.grad(
            [out for out, _ in reached], list(asked.values()), [g for _, g in reached],
            create_graph=True, materialize_grads=True,
        )  # fmt: skip
    found = dict(zip(asked, grads))
    return [found.get(i) for i in range(len(own))]


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on `x`'s device, around an operation whose inputs are already cast."""
    device_type = x.device.type
    if not _check.autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
