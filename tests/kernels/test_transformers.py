"""Accelerated Hugging Face models give the same logits, losses, gradients and text; restored ones the same bits."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import gptkernels
import pytest
import torch
import torch.nn.functional as F
import transformers
from gptkernels.integrations import transformers as integration
from gptkernels.integrations.transformers import accelerate_model
from gptkernels.swap import Swapped
from gptkernels.testing import assert_within_budget
from torch import Tensor, nn

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OFF = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, **OFF}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, eos_token_id=2, pad_token_id=0)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=5)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **NO_DROPOUT)),
}
CAUSAL = ("gpt2", "llama", "mistral", "qwen2")
PADDING = {
    "none": None,
    "left": torch.tensor([[1] * 12, [0] * 4 + [1] * 8, [0] * 7 + [1] * 5]),
    "right": torch.tensor([[1] * 12, [1] * 8 + [0] * 4, [1] * 5 + [0] * 7]),
}


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():  # norms and biases of 1 and 0 would hide that one is not used
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens(seed: int = 1, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(seed))


class Exact(nn.Module):
    """An RMS norm that computes in its input's dtype; Hugging Face's compute in float32, also for float64 inputs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def exact_twin(model: nn.Module) -> nn.Module:
    """A copy of the model in float64."""
    twin = copy.deepcopy(model).double()
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, Exact(child))
    return twin


def results(model: nn.Module, family: str, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Logits at real tokens, the loss, and the gradient of all parameters as one vector.

    A token's loss counts where the token it is predicted from is a real one too.
    """
    labels, shift = ids.clone(), 0 if family == "bert" else 1
    if mask is not None:
        seen = mask if shift == 0 else mask * F.pad(mask[:, :-1], (1, 0))
        labels[seen == 0] = -100
    out = model(ids, attention_mask=mask, labels=labels)
    loss = out.loss
    if out.logits.dtype == torch.float64:  # Hugging Face's loss is float32
        logits = out.logits[:, : ids.shape[1] - shift]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, shift:].flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    logits = out.logits if mask is None else out.logits[mask.bool()]
    return {"logits": logits, "loss": loss, "gradient": torch.cat([g.flatten() for g in gradients])}


def reached(model: nn.Module, *arguments, **options) -> list[tuple[str, dict]]:
    """The calls of this library's attention that a forward makes."""
    calls, fused = [], integration.attention.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration.attention, "attention", lambda *a, **k: calls.append(k) or fused(*a, **k))
        model(*arguments, **options)
    return calls


@pytest.mark.parametrize("padding", PADDING)
def test_logits_loss_and_gradients_are_the_originals(family: str, padding: str):
    plain = make(family)
    exact, ours = exact_twin(plain), accelerate_model(copy.deepcopy(plain))
    found: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for draw in range(3):  # compared together: the error of a single draw's few numbers depends on chance
        for model, values in zip((ours, plain, exact), found):
            for name, value in results(model, family, tokens(draw), PADDING[padding]).items():
                values.setdefault(name, []).append(value.detach())
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, values in found[0].items():
        assert_within_budget(name, *(torch.stack(v) for v in (values, found[1][name], found[2][name])))


def test_attention_gets_padding_and_windows_as_its_own_arguments(family: str):
    """Neither padding nor a window becomes a mask of (queries, keys)."""
    model = accelerate_model(make(family))
    for mask in PADDING.values():
        calls = reached(model, tokens(), attention_mask=mask)
        assert len(calls) == 2
        for call in calls:
            assert call["is_causal"] == (family != "bert")
            assert call["window"] == (5 if family == "mistral" else None)
            assert (call["key_mask"] is None) if mask is None else torch.equal(call["key_mask"], mask.bool())
    assert all(call["key_mask"] is None for call in reached(model, tokens(), attention_mask=torch.ones(3, 12)))


@pytest.mark.parametrize("family", CAUSAL, indirect=True)
@pytest.mark.parametrize("cache", [None, "static", "off"])
def test_greedy_text_is_the_originals(family: str, cache: str | None):
    plain = make(family)
    ours = accelerate_model(copy.deepcopy(plain))
    options = {"use_cache": False} if cache == "off" else {"cache_implementation": cache}
    options |= {"max_new_tokens": 7, "do_sample": False, "attention_mask": PADDING["left"]}
    assert torch.equal(ours.generate(tokens(), **options), plain.generate(tokens(), **options))


@pytest.mark.parametrize("family", CAUSAL, indirect=True)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_continued_by_several_tokens(family: str, static: bool):
    """There are fewer queries than keys and, with a static cache, unused slots behind the last key."""
    plain = make(family)
    ours, ids, outs = accelerate_model(copy.deepcopy(plain)), tokens(), []
    mask = PADDING["left"]
    for model in (plain, ours):
        make_cache = transformers.StaticCache if static else transformers.DynamicCache
        cache = make_cache(config=model.config, **({"max_cache_len": 20} if static else {}))
        with torch.no_grad():
            steps = [(0, 6), (6, 9), (9, 10), (10, 12)]
            logits = [
                model(
                    ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, position_ids=positions(mask, a, b)
                ).logits
                for a, b in steps
            ]
        outs.append(torch.cat(logits, dim=1)[mask.bool()])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        whole = plain(ids, attention_mask=mask, position_ids=positions(mask, 0, 12)).logits[mask.bool()]
    torch.testing.assert_close(outs[1], whole, rtol=1e-4, atol=1e-5)


