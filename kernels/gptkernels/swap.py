"""Puts this library's kernels under a model that somebody else wrote, and takes them away again.

A module is not replaced by another object: its class is exchanged for a subclass of that class which computes the same
through gptkernels. Whatever hangs on the object stays where it is, because it is the same object: parameters (and what an
optimizer or FSDP holds of them), buffers, hooks, training mode, every name it is registered under, every reference somebody
keeps, and what ``isinstance`` says of it. `restore_modules` gives each its own class back, and there is nothing else to undo.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gptkernels import nn as twins
from gptkernels._probe import Absent, Doubt, agrees, asked, likeness, logarithmic, undisturbed
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


def _obstacle(module: nn.Module) -> str | None:
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


@dataclass(frozen=True)
class Match:
    """What a module can run on: a kind of forward, the function that this calls, and the constants it relies on."""

    kind: type
    function: str
    relies_on: dict[str, Any] = field(default_factory=dict)


class OfOneTensor:
    """A kind of forward that computes one tensor from one, under whatever name the original's forward gives it.

    `fused` does so, or returns None for an input that is the original's to handle. So is a call with more than the one
    tensor, and every call once a constant that the verdict on the module relies on (`_probe.asked`) has another value.
    """

    fused: Callable[[Any, Tensor], Tensor | None]

    def __init_subclass__(cls) -> None:
        if "_gptkernels_original" not in vars(cls):
            return  # a kind, or a class that somebody put over ours
        original: Any = vars(cls)["_gptkernels_original"].forward
        fused, (_, first, *_) = vars(cls)["_gptkernels_kind"].fused, inspect.signature(original).parameters

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) + len(kwargs) == 1 and (args or first in kwargs) and constants_hold(self):
                out = fused(self, args[0] if args else kwargs[first])
                if out is not None:
                    return out
            return original(self, *args, **kwargs)

        cls.forward = forward


def constants_hold(module: nn.Module) -> bool:
    """Whether what the verdict on `module` relies on is still so."""
    for name, value in module.__dict__.get("_gptkernels_relies_on", {}).items():
        found = getattr(module, name, Absent)
        if found is not value and found != value:
            return False
    return True


class RMSNorm(OfOneTensor):
    """The forward of RMS norms with a `weight` and an epsilon, as Hugging Face's decoders define them."""

    weight: Tensor

    def fused(self, x: Tensor) -> Tensor | None:
        # Which dtype comes of two is the original's to say.
        if x.dtype != self.weight.dtype or not twins.fits(x, self.weight.shape):
            return None
        return rms_norm(x, self.weight, getattr(self, _epsilon_name(self)))


class TanhGELU(OfOneTensor):
    """The forward of modules that compute GELU's tanh form."""

    def fused(self, x: Tensor) -> Tensor | None:
        return gelu(x, approximate="tanh") if x.dim() and x.dtype.is_floating_point else None


class ExactGELU(OfOneTensor):
    """The forward of modules that compute GELU by the error function."""

    def fused(self, x: Tensor) -> Tensor | None:
        return gelu(x, approximate="none") if x.dim() and x.dtype.is_floating_point else None


TWINS: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    nn.LayerNorm: (twins.LayerNorm, "layer_norm"),
    nn.RMSNorm: (twins.RMSNorm, "rms_norm"),
    nn.Softmax: (twins.Softmax, "softmax"),
    nn.GELU: (twins.GELU, "gelu"),
    nn.CrossEntropyLoss: (twins.CrossEntropyLoss, "cross_entropy"),
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    TWINS[nn.LinearCrossEntropyLoss] = (twins.LinearCrossEntropyLoss, "linear_cross_entropy")


def _twin(module: nn.Module) -> Match | str:
    """PyTorch's own modules are known by their forward."""
    twin, (ours, function) = next(pair for pair in TWINS.items() if isinstance(module, pair[0]))
    if isinstance(module, ours):
        return "already on gptkernels"
    # Its own, and not what a library has put in its place.
    known = type(module).forward is twin.forward and twin.forward.__module__ == twin.__module__
    return Match(ours, function) if known else f"{type(module).__name__} has a forward of its own"


def _epsilon_name(module: Any) -> str:
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


