"""Makes an existing model run on this library's kernels, and undoes that.

A module stays the same object; its class is replaced by a subclass that computes the same through gptkernels. Parameters
(and an optimizer's or FSDP's references to them), buffers, hooks, training mode, names, other references to the module and
``isinstance`` are therefore unaffected. `restore_modules` gives each module its own class back; nothing else needs undoing.
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
from gptkernels._probe import Inconclusive, Missing, agrees, isolated, logarithmic, probe_key, probed
from gptkernels.activation import gelu
from gptkernels.rms_norm import rms_norm

__all__ = ["SwapReport", "replace_modules", "restore_modules"]


@dataclass(frozen=True)
class SwapReport:
    """What `replace_modules` or `restore_modules` did: by module name, what was changed, and why the others were left."""

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
    """The first base of every class that replaces a module's; the others are the class with the new forward, and the original."""

    _gptkernels_original: type[nn.Module]
    _gptkernels_kind: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the two classes that this one is made of; pickle could not find this one by its name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _rebuild, (self._gptkernels_original, self._gptkernels_kind), *state

    def _get_name(self) -> str:
        return f"gptkernels.{self._gptkernels_original.__name__}"


def _rebuild(original: type[nn.Module], kind: type) -> nn.Module:
    swapped = _swapped_class(original, kind)
    return swapped.__new__(swapped)


@cache
def _swapped_class(original: type[nn.Module], kind: type) -> type[nn.Module]:
    """The subclass of `original` with `kind`'s forward. It has the original's name, by which other code looks modules up."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    parts = {"_gptkernels_original": original, "_gptkernels_kind": kind}
    return type(original.__name__, (Swapped, kind, original), {**names, **parts})


def kind_of(module: nn.Module) -> type | None:
    """The class with the forward that `module` was given; None for a module with its own forward."""
    return module._gptkernels_kind if isinstance(module, Swapped) else None


def _obstacle(module: nn.Module) -> str | None:
    """Why this module's class cannot be replaced, whatever it computes; None if it can be."""
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
    """How a module can run on gptkernels."""

    kind: type
    """The class with the new forward."""
    function: str
    """The function of gptkernels that this forward calls."""
    relies_on: dict[str, Any] = field(default_factory=dict)
    """The module's constants for which the two were found to compute the same."""


class UnaryForward:
    """A forward that computes one tensor from one tensor, whatever name the original's forward gives its argument.

    `fused` computes it, or returns None to leave the input to the original forward. The original also handles calls with
    further arguments, and every call after a constant that the match relies on (`Match.relies_on`) has changed.
    """

    fused: Callable[[Any, Tensor], Tensor | None]

    def __init_subclass__(cls) -> None:
        if "_gptkernels_original" not in vars(cls):
            return  # a kind itself, or a class that other code derived from a replaced one
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
    """Whether the constants that the match of `module` relies on have kept their values."""
    for name, value in module.__dict__.get("_gptkernels_relies_on", {}).items():
        found = getattr(module, name, Missing)
        if found is not value and found != value:
            return False
    return True


class RMSNorm(UnaryForward):
    """The forward of RMS norms with a `weight` and an epsilon, as Hugging Face's decoders define them."""

    weight: Tensor

    def fused(self, x: Tensor) -> Tensor | None:
        # Of two dtypes, the original decides which one the result has.
        if x.dtype != self.weight.dtype or not twins.fits(x, self.weight.shape):
            return None
        return rms_norm(x, self.weight, getattr(self, _epsilon_name(self)))


class TanhGELU(UnaryForward):
    """The forward of modules that compute GELU's tanh form."""

    def fused(self, x: Tensor) -> Tensor | None:
        return gelu(x, approximate="tanh") if x.dim() and x.dtype.is_floating_point else None


class ExactGELU(UnaryForward):
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
    """Matches PyTorch's own modules; a subclass with a forward of its own is left."""
    twin, (ours, function) = next(pair for pair in TWINS.items() if isinstance(module, pair[0]))
    if isinstance(module, ours):
        return "already on gptkernels"
    # A library may also have put another function in the place of PyTorch's forward.
    known = type(module).forward is twin.forward and twin.forward.__module__ == twin.__module__
    return Match(ours, function) if known else f"{type(module).__name__} has a forward of its own"


def _epsilon_name(module: Any) -> str:
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


