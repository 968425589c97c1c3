"""Puts this library's kernels under a model that somebody else wrote, and takes them away again.

A module is not replaced by another object: its class is exchanged for a subclass of that class which computes the same
through gptkernels. Whatever hangs on the object stays where it is, because it is the same object: parameters (and what an
optimizer or FSDP holds of them), buffers, hooks, training mode, every name it is registered under, every reference somebody
keeps, and what ``isinstance`` says of it. `restore_modules` gives each its own class back, and there is nothing else to undo.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels import nn as fused
from gptkernels.activation import gelu
from gptkernels.rms_norm import rms_norm

__all__ = ["SwapReport", "replace_modules", "restore_modules"]


@dataclass(frozen=True)
class SwapReport:
    """What `replace_modules` or `restore_modules` did: by module name, what was changed, and what was left and why."""

    verb: str
    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for title, found in ((self.verb, self.changed), ("left", self.left)):
            lines.append(f"{title} {len(found)} module{'' if len(found) == 1 else 's'}{':' if found else ''}")
            names: dict[str, list[str]] = {}
            for name, what in found.items():
                names.setdefault(what, []).append(name or "the model itself")
            for what, where in names.items():
                more = f" and {len(where) - 3} more" if len(where) > 3 else ""
                lines.append(f"  {len(where):>4}  {what}: {', '.join(where[:3])}{more}")
        return "\n".join(lines)


class Swapped:
    """Mixed into the class of a module that now runs on gptkernels, beside its own class and the kind of forward it got."""

    _gptkernels_original: type[nn.Module]
    _gptkernels_kind: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the two classes it is made of: the mixture itself has no name to be found by."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _rebuild, (self._gptkernels_original, self._gptkernels_kind), *state

    def _get_name(self) -> str:
        return f"gptkernels.{self._gptkernels_original.__name__}"


def _rebuild(original: type[nn.Module], kind: type) -> nn.Module:
    mixture = _mixture(original, kind)
    return mixture.__new__(mixture)


@cache
def _mixture(original: type[nn.Module], kind: type) -> type[nn.Module]:
    """The subclass of `original` whose forward is `kind`'s; it bears the original's names, which others look modules up by."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    parts = {"_gptkernels_original": original, "_gptkernels_kind": kind}
    return type(original.__name__, (Swapped, kind, original), {**names, **parts})


def kind_of(module: nn.Module) -> type | None:
    """What kind of forward `module` got; None when it has its own."""
    return module._gptkernels_kind if isinstance(module, Swapped) else None


def swap(module: nn.Module, kind: type) -> None:
    """Makes `module` compute what its class does by `kind`'s forward."""
    module.__class__ = _mixture(type(module), kind)


def obstacle(module: nn.Module) -> str | None:
    """Why this object's class cannot be exchanged whatever it computes; None when it can be."""
    if isinstance(module, Swapped):
        return "already on gptkernels"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by torch.jit"
    if "forward" in vars(module):
        return "its forward was replaced on the object itself (a library's hook?)"
    if hasattr(module, "parametrizations"):
        return "is parametrized"
    return None


class RMSNorm:
    """The forward of RMS norms with a `weight` and an epsilon, as Hugging Face's decoders define them."""

    weight: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Which dtype comes of two is the original's to say; and some take a gate when they are given one.
        if args or kwargs or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return rms_norm(hidden_states, self.weight, _epsilon(self))


class TanhGELU:
    """The forward of modules that compute GELU's tanh form."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate="tanh")


class ExactGELU:
    """The forward of modules that compute GELU by the error function."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate="none")


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: fused.LayerNorm,
    nn.RMSNorm: fused.RMSNorm,
    nn.Softmax: fused.Softmax,
    nn.GELU: fused.GELU,
    nn.CrossEntropyLoss: fused.CrossEntropyLoss,
    **({nn.LinearCrossEntropyLoss: fused.LinearCrossEntropyLoss} if hasattr(nn, "LinearCrossEntropyLoss") else {}),
}  # fmt: skip