def positions(mask: Tensor, start: int, end: int) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]


@pytest.mark.parametrize("family", ["llama", "mistral"], indirect=True)
def test_packed_sequences_and_custom_masks(family: str):
    plain = make(family)
    ours, ids = accelerate_model(copy.deepcopy(plain)), tokens()
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    tree = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    tree |= torch.eye(12, dtype=torch.bool)
    packing = {"position_ids": packed, "use_cache": False}  # with a cache, transformers treats them as one sequence
    for options in (packing, {"attention_mask": tree}, {"attention_mask": (~tree).float() * -1e9}):
        torch.testing.assert_close(ours(ids, **options).logits, plain(ids, **options).logits, rtol=1e-4, atol=1e-5)
        assert reached(ours, ids, **options) == []
    one = {"attention_mask": torch.ones(3, 1, 1, 12, dtype=torch.bool)}  # one row for all queries: not causal
    torch.testing.assert_close(ours(ids, **one).logits, plain(ids, **one).logits, rtol=1e-4, atol=1e-5)


def test_attention_weights_when_asked_for(family: str):
    plain = make(family)
    ours, ids, mask = accelerate_model(copy.deepcopy(plain)), tokens(), PADDING["right"]
    plain.set_attn_implementation("eager")
    expected, got = (m(ids, attention_mask=mask, output_attentions=True) for m in (plain, ours))
    assert len(got.attentions) == 2
    for a, b in zip(got.attentions, expected.attentions):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`output_attentions` attribute is not supported .* gptkernels"):
        ours.config.output_attentions = True


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks_stay_the_models_own(name: str):
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if name == "gpt_oss" else {}
    config = transformers.AutoConfig.for_model(name, **GROUPED, head_dim=8, sliding_window=5, **experts)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("gptkernels")  # accelerate_model leaves models that do not support "sdpa"
    for mask in PADDING.values():
        real = slice(None) if mask is None else mask.bool()
        a, b = (m(tokens(), attention_mask=mask).logits[real] for m in (ours, plain))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(family: str):
    model = accelerate_model(make(family)).train()
    before = results(model, family, tokens(), PADDING["left"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its successor is not in every supported version
        model.gradient_checkpointing_enable()
    after = results(model, family, tokens(), PADDING["left"])
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "bert"], indirect=True)
def test_compiles_without_graph_breaks(family: str):
    torch._dynamo.reset()  # models of other families count towards the limit of recompilations
    model = accelerate_model(make(family))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    options = {"attention_mask": PADDING["left"], "use_cache": False}
    a, b = (m(tokens(), **options).logits[PADDING["left"].bool()] for m in (compiled, model))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_restoring_gives_the_original_back(family: str):
    model, plain = make(family), make(family)
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    accelerate_model(model)
    assert model.config._attn_implementation == "gptkernels"
    assert sum(isinstance(module, Swapped) for module in model.modules()) > 4
    swapped = {name: type(module) for name, module in model.named_modules()}
    accelerate_model(model)
    assert {name: type(module) for name, module in model.named_modules()} == swapped
    report = gptkernels.restore_modules(model)
    assert report.changed[""] == "attention and loss"
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(vars(module) == state[name] for name, module in model.named_modules())
    assert model.config._attn_implementation == implementation
    before, after = (results(m, family, tokens(), PADDING["left"]) for m in (plain, model))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_model_of_the_same_file_is_not_touched(family: str):
    other = make(family)
    before = other(tokens(), attention_mask=PADDING["left"]).logits
    ours = accelerate_model(make(family))
    ours(tokens())
    assert torch.equal(other(tokens(), attention_mask=PADDING["left"]).logits, before)
    assert not any(isinstance(module, Swapped) for module in other.modules())


WHAT = {
    "gpt2": {"BiasGELU": 2, "LayerNorm": 5, "TanhGELU": 2},
    "llama": {"RMSNorm": 5, "Rotary": 2, "SwiGLU": 2},
    "mistral": {"RMSNorm": 5, "Rotary": 2, "SwiGLU": 2},
    "qwen2": {"RMSNorm": 5, "Rotary": 2, "SwiGLU": 2},
    "bert": {"ExactGELU": 3, "LayerNorm": 6},
}


