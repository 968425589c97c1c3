"""Modules of other libraries are recognised by what they compute, in both modes, every dtype and for numbers of every size."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from contextlib import ExitStack

import pytest
import torch
from gptkernels import replace_modules, restore_modules
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.foreign import RMSNorm


class ShiftedRMSNorm(RMSNorm):
    """Gemma's form, which multiplies by ``1 + weight``."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return ((1 + self.weight.float()) * wide).to(x.dtype)


class EpsilonOutsideRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class GroupedRMSNorm(RMSNorm):
    """Norms each half of a row: the same as RMSNorm on rows as narrow as one group."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, 8))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.flatten(-2)


class BrokenRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only on my device")


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ClippedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x).clamp(-10, 10)


class InputClampedRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1000, 1000))


class OutputClampedRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1000, 1000)


class HalfClampedRMSNorm(RMSNorm):
    """Clamps in float16 only, as T5 does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-6e4, 6e4) if x.dtype == torch.float16 else x)


class WideRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class WidelyClippedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x).clamp(-100, 100)


class FiniteGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x.nan_to_num(posinf=torch.finfo(x.dtype).max))


class DroppingGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(nn.functional.gelu(x), 0.1, training=self.training)


class RarelyDroppingGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(nn.functional.gelu(x), 1e-9, training=self.training)


class CountingGELU(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.gelu(x) if self.calls < 100 else x


class ConfiguredGELU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"limit": None}

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x) if self.config["limit"] is None else x


class InPlaceGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.copy_(nn.functional.gelu(x))


class StraightThroughGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x).detach() + (x - x.detach()).nan_to_num()


class TwoValuedGELU(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.gelu(x), None


class AdjustableGELU(nn.Module):
    """Reads one attribute that it has and one that it may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = None

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.gelu(x) * getattr(self, "factor", 1)
        return out if self.limit is None else out.clamp(max=self.limit)


class AllocatingGELU(nn.Module):
    """Makes its constants on the default device and in the default dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (torch.ones(1, dtype=x.dtype) + torch.erf(x / torch.tensor([2.0]).to(x.dtype).sqrt()))


LEFT = {
    "ShiftedRMSNorm does not compute x / rms(x) * weight": ShiftedRMSNorm(16),
    "EpsilonOutsideRMSNorm does not compute x / rms(x) * weight": EpsilonOutsideRMSNorm(16),
    "GroupedRMSNorm does not compute x / rms(x) * weight": GroupedRMSNorm(16),
    "BrokenRMSNorm does not compute x / rms(x) * weight": BrokenRMSNorm(16),
    "QuickGELU computes neither GELU nor its tanh form": QuickGELU(),
    "ClippedGELU computes neither GELU nor its tanh form": ClippedGELU(),
    "InputClampedRMSNorm does not compute x / rms(x) * weight": InputClampedRMSNorm(16),
    "OutputClampedRMSNorm does not compute x / rms(x) * weight": OutputClampedRMSNorm(16),
    "HalfClampedRMSNorm does not compute x / rms(x) * weight": HalfClampedRMSNorm(16),
    "WideRMSNorm does not compute x / rms(x) * weight": WideRMSNorm(16),
    "WidelyClippedGELU computes neither GELU nor its tanh form": WidelyClippedGELU(),
    "FiniteGELU computes neither GELU nor its tanh form": FiniteGELU(),
    "DroppingGELU draws random numbers": DroppingGELU().eval(),
    "RarelyDroppingGELU draws random numbers": RarelyDroppingGELU().eval(),
    "CountingGELU changes its 'calls' when it is called": CountingGELU(),
    "ConfiguredGELU reads its 'config', which may change": ConfiguredGELU(),
    "InPlaceGELU changes its input": InPlaceGELU(),
    "StraightThroughGELU computes neither GELU nor its tanh form": StraightThroughGELU(),
    "TwoValuedGELU computes neither GELU nor its tanh form": TwoValuedGELU(),
}


@pytest.mark.parametrize("reason", LEFT)
def test_leaves_what_computes_something_else(reason: str):
    module = LEFT[reason]
    kind, state, drawn = type(module), dict(vars(module)), torch.get_rng_state()
    report = replace_modules(nn.Sequential(module))
    assert report.left == {"0": reason}
    assert type(module) is kind
    assert vars(module) == state
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_constant_that_changes_later_gives_the_module_its_own_forward():
    model = nn.Sequential(AdjustableGELU(), AdjustableGELU())
    assert set(replace_modules(model).changed) == {"0", "1"}
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.linspace(-3, 3, 9)
    assert calls_of(model, x) == ["gelu", "gelu"]
    model[0].limit, model[1].factor = 0.5, 3
    assert calls_of(model, x) == []
    gelu = nn.functional.gelu
    torch.testing.assert_close(model(x), gelu(gelu(x).clamp(max=0.5)) * 3)
    model[0].limit = None
    assert calls_of(model, x) == ["gelu"]
    restore_modules(model)
    assert vars(model[0]).keys() == vars(AdjustableGELU()).keys()


class RenamedRMSNorm(RMSNorm):
    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(hidden if residual is None else hidden + residual)


def test_modules_are_called_by_the_names_of_their_own_arguments():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16)
    for module, name in (
        (RMSNorm(16), "x"),
        (RenamedRMSNorm(16), "hidden"),
        (AdjustableGELU(), "x"),
        (nn.GELU(), "input"),
    ):
        expected, arguments = module(x), list(inspect.signature(module.forward).parameters)
        assert replace_modules(module).changed
        assert list(inspect.signature(module.forward).parameters) == arguments
        assert len(calls_of(module, x)) == 1
        assert len(calls_of(module, **{name: x})) == 1
        torch.testing.assert_close(module(**{name: x}), expected)
        with pytest.raises(TypeError, match="another"):
            module(another=x)
        with pytest.raises(TypeError):
            module()
    norm = RenamedRMSNorm(16)
    expected = norm(x, residual=x)
    replace_modules(norm)
    assert torch.equal(norm(x, residual=x), expected)
    assert torch.equal(norm(hidden=x, residual=x), expected)