def _rms_norm(module: Any) -> Match | str:
    """Matches RMS norms by what they compute: Gemma's look like Llama's and multiply by ``1 + weight``, for example."""
    name, width = _epsilon_name(module), module.weight.shape[0]
    eps, relies_on = getattr(module, name), {}
    if not isinstance(eps, float) or eps <= 0.0:
        return f"{type(module).__name__} has an epsilon that is not a positive number"
    if width == 0:
        return f"{type(module).__name__} does not hold its weight (is it kept in pieces elsewhere?)"

    def exact(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = x.double(), weight.double()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, weight.abs()

    with isolated():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(14, width, generator=generator, dtype=torch.float64)
        # Rows as small as the epsilon show where it is added.
        x[:9] *= torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0, 1e2, 1e3, 1e4, math.sqrt(eps)])[:, None]
        x[9] = logarithmic(width, generator=generator)
        x[10], x[11, 0], x[12, 0], x[13, 0] = 0.0, 1e4, math.inf, math.nan
        inputs = {"x": x.view(2, 7, width), "weight": logarithmic(width, generator=generator)}
    compute = probed(module, lambda weight: {"weight": weight, name: eps}, relies_on)
    # The precision is float32's: many compute in float32 whatever the input's dtype.
    if agrees(compute, exact, inputs, 8 * torch.finfo(torch.float32).eps):
        return Match(RMSNorm, "rms_norm", relies_on)
    return f"{type(module).__name__} does not compute x / rms(x) * weight"


def _gelu(module: nn.Module) -> Match | str:
    with isolated():
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

        if agrees(probed(module, dict, relies_on), exact, {"x": x}, 1e-9):
            return Match(kind, "gelu", relies_on)
    return f"{type(module).__name__} computes neither GELU nor its tanh form"


def _other_parameters(module: nn.Module) -> str:
    return f"{type(module).__name__} has other parameters than a weight and an epsilon"


Matcher = Callable[[Any], Match | str]
"""Finds out how a module can run on gptkernels, or why it cannot."""


def _matcher(module: Any) -> Matcher | None:
    """The matcher for a module of this appearance; None for modules that this library has no function for."""
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


def swap_classes(
    model: nn.Module,
    matcher_of: Callable[[nn.Module], Matcher | None],
    skip: Callable[[str, nn.Module], bool] | None = None,
) -> SwapReport:
    """Gives each module of `model` that its matcher accepts the new forward; reports the others with the reason."""
    report = SwapReport("replaced")
    known: dict[Hashable, Match | str] = {}  # most models have many equal modules: each is probed once
    for name, module in list(model.named_modules()):
        matcher = matcher_of(module)
        if matcher is None:
            continue
        if (found := _obstacle(module)) is None:
            key = (matcher, probe_key(module))
            if key not in known:
                try:
                    known[key] = matcher(module)
                except Inconclusive as reason:
                    known[key] = f"{type(module).__name__} {reason}"
            found = known[key]
        if isinstance(found, str):
            report.left[name] = found
        elif skip is not None and skip(name, module):
            report.left[name] = "skipped"
        else:
            report.changed[name] = f"{type(module).__name__} -> gptkernels.{found.function}"
            if found.relies_on:
                module._gptkernels_relies_on = found.relies_on  # type: ignore[assignment]
            module.__class__ = _swapped_class(type(module), found.kind)
    return report


def replace_modules(model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None) -> SwapReport:
    """Makes the norms, softmaxes, GELUs and losses of `model` run on this library's kernels, in place.

    These are `torch.nn`'s LayerNorm, RMSNorm, Softmax, GELU, CrossEntropyLoss and LinearCrossEntropyLoss, Hugging Face's RMS
    norms and GELUs, and modules that look like the latter and are found to compute the same: in training and evaluation,
    every dtype, numbers of every size, gradients included. Doubtful modules are left, and so are subclasses of PyTorch's
    modules with a forward of their own. The modules stay the same objects with the same parameters, buffers, hooks, modes
    and names, and take the same arguments; the model can be copied, pickled, compiled, trained and saved as before. A
    second call changes nothing.

    Args:
        model: any module tree on any device (meta too: no tensor of it is read), or a single module.
        skip: called with the name and the module of each match; if it returns True, the module is left.

    Returns:
        The modules that were replaced, and those that were left with the reason; ``print`` shows both.

    >>> import torch, gptkernels
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU())
    >>> print(gptkernels.replace_modules(model))
    replaced 2 modules:
         1  LayerNorm -> gptkernels.layer_norm: 1
         1  GELU -> gptkernels.gelu: 2
    left 0 modules
    >>> restored = gptkernels.restore_modules(model)
    """
    return swap_classes(model, _matcher, skip)


def on_restore(module: nn.Module, undo: Callable[[nn.Module], str]) -> None:
    """Registers `undo` for `restore_modules` to call with `module`, for changes other than the class.

    `undo` must be picklable; it returns the name of what it undid.
    """
    module._gptkernels_undo = undo  # type: ignore[assignment]


def restore_modules(model: nn.Module) -> SwapReport:
    """Undoes `replace_modules`, and an integration's ``accelerate_model``, in place.

    Every replaced module gets its own class back.

    Returns:
        The modules that were restored, and those that were left because something else has changed their class since.
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
            report.left[name] = f"its class was replaced again, by {type(module).__qualname__}"
    return report