def test_what_is_swapped(family: str):
    model = accelerate_model(make(family))
    kinds = [module._gptkernels_kind.__name__ for module in model.modules() if isinstance(module, Swapped)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == WHAT[family]


def test_hooks_state_dict_copies_and_files(family: str, tmp_path):
    plain = make(family)
    model, seen = copy.deepcopy(plain), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    expected = model(tokens()).logits
    heard = set(seen)
    seen.clear()
    accelerate_model(model)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert seen == heard  # every hook is called
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    accelerated = accelerate_model(copy.deepcopy(plain))
    results_here = accelerated(tokens()).logits
    for other in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert torch.equal(other(tokens()).logits, results_here)
        gptkernels.restore_modules(other)
        assert torch.equal(other(tokens()).logits, expected)
    accelerated.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path, attn_implementation="gptkernels").eval()
    assert type(loaded) is type(plain)
    assert not any(isinstance(module, Swapped) for module in loaded.modules())
    assert len(reached(loaded, tokens())) == 2
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)
def test_changes_after_acceleration_take_effect(family: str):
    """A projection that is wrapped later, as PEFT does, is called; an activation that is replaced later is used."""
    plain = make(family)
    model = accelerate_model(copy.deepcopy(plain))
    for one in (model, plain):
        if family == "gpt2":
            first, second = (block.mlp for block in one.transformer.h)
            first.c_fc, second.act = nn.Sequential(first.c_fc, nn.Tanh()), nn.ReLU()
        else:
            first, second = (layer.mlp for layer in one.model.layers)
            first.gate_proj, second.act_fn = nn.Sequential(first.gate_proj, nn.Tanh()), nn.ReLU()
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)
def test_an_activation_with_a_hook_is_called(family: str):
    model, heard = accelerate_model(make(family)), []
    for name, module in model.named_modules():
        if name.endswith((".act", ".act_fn")):
            module.register_forward_hook(lambda *_: heard.append(1))
    model(tokens())
    assert len(heard) == 2


def test_attention_dropout_applies_only_in_training():
    config = transformers.GPT2Config(**{**GPT2, "attn_pdrop": 0.25})
    model = accelerate_model(transformers.GPT2LMHeadModel(config))
    assert [call["dropout_p"] for call in reached(model.train(), tokens())] == [0.25, 0.25]
    assert [call["dropout_p"] for call in reached(model.eval(), tokens())] == [0.0, 0.0]
    model.train()
    torch.manual_seed(0)
    first = model(tokens()).logits
    assert not torch.equal(model(tokens()).logits, first)
    torch.manual_seed(0)
    assert torch.equal(model(tokens()).logits, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_equal_transformers(dtype: torch.dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 11).to(dtype), torch.randint(0, 11, (2, 6))
    labels[0, 2] = -100
    shifted = torch.randint(0, 11, (2, 6))
    for theirs, ours in integration.losses.LOSSES.items():
        variants = [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}]
        variants += [{"shift_labels": shifted}] if ours is integration.losses.causal_lm_loss else []
        for options in variants:
            values = []
            for loss in (ours, theirs):
                leaf = logits.clone().requires_grad_()
                value = loss(leaf, labels, vocab_size=11, **options)
                values.append((value, *torch.autograd.grad(value, leaf)))
            torch.testing.assert_close(*values)


def my_loss(logits: Tensor, labels: Tensor, **options) -> Tensor:
    return logits.sum()


def test_a_custom_loss_stays():
    model = make("llama")
    model.loss_function = my_loss
    accelerate_model(model)
    assert model.loss_function is my_loss
    gptkernels.restore_modules(model)
    assert model.loss_function is my_loss


def test_bfloat16_and_autocast():
    """16-bit weights, and float32 weights under autocast, where rotary tables and queries differ in dtype."""
    for family, autocast in itertools.product(("gpt2", "llama", "bert"), (False, True)):
        plain = make(family) if autocast else make(family).bfloat16()
        ours = accelerate_model(copy.deepcopy(plain))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            a, b = (m(tokens(), attention_mask=PADDING["left"]).logits for m in (ours, plain))
        assert a.dtype == b.dtype
        real = PADDING["left"].bool()
        torch.testing.assert_close(a[real], b[real], rtol=0.05, atol=0.05)


def test_other_objects_than_transformers_models_are_refused():
    with pytest.raises(TypeError, match=r"got Linear; accepted is a transformers\.PreTrainedModel"):
        accelerate_model(nn.Linear(2, 2))
    wrapped = nn.ModuleDict({"inner": make("gpt2")})
    assert accelerate_model(wrapped) is wrapped
    assert wrapped["inner"].config._attn_implementation == "gptkernels"


def test_an_unsupported_version_is_named(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    def load() -> None:
        spec = importlib.util.spec_from_file_location("another", integration.__file__)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    with monkeypatch.context() as patch:
        patch.delattr("transformers.masking_utils.sdpa_mask")
        with pytest.raises(ImportError, match=rf"found transformers {transformers.__version__}; .*sdpa_mask"):
            load()
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size, cache_position, **rest: None)
    with pytest.raises(
        ImportError, match=r"masks are made from cache positions; accepted are versions .*5\.17 to 5\.24"
    ):
        load()