def _rms_norm(module: Any) -> Match | str:
    """Asks `module`: Gemma's RMS norms look like Llama's and multiply by ``1 + weight``; others norm groups of a row."""
    name, width = _epsilon_name(module), module.weight.shape[0]
    eps, relies_on = getattr(module, name), {}
    if not isinstance(eps, float) or eps <= 0.0:
        return f"{type(module).__name__} has an epsilon that is no positive number"
    if width == 0:
        return f"{type(module).__name__} does not hold its weight (is it kept in pieces elsewhere?)"

    def exact(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = x.double(), weight.double()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, weight.abs()

    with undisturbed():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(14, width, generator=generator, dtype=torch.float64)
        # Of the epsilon's size too: where it is added matters.
        x[:9] *= torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0, 1e2, 1e3, 1e4, math.sqrt(eps)])[:, None]
        x[9] = logarithmic(width, generator=generator)
        x[10], x[11, 0], x[12, 0], x[13, 0] = 0.0, 1e4, math.inf, math.nan
        inputs = {"x": x.view(2, 7, width), "weight": logarithmic(width, generator=generator)}
    compute = asked(module, lambda weight: {"weight": weight, name: eps}, relies_on)
    # Many compute in float32 whatever comes.
    if agrees(compute, exact, inputs, 8 * torch.finfo(torch.float32).eps):
        return Match(RMSNorm, "rms_norm", relies_on)
    return f"{type(module).__name__} does not compute x / rms(x) * weight"


def _gelu(module: nn.Module) -> Match | str:
    with undisturbed():
        small = torch.linspace(-6, 6, 97, dtype=torch.float64)
        large = torch.logspace(-3, 4, 36, dtype=torch.float64)
        x = torch.cat([small, large, -large, torch.tensor([math.inf, math.nan], dtype=torch.float64)])

    def tanh(x: Tensor) -> Tensor:
        return torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))

    for share, kind in ((tanh, TanhGELU), (lambda x: torch.erf(x / math.sqrt(2)), ExactGELU)):
        relies_on: dict[str, Any] = {}

        def exact(x: Tensor, share: Callable[[Tensor], Tensor] = share) -> tuple[Tensor, Tensor]:
            x = x.double()
            return 0.5 * x * (1 + share(x)), x.abs()

        if agrees(asked(module, dict, relies_on), exact, {"x": x}, 1e-9):
            return Match(kind, "gelu", relies_on)
    return f"{type(module).__name__} is another function than GELU or its tanh form"


def _other_parameters(module: nn.Module) -> str:
    return f"{type(module).__name__} has other parameters than a weight and an epsilon"


Verdict = Callable[[Any], Match | str]
"""Finds out what a module can run on, or why it cannot."""


def _verdict(module: Any) -> Verdict | None:
    """Who judges `module`, by what it looks like; None for modules that this library has nothing for."""
    if isinstance(module, tuple(TWINS)):
        return _twin
    name = type(module).__name__
    state = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    if "GELU" in name.upper() and not state:
        return _gelu
    if "RMSNorm" not in name and "LayerNorm" not in name:
        return None
    plain = state == ["weight"] and module.weight.dim() == 1 and hasattr(module, _epsilon_name(module))
    return _rms_norm if plain else _other_parameters


def exchange(
    model: nn.Module,
    verdict_on: Callable[[nn.Module], Verdict | None],
    skip: Callable[[str, nn.Module], bool] | None = None,
) -> SwapReport:
    """Gives each module of `model` that a verdict matches its kind of forward, and says what it left and why."""
    report = SwapReport("replaced")
    known: dict[Hashable, Match | str] = {}  # a model has many modules alike
    for name, module in list(model.named_modules()):
        verdict = verdict_on(module)
        if verdict is None:
            continue
        if (found := _obstacle(module)) is None:
            key = (verdict, likeness(module))
            if key not in known:
                try:
                    known[key] = verdict(module)
                except Doubt as doubt:
                    known[key] = f"{type(module).__name__} {doubt}"
            found = known[key]
        if isinstance(found, str):
            report.left[name] = found
        elif skip is not None and skip(name, module):
            report.left[name] = "skipped"
        else:
            report.changed[name] = f"{type(module).__name__} -> gptkernels.{found.function}"
            if found.relies_on:
                module._gptkernels_relies_on = found.relies_on  # type: ignore[assignment]
            module.__class__ = _mixture(type(module), found.kind)
    return report


def replace_modules(model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None) -> SwapReport:
    """Puts the norms, softmaxes, GELUs and losses of `model` on this library's kernels, in place.

    That is `torch.nn`'s LayerNorm, RMSNorm, Softmax, GELU, CrossEntropyLoss and LinearCrossEntropyLoss, and Hugging Face's
    own RMS norms and GELUs (and whatever else looks like these and is found to compute the same: in training and in
    evaluation, in every dtype, for numbers of every size, gradients included). What is in doubt is left, and so are
    subclasses of PyTorch's modules with a forward of their own. The modules stay the same objects with the same parameters,
    buffers, hooks, modes and names, and are called with the same arguments; the model can be copied, pickled, compiled,
    trained and saved as before. Calling it again changes nothing.

    Args:
        model: any module tree, on any device (meta included: no tensor of it is read); a single norm too.
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
    return exchange(model, _verdict, skip)


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
            vars(module).pop("_gptkernels_relies_on", None)
            module.__class__ = original
        else:
            report.left[name] = f"its class was exchanged again, for {type(module).__qualname__}"
    return report
