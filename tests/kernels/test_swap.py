"""replace_modules and restore_modules: what is kept, what is left and why, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle

import gptkernels
import pytest
import torch
from gptkernels import replace_modules, restore_modules
from gptkernels.swap import Swapped
from torch import Tensor, nn

from tests.kernels.foreign import RMSNorm


class GatedRMSNorm(RMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = super().forward(x)
        return normed if gate is None else normed * gate


class Loud(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.LayerNorm):
    """A subclass that changes nothing."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.same_norm = self.norm
        self.named = Named(16)
        self.rms = nn.RMSNorm(16)
        self.llama = RMSNorm(16)
        self.act = nn.GELU("tanh")
        self.head = nn.Linear(16, 11)
        self.probabilities = nn.Softmax(-1)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.rms(self.same_norm(self.embed(tokens)) + self.named(self.embed(tokens)))
        return self.head(self.act(self.llama(x)))


SWAPPED = ("norm", "named", "rms", "llama", "act", "probabilities", "loss")
TOKENS = torch.arange(10).view(2, 5)


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def step(model: Model) -> tuple[Tensor, ...]:
    logits = model(TOKENS)
    loss = model.loss(logits.flatten(0, 1), TOKENS.flatten())
    return logits, model.probabilities(logits), loss, *torch.autograd.grad(loss, list(model.parameters()))


def calls(model: Model) -> set[str]:
    """The functions of this library that a step reaches."""
    from gptkernels import backend

    reached, choose = set(), backend.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "choose", lambda op, x, name: reached.add(op) or choose(op, x, name))
        step(model)
    return reached