def _epsilon(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def agrees(compute: Callable[[], Tensor], expected: Tensor, tolerance: float) -> bool:
    """Whether a stranger's computation gives `expected`; one that fails does not."""
    try:
        with torch.no_grad():
            found = compute()
        return found.shape == expected.shape and torch.allclose(
            found.double(), expected, rtol=tolerance, atol=tolerance
        )
    except Exception:
        return False


def stand_in(module: nn.Module, **attributes: Any) -> Any:
    """A double of `module` with these parameters and children in place of its own, to be asked what it computes."""
    double = copy.copy(module)
    double.__dict__ = {**vars(module), "_parameters": {}, "_modules": {}, "_buffers": {}}
    for name, value in attributes.items():
        setattr(double, name, value)
    return double


def _is_rms_norm(module: Any) -> bool:
    """Asks `module`: Gemma's RMS norms look like Llama's and multiply by ``1 + weight``; others norm groups of a row."""
    eps = _epsilon(module)
    if not isinstance(eps, float) or eps <= 0.0:
        return False
    generator = torch.Generator().manual_seed(0)
    width = module.weight.shape[0]
    weight = torch.randn(width, generator=generator, dtype=torch.float64)
    # Of the epsilon's size, and far above it: where it is added matters too.
    x = torch.randn(2, 3, width, generator=generator, dtype=torch.float64) * torch.tensor([[[1.0]], [[math.sqrt(eps)]]])
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    double = stand_in(module, weight=nn.Parameter(weight))
    return agrees(lambda: type(module).forward(double, x), exact, 1e-5)  # many compute in float32 whatever comes


def _gelu_kind(module: nn.Module) -> type | None:
    x = torch.cat([torch.linspace(-6, 6, 97, dtype=torch.float64), torch.tensor([-60.0, 60.0], dtype=torch.float64)])
    for approximate, kind in (("tanh", TanhGELU), ("none", ExactGELU)):
        exact = nn.functional.gelu(x, approximate=approximate)
        if agrees(lambda: type(module).forward(module, x), exact, 1e-9):
            return kind
    return None


def _kind(module: Any) -> type | str | None:
    """What a module can run on, or why it cannot; None for modules that this library has nothing for.

    PyTorch's modules are known by their forward. Others are known by what they look like, and then asked: a small input
    goes through the class's forward, and it has to compute what ours does.
    """
    for twin, ours in TWINS.items():
        if isinstance(module, twin):
            if isinstance(module, ours):
                return "already on gptkernels"
            return ours if type(module).forward is twin.forward else f"{type(module).__name__} has a forward of its own"
    name, state = type(module).__name__, [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    if "GELU" in name.upper() and not state:
        return _gelu_kind(module) or f"{name} is another function than GELU or its tanh form"
    if "RMSNorm" in name or "LayerNorm" in name:
        if state == ["weight"] and module.weight.dim() == 1 and _has_epsilon(module):
            return RMSNorm if _is_rms_norm(module) else f"{name} does not compute x / rms(x) * weight"
        return f"{name} has other parameters than a weight and an epsilon"
    return None


def _has_epsilon(module: nn.Module) -> bool:
    return hasattr(module, "variance_epsilon") or hasattr(module, "eps")


def replace_modules(model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None) -> SwapReport:
    """Puts the norms, softmaxes, GELUs and losses of `model` on this library's kernels, in place.

    That is `torch.nn`'s LayerNorm, RMSNorm, Softmax, GELU, CrossEntropyLoss and LinearCrossEntropyLoss, and Hugging Face's
    own RMS norms and GELUs (and whatever else looks like these and, asked with a small input, computes the same). The
    modules stay the same objects with the same parameters, buffers, hooks, modes and names; the model can be copied, pickled,
    compiled, trained and saved as before. Subclasses with a forward of their own are left. Calling it again changes nothing.

    Args:
        model: any module tree; a single norm too.
        skip: called with each candidate's name and module; those it says True of are left.

    Returns:
        What was replaced, and what was left and why; ``print`` it.

    >>> import torch, gptkernels
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU())
    >>> print(gptkernels.replace_modules(model))
    replaced 2 modules:
         1  LayerNorm -> gptkernels.layer_norm: 1
         1  GELU -> gptkernels.gelu: 2
    left 0 modules
    >>> restored = gptkernels.restore_modules(model)
    """
    report = SwapReport("replaced")
    for name, module in list(model.named_modules()):
        kind = _kind(module)
        if kind is None:
            continue
        if reason := obstacle(module):
            report.left[name] = reason
        elif isinstance(kind, str):
            report.left[name] = kind
        elif skip is not None and skip(name, module):
            report.left[name] = "skipped"
        else:
            report.changed[name] = f"{type(module).__name__} -> gptkernels.{FUNCTIONS[kind]}"
            swap(module, kind)
    return report


FUNCTIONS: dict[type, str] = {
    fused.LayerNorm: "layer_norm",
    fused.RMSNorm: "rms_norm",
    fused.Softmax: "softmax",
    fused.GELU: "gelu",
    fused.CrossEntropyLoss: "cross_entropy",
    fused.LinearCrossEntropyLoss: "linear_cross_entropy",
    RMSNorm: "rms_norm",
    TanhGELU: "gelu",
    ExactGELU: "gelu",
}
"""By what a module's class was exchanged for, the function that it now calls."""


def on_restore(module: nn.Module, undo: Callable[[nn.Module], str]) -> None:
    """Has `restore_modules` call `undo`, which can be pickled and says what it undid, for what no class can express."""
    module._gptkernels_undo = undo  # type: ignore[assignment]


def restore_modules(model: nn.Module) -> SwapReport:
    """Undoes `replace_modules`, and an integration's ``accelerate_model``, in place.

    Every changed module gets its own class back. The objects were the same all the time, so that is all.

    Returns:
        What was restored; and what was left, because something else has changed its class since.
    """
    report = SwapReport("restored")
    for name, module in list(model.named_modules()):
        if (undo := vars(module).pop("_gptkernels_undo", None)) is not None:
            report.changed[name] = undo(module)
        if not isinstance(module, Swapped):
            continue
        original = vars(type(module)).get("_gptkernels_original")
        if original is not None:
            report.changed[name] = original.__name__
            module.__class__ = original
        else:
            report.left[name] = f"its class was exchanged again, for {type(module).__qualname__}"
    return report