def calls_of(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[str]:
    """The functions of this library that a forward reaches."""
    from gptkernels import backend

    reached, choose = [], backend.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose", lambda op, x, name: reached.append(op) or choose(op, x, name))
        module(*args, **kwargs)
    return reached


def test_a_norm_whose_weight_is_elsewhere_is_left():
    norm = RMSNorm(0)
    assert replace_modules(norm).left == {"": "RMSNorm does not hold its weight (is it kept in pieces elsewhere?)"}


def test_a_forward_that_a_library_put_in_pytorchs_place_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn.GELU, "forward", lambda self, input: input)
    gelu = nn.GELU()
    assert replace_modules(gelu).left == {"": "GELU has a forward of its own"}
    assert gelu(5) == 5


def known() -> nn.ModuleDict:
    """One module of each kind that is replaced, PyTorch's and others'."""
    return nn.ModuleDict(
        {
            "layer norm": nn.LayerNorm(16),
            "rms norm": nn.RMSNorm(16),
            "softmax": nn.Softmax(-1),
            "gelu": nn.GELU(),
            "loss": nn.CrossEntropyLoss(),
            "their rms norm": RMSNorm(16),
            "their gelu": AllocatingGELU(),
        }
    )


CONTEXTS = {
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "no grad": torch.no_grad,
}


@pytest.mark.parametrize("context", [*CONTEXTS, "default device", "default dtype"])
def test_what_is_replaced_does_not_depend_on_the_callers_state(context: str):
    model = known()
    with ExitStack() as stack:
        if context == "default device":
            torch.set_default_device("meta")
            stack.callback(torch.set_default_device, None)
        elif context == "default dtype":
            torch.set_default_dtype(torch.bfloat16)
            stack.callback(torch.set_default_dtype, torch.float32)
        else:
            stack.enter_context(CONTEXTS[context]())
        before = torch.get_default_dtype(), torch.get_default_device()
        report = replace_modules(model)
        assert (torch.get_default_dtype(), torch.get_default_device()) == before
    assert set(report.changed) == set(model)
    assert report.left == {}


def test_a_model_on_the_meta_device_is_replaced():
    with torch.device("meta"):
        model = known()
        report = replace_modules(model)
    assert set(report.changed) == set(model)
    restore_modules(model)
    assert set(replace_modules(model).changed) == set(report.changed)


def test_probing_calls_no_hooks_and_shows_no_warnings():
    class WarningRMSNorm(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("old", stacklevel=1)
            return super().forward(x)

    model, heard = nn.Sequential(RMSNorm(8), WarningRMSNorm(8), AdjustableGELU()), []
    for module in model:
        module.register_forward_hook(lambda *_: heard.append("hook"))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: heard.append("everywhere"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert set(replace_modules(model).changed) == {"0", "1", "2"}
    finally:
        everywhere.remove()
    assert heard == []


def test_equal_modules_are_probed_once():
    class CalledRMSNorm(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape))
            return super().forward(x)

    seen: list[tuple[int, ...]] = []
    replace_modules(nn.ModuleList([CalledRMSNorm(8), CalledRMSNorm(16)]))
    once = len(seen)
    seen.clear()
    assert len(replace_modules(nn.ModuleList(CalledRMSNorm(w) for w in (8, 16, 8, 16, 8))).changed) == 5
    assert len(seen) == once
