"""LoRA layers: what they compute, what they train, and under PyTorch's own machinery."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptkernels import available_backends
from gptkernels.testing import assert_within_budget
from torch import Tensor, nn

from gptcore import GPT, GPTConfig
from gptcore.models import BERT, BERTConfig, Model
from gptcore.nn import CrossAttention, Linear, LoRAConfig, add_lora, has_lora, merge_lora, without_lora
from gptcore.nn.lora import LoRALinear, adapt, lora_layers
from gptcore.train.parallel import checkpoint_activations
from tests.gptcore.adapters import make, train_adapters

PLAIN = [name for name in available_backends() if name != "triton"]  # linear layers have no kernel of Triton's
GAPS = [(0, 6), (9, 13)]  # of 15 rows: some before, between and after have no adapter


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(0, 61, (rows, 20))


def loss(model: Model, x: Tensor) -> Tensor:
    return model.loss(x[:, :-1], x[:, 1:]) if isinstance(model, GPT) else model(x, targets=x)


def layer_with_gaps(dtype: torch.dtype = torch.float32) -> tuple[LoRALinear, Tensor, Tensor]:
    """An adapted layer, an input, and the dense ``alpha / rank * B A`` in float64, written down row by row."""
    torch.manual_seed(0)
    plain = Linear(10, 15, backend="reference")
    layer = LoRALinear(plain, LoRAConfig(rank=2, alpha=3.0), GAPS).to(dtype)
    with torch.no_grad():
        layer.lora_B.normal_()
    down, up = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    dense = torch.zeros(15, 10, dtype=torch.float64)
    dense[0:6] = 1.5 * up[:6] @ down[:2]
    dense[9:13] = 1.5 * up[6:] @ down[2:]
    return layer, torch.randn(4, 3, 10), dense


def test_a_layer_adds_the_dense_product_of_each_part():
    layer, x, dense = layer_with_gaps()
    assert layer.bias is not None
    expected = x.double() @ (layer.weight.double() + dense).T
    torch.testing.assert_close(layer(x, add_bias=False).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x).double(), expected + layer.bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.product().double(), dense)


def test_gradients_are_those_of_the_dense_formula():
    layer, x, _ = layer_with_gaps(torch.float64)
    x = x.double().requires_grad_()
    out = layer(x)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    down = layer.lora_A.detach().clone().requires_grad_()
    up = layer.lora_B.detach().clone().requires_grad_()
    other = x.detach().clone().requires_grad_()
    dense = torch.cat([up[:6] @ down[:2], torch.zeros(3, 10).double(), up[6:] @ down[2:], torch.zeros(2, 10).double()])
    ((other @ (layer.weight + 1.5 * dense).T + layer.bias) * weights).sum().backward()
    for found, expected in ((layer.lora_A.grad, down.grad), (layer.lora_B.grad, up.grad), (x.grad, other.grad)):
        torch.testing.assert_close(found, expected)
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_new_adapters_change_nothing_and_alone_are_trained(kind: str):
    model = make(kind)
    x = tokens()
    with torch.no_grad():
        before = model(x)
    names = set(model.state_dict())
    add_lora(model, LoRAConfig(rank=4))
    assert names < set(model.state_dict())  # the base's names stay
    assert torch.equal(model(x), before)
    loss(model, x).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"{name}.lora_{half}" for name in lora_layers(model) for half in "AB"}
    assert all(parameter.requires_grad == (name in trained) for name, parameter in model.named_parameters())


def test_each_published_layer_has_a_pair_of_its_own():
    """In a Llama's packed layers; GPT-2's query, key and value are one layer in transformers too."""
    for kind, attention, mlp in (("gpt2", 1, 1), ("llama", 3, 2), ("bert", 3, 1)):
        model = make(kind)
        add_lora(model, LoRAConfig(rank=2))
        found = {name: len(layer.parts) for name, layer in lora_layers(model).items() if name.startswith("h.1.")}
        assert found == {"h.1.attn.c_attn": attention, "h.1.attn.c_proj": 1, "h.1.mlp.c_fc": mlp, "h.1.mlp.c_proj": 1}
    assert lora_layers(model)["h.1.attn.c_attn"].parts == ((0, 32), (32, 64), (64, 96))


@pytest.mark.parametrize(("layers", "count"), [("all", 8), ("attention", 4), ("mlp", 4)])
def test_layers_are_chosen(layers: Any, count: int):
    model = make("gpt2")
    add_lora(model, LoRAConfig(layers=layers))
    found = list(lora_layers(model))
    assert len(found) == count
    assert layers == "all" or all((".attn." in name) == (layers == "attention") for name in found)


def test_initial_values_are_those_of_peft():
    """A uniform within 1 / sqrt(inputs), B zero."""
    torch.manual_seed(0)
    layer = LoRALinear(Linear(400, 30), LoRAConfig(rank=32), [(0, 10), (10, 30)])
    assert 0.049 < layer.lora_A.abs().max() <= 1 / 20
    torch.testing.assert_close(layer.lora_A.std(), torch.tensor(1 / 20 / 3**0.5), rtol=0.03, atol=0)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("kernels", PLAIN)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_merged_equals_apart(kind: str, kernels: str):
    model = make(kind, kernels=kernels)
    train_adapters(model)
    x = tokens()
    with torch.no_grad():
        apart = model(x)
        with without_lora(model):
            base = model(x)
        merge_lora(model)
        assert not has_lora(model)
        assert not any("lora" in name for name in model.state_dict())
        torch.testing.assert_close(model(x), apart, rtol=1e-4, atol=1e-4)
    assert (base - apart).abs().max() > 0.1


def test_a_bf16_merge_rounds_once():
    """From float32 weights and adapters straight to bfloat16; from bfloat16 weights without leaving their dtype."""
    layer, _, dense = layer_with_gaps()
    exact = layer.weight.double() + dense
    assert torch.equal(layer.merged_weight(torch.bfloat16), exact.float().bfloat16())
    model = make("llama").to(torch.bfloat16)
    train_adapters(model)
    layer = lora_layers(model)["h.0.attn.c_attn"]
    assert layer.lora_A.dtype == torch.float32
    expected = (layer.weight.double() + layer.product().double()).float().bfloat16()
    merge_lora(model)
    assert torch.equal(model.get_submodule("h.0.attn.c_attn").weight, expected)


@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_bf16_stays_within_the_budget_of_the_merged_model(how: str):
    """The outputs of an adapted layer, with a bfloat16 base, err no more than those of a plain layer of the merged weight."""
    torch.manual_seed(0)
    layer = LoRALinear(Linear(64, 96).to(torch.bfloat16), LoRAConfig(rank=4), [(0, 64), (64, 96)])
    with torch.no_grad():
        layer.lora_B.normal_(std=0.05)
    x = torch.randn(200, 64).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = layer(x)
    assert layer.bias is not None
    assert found.dtype == torch.bfloat16
    merged = layer.weight.double() + layer.product().double()
    exact = x.double() @ merged.T + layer.bias.double()
    plain = nn.functional.linear(x, merged.bfloat16(), layer.bias)
    assert_within_budget("out", found, plain, exact)


def test_without_lora_is_the_base_exactly():
    model = make("llama")
    x = tokens()
    with torch.no_grad():
        base = model(x)
        train_adapters(model)
        adapted = model(x)
        with without_lora(model):
            assert torch.equal(model(x), base)
            with without_lora(model):
                pass
            assert torch.equal(model(x), base)  # still off
        assert torch.equal(model(x), adapted)
        with pytest.raises(RuntimeError, match="an error"), without_lora(model):
            raise RuntimeError("an error")
        assert torch.equal(model(x), adapted)


def test_dropout_falls_on_the_adapters_input_and_in_training_only():
    layer, x, _ = layer_with_gaps()
    before = layer.eval()(x)
    dropping = LoRALinear(layer, LoRAConfig(rank=2, alpha=3.0, dropout=0.5), GAPS)
    with torch.no_grad():
        dropping.lora_A.copy_(layer.lora_A)
        dropping.lora_B.copy_(layer.lora_B)
        assert torch.equal(dropping.eval()(x), before)
        torch.manual_seed(1)
        found = dropping.train()(x)
        torch.manual_seed(1)
        kept = nn.functional.dropout(x, 0.5)
        expected = nn.functional.linear(x, layer.weight, layer.bias) + kept @ layer.product().T
    torch.testing.assert_close(found, expected)


def test_cross_attention_has_adapters():
    torch.manual_seed(0)
    block = nn.ModuleDict({"cross": CrossAttention(16, 2)})
    x, source = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    before, _ = block["cross"](x, source)
    add_lora(block, LoRAConfig(rank=2, layers="attention"))
    assert sorted(lora_layers(block)) == ["cross.c_attn", "cross.c_proj", "cross.q_attn"]
    assert torch.equal(block["cross"](x, source)[0], before)


def test_a_cache_and_batches_generate_the_same_tokens_with_adapters():
    model = make("llama")
    train_adapters(model)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    x = tokens(1)[:, :6]
    found = model.generate(x, 12, temperature=0.0)
    assert torch.equal(found, merged.generate(x, 12, temperature=0.0))
    with without_lora(model):
        assert not torch.equal(found, model.generate(x, 12, temperature=0.0))


def test_a_compiled_step_is_the_eager_one():
    """In one graph, with adapters on and off."""
    model = make("llama", kernels=PLAIN[-1], n_layer=1)
    train_adapters(model)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    x = tokens()
    found = []
    for function in (model.loss, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            function(x[:, :-1], x[:, 1:]).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        with torch.no_grad(), without_lora(model):
            found[-1].append(function(x[:, :-1], x[:, 1:]))
    for eager, other in zip(*found):
        torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    model = make("gpt2")
    train_adapters(model, dropout=0.3)
    other = copy.deepcopy(model)
    checkpoint_activations(other)
    x = tokens()
    for each in (model, other):
        torch.manual_seed(1)
        loss(each.train(), x).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad)


def test_two_processes_train_the_same_adapters_as_one(tmp_path: Path):
    """Replicated and sharded, with a bfloat16 base: one sends gradients of the adapters only, the other gathers both dtypes."""
    command = [sys.executable, "-m", "tests.gptcore.adapters", str(tmp_path / "store")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    others = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    shown = [process.communicate(timeout=120)[0].decode() for process in others]
    for process, text in zip(others, shown):
        assert process.returncode == 0, text
        assert "ddp equal" in text
        assert "fsdp equal" in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank: got 0; accepted are positive integers"),
        ({"rank": 2.0}, "rank: got 2.0"),
        ({"alpha": 0}, "alpha: got 0; accepted are positive numbers"),
        ({"dropout": 1.0}, "dropout: got 1.0; accepted is 0 <= dropout < 1"),
        ({"layers": "head"}, "layers: got 'head'; accepted are 'all', 'attention', 'mlp'"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        LoRAConfig(**options)


def test_a_model_with_adapters_or_without_such_layers_is_refused():
    model = make("gpt2")
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        adapt(model, {}, LoRAConfig())
    with pytest.raises(ValueError, match="layers: got 'mlp'"):
        add_lora(nn.ModuleDict({"cross": CrossAttention(16, 2)}), LoRAConfig(layers="mlp"))


def test_a_model_on_the_meta_device_gets_its_adapters_there():
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("llama-tiny", vocab_size=61))
    add_lora(model, LoRAConfig())
    assert all(p.device.type == "meta" for p in model.parameters())
    with torch.device("meta"):
        add_lora(BERT(BERTConfig.preset("tiny", vocab_size=61)), LoRAConfig())
