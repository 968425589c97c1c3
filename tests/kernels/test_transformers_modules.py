"""MLPs and rotary embeddings of Hugging Face models: which get our forwards, which are left, and how they are called."""

from __future__ import annotations

import copy
import logging

import gptkernels
import pytest
import torch
import torch.nn.functional as F
import transformers
from gptkernels.integrations.transformers import accelerate_model, modules
from gptkernels.swap import Swapped
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.kernels import foreign

SIZES = {**foreign.SIZES, "pad_token_id": 0}
LLAMA = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "llama": lambda: transformers.LlamaForCausalLM(LLAMA),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
}
KINDS = {
    "gpt2": {"BiasGELU": 2, "LayerNorm": 5, "TanhGELU": 2},
    "llama": {"RMSNorm": 5, "Rotary": 2, "SwiGLU": 2},
    "bert": {"ExactGELU": 3, "LayerNorm": 6},
}
TOKENS = torch.arange(24).view(2, 12)


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


class ClampedMLP(LlamaMLP):
    """As DeepSeek-V4's and GLM-5's."""

    limit = 10.0

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(self.act_fn(gate) * up)


class WidelyClampedMLP(ClampedMLP):
    limit = 1e5


class DroppingMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, training=self.training)


class DroppingGPT2MLP(GPT2MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.dropout(super().forward(hidden_states), 0.1, training=self.training)


class ClampedGPT2MLP(GPT2MLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states)).clamp(max=1000)))


LEFT_MLPS = {
    "ClampedMLP does not compute down(silu(gate(x)) * up(x))": lambda: ClampedMLP(LLAMA),
    "WidelyClampedMLP does not compute down(silu(gate(x)) * up(x))": lambda: WidelyClampedMLP(LLAMA),
    "DroppingMLP draws random numbers": lambda: DroppingMLP(LLAMA),
    "GemmaMLP has an activation other than SiLU": lambda: GemmaMLP(transformers.GemmaConfig(**SIZES)),
    "DroppingGPT2MLP draws random numbers": lambda: DroppingGPT2MLP(48, transformers.GPT2Config(**GPT2)),
    "ClampedGPT2MLP does not compute dropout(c_proj(gelu(c_fc(x))))": lambda: ClampedGPT2MLP(
        48, transformers.GPT2Config(**GPT2)
    ),
}


@pytest.mark.parametrize("reason", LEFT_MLPS)
def test_an_mlp_that_does_more_is_left_and_the_log_says_why(reason: str, caplog: pytest.LogCaptureFixture):
    """Some differ only in training, or only for large numbers."""
    model = make("llama")
    model.model.layers[0].mlp = mlp = LEFT_MLPS[reason]().eval()
    kind = type(mlp)
    with caplog.at_level(logging.INFO, logger="gptkernels"):
        accelerate_model(model)
    assert type(mlp) is kind
    assert f"{reason}: model.layers.0.mlp" in caplog.text
    assert "LlamaMLP -> gptkernels.swiglu: model.layers.1.mlp" in caplog.text


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_accelerated_under_another_default_device(family: str, default: bool):
    """Weights that are loaded after acceleration on the meta device give the original's logits."""
    plain = make(family)
    with torch.device("meta"):
        model = FAMILIES[family]().eval()
        if not default:
            accelerate_model(model)
    if default:
        torch.set_default_device("meta")
        try:
            accelerate_model(model)
        finally:
            torch.set_default_device(None)
    kinds = [module._gptkernels_kind.__name__ for module in model.modules() if isinstance(module, Swapped)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == KINDS[family]
    model.load_state_dict(plain.state_dict(), assign=True)
    for name, buffer in plain.named_buffers():  # some are in no state dict
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_parts_are_called_by_the_names_of_their_own_arguments():
    for family, names in {"gpt2": {"mlp": "hidden_states"}, "llama": {"mlp": "x", "norm": "hidden_states"}}.items():
        model, x = accelerate_model(make(family)), torch.randn(2, 3, 32)
        for module_name, module in model.named_modules():
            if (argument := names.get(module_name.rpartition(".")[2])) is not None:
                assert isinstance(module, Swapped)
                assert torch.equal(module(**{argument: x}), module(x))


def test_a_function_put_into_an_activation_is_used():
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, activation_function="gelu")).eval()
    ours = accelerate_model(copy.deepcopy(plain))
    for model in (ours, plain):
        model.transformer.h[0].mlp.act.act = torch.sin
    torch.testing.assert_close(ours(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_gate_and_up_of_two_dtypes_run_the_originals_forward():
    """One projection is float32, as adapters are."""
    plain = make("llama").model.layers[0].mlp
    plain.bfloat16().up_proj = nn.Sequential(plain.up_proj, Widened())
    plain.down_proj = plain.down_proj.float()
    ours = copy.deepcopy(plain)
    accelerate_model(nn.ModuleList([ours, make("llama")]))
    assert isinstance(ours, Swapped)
    x = torch.randn(2, 3, 32).bfloat16()
    assert torch.equal(ours(x), plain(x))


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_rotary_embeddings_that_ours_does_not_support_run_the_originals():
    """Tables for other tokens than the queries', queries alone, other arguments and other widths."""
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as of_halves
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs

    def optional(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple:
        return theirs(q, q if k is None else k, cos, sin, unsqueeze_dim)

    calls: list[str] = []
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    table = torch.randn(2, 5, 4).repeat(1, 1, 2)
    one = table[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "rotary", lambda *a: calls.append("rotary") or gptkernels.rotary(*a))
        rotate = modules._fused_rotary(optional)
        for taken, args in (
            (2, (q, k, table, table)),
            (2, (q, k, one, one)),
            (0, (q, None, table, table)),
            (0, (q[:, :, :1], k[:, :, :1], table, table)),
            (0, (q, k[:, :, :1], table, table)),
            (0, (q, k[:1], table, table)),
            (0, (q, k, table[:, :1], table[:, :1])),
            (0, (q, k, table[:, :, :1], table[:, :, :1])),
            (0, (q, k, table.double(), table.double())),
            (0, (q, k, table, table.double())),
            (0, (q, k, table.clone().requires_grad_(), table)),
        ):
            calls.clear()
            found, expected = rotate(*args), optional(*args)
            assert len(calls) == taken
            for a, b in zip(found, expected):
                torch.testing.assert_close(a, b)
        calls.clear()
        for a, b in zip(rotate(q=q, k=k, cos=table, sin=table), optional(q, k, table, table)):
            assert torch.equal(a, b)
        for a, b in zip(rotate(q, k, one[0], one[0], 0), optional(q, k, one[0], one[0], 0)):
            assert torch.equal(a, b)
        half = table[..., :4]
        for a, b in zip(modules._fused_rotary(of_halves)(q, k, half, half), of_halves(q, k, half, half)):
            assert torch.equal(a, b)
        assert calls == []


def test_probing_changes_no_frequencies():
    """LongRoPE's embedding writes the frequencies that it uses into its buffer."""
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=32, rope_parameters=parameters)
    model = transformers.Phi3ForCausalLM(config).eval()
    model(torch.arange(3, 53)[None])  # a long text, whose factors stay until a short one comes
    before = {name: (id(t), t.clone()) for name, t in model.named_buffers()}
    accelerate_model(model)
    assert {name: id(t) for name, t in model.named_buffers()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(t, before[name][1]) for name, t in model.named_buffers())