def test_known_modules_are_replaced_and_results_stay():
    model, plain = make(), make()
    assert calls(model) == set()
    report = replace_modules(model)
    assert set(report.changed) == set(SWAPPED)
    assert report.left == {}
    assert calls(model) == {"layer_norm", "rms_norm", "gelu", "softmax", "cross_entropy"}
    for a, b in zip(step(model), step(plain)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_report_as_text():
    model = make()
    model.loud = Loud(16)
    assert str(replace_modules(model, skip=lambda name, module: name == "act")).splitlines() == [
        "replaced 6 modules:",
        "     1  LayerNorm -> gptkernels.layer_norm: norm",
        "     1  Named -> gptkernels.layer_norm: named",
        "     2  RMSNorm -> gptkernels.rms_norm: rms, llama",
        "     1  Softmax -> gptkernels.softmax: probabilities",
        "     1  CrossEntropyLoss -> gptkernels.cross_entropy: loss",
        "left 2 modules:",
        "     1  skipped: act",
        "     1  Loud has a forward of its own: loud",
    ]
    many = nn.Sequential(*(nn.GELU() for _ in range(5)))
    assert "     5  GELU -> gptkernels.gelu: 0, 1, 2 and 2 more" in str(replace_modules(many))
    assert str(replace_modules(nn.GELU())).splitlines()[1] == "     1  GELU -> gptkernels.gelu: the model itself"


def test_keeps_objects_parameters_names_modes_and_hooks():
    model = make()
    model.norm.weight.requires_grad_(False)
    model.llama.bfloat16()
    model.norm.eval()
    model.norm.register_buffer("count", torch.zeros(()))
    seen: list[str] = []
    model.norm.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.norm.register_forward_hook(lambda *_: seen.append("forward"))
    model.named.register_full_backward_hook(lambda *_: seen.append("backward"))
    modules, parameters = dict(model.named_modules(remove_duplicate=False)), dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replace_modules(model)
    assert {n: id(m) for n, m in model.named_modules(remove_duplicate=False)} == {n: id(m) for n, m in modules.items()}
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.norm.weight.requires_grad
    assert not model.norm.training
    assert model.rms.training
    assert model.llama.weight.dtype == torch.bfloat16
    assert isinstance(model.norm, nn.LayerNorm)
    assert isinstance(model.named, Named)
    assert isinstance(model.norm, gptkernels.nn.LayerNorm)
    assert type(model.norm).__name__ == "LayerNorm"
    assert "(norm): gptkernels.LayerNorm((16,), eps=1e-05, elementwise_affine=True, bias=True)" in repr(model)
    model.llama.float()
    model(TOKENS).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    assert model.norm.weight.grad is None


def test_a_second_call_changes_nothing_and_restoring_gives_everything_back():
    model = make()
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    replace_modules(model)
    swapped = {name: type(module) for name, module in model.named_modules()}
    again = replace_modules(model)
    assert again.changed == {}
    assert set(again.left) == set(SWAPPED)
    assert set(again.left.values()) == {"already on gptkernels"}
    assert {name: type(module) for name, module in model.named_modules()} == swapped
    report = restore_modules(model)
    assert set(report.changed) == set(SWAPPED)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(vars(module) == state[name] for name, module in model.named_modules())
    assert all(torch.equal(a, b) for a, b in zip(step(model), step(make())))
    assert restore_modules(model).changed == {}


def test_modules_of_gptkernels_nn_stay_after_restoring():
    model = nn.Sequential(gptkernels.nn.LayerNorm(4), nn.LayerNorm(4))
    assert set(replace_modules(model).changed) == {"1"}
    restore_modules(model)
    assert type(model[0]) is gptkernels.nn.LayerNorm
    assert type(model[1]) is nn.LayerNorm


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles_are_swapped_and_restore(how: str):
    model = make()
    replace_modules(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.norm is not model.norm
    assert other.norm is other.same_norm
    assert all(type(getattr(other, name)) is type(getattr(model, name)) for name in SWAPPED)
    assert all(torch.equal(a, b) for a, b in zip(step(other), step(model)))
    restore_modules(other)
    assert not any(isinstance(module, Swapped) for module in other.modules())
    assert isinstance(model.norm, Swapped)


def test_modules_with_a_patched_forward_or_parametrizations_are_left():
    hooked, parametrized = nn.LayerNorm(4), nn.LayerNorm(4)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    left = replace_modules(nn.ModuleList([hooked, parametrized])).left
    assert left == {
        "0": "its forward was replaced on the object itself (a library's hook?)",
        "1": "is parametrized",
    }
    assert hooked(5) == 5


def test_subclasses_with_a_forward_of_their_own_are_left():
    loud = Loud(4)
    assert replace_modules(loud).left == {"": "Loud has a forward of its own"}
    assert type(loud) is Loud


def test_a_module_whose_class_was_replaced_again_is_not_restored():
    """FSDP derives another class from ours; removing ours would remove FSDP's too."""
    model = nn.Sequential(nn.LayerNorm(4))
    replace_modules(model)
    model[0].__class__ = type("FSDPLayerNorm", (type(model[0]),), {})
    assert restore_modules(model).left == {"0": "its class was replaced again, by FSDPLayerNorm"}


def test_a_norm_called_with_a_gate_or_another_dtype_runs_its_own_forward():
    torch.manual_seed(0)
    ours, plain = GatedRMSNorm(16), GatedRMSNorm(16)
    plain.load_state_dict(ours.state_dict())
    assert replace_modules(ours).changed == {"": "GatedRMSNorm -> gptkernels.rms_norm"}
    x, gate = torch.randn(2, 3, 16)
    assert torch.equal(ours(x, gate), plain(x, gate))
    assert torch.equal(ours(x, gate=gate), plain(x, gate=gate))
    assert ours(x.bfloat16()).dtype == plain(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(ours(x), plain(x))


def test_compiled_model_runs_swapped_and_restored():
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(TOKENS)
    replace_modules(compiled)
    assert isinstance(model.norm, Swapped)
    with gptkernels.use_backend("reference"):
        torch.testing.assert_close(compiled(TOKENS), plain)
    restore_modules(compiled)
    assert torch.equal(compiled(TOKENS), plain)


def test_an_optimizer_continues_with_the_same_parameters():
    """Modules are replaced between two steps."""
    trained = []
    for swap in (True, False):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
            optimizer.step()
            if swap:
                replace_modules(model)
        trained.append([p.detach() for p in model.parameters()])
    for a, b in zip(*trained):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
