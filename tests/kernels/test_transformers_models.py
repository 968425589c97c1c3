"""Parts that support "sdpa" get our attention, others keep theirs, and restoring gives the configs back."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
from collections.abc import Callable
from typing import Any

import gptkernels
import pytest
import torch
import transformers
from gptkernels.integrations import transformers as integration
from gptkernels.integrations.transformers import accelerate_model, attend, make_mask
from gptkernels.integrations.transformers.attention import own_eager
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tests.kernels.foreign import SIZES

TEXT = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])


pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind: str, config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def git() -> Any:
    return build("GitForCausalLM", transformers.GitConfig(**TEXT, vision_config={**VISION, **IMAGE}))


def bridgetower() -> Any:
    wide = {"hidden_size": 64, "num_hidden_layers": 2}
    vision = {**wide, **IMAGE}
    text = {**TEXT, "hidden_size": 64}
    config = {**wide, "num_attention_heads": 4, "contrastive_hidden_size": 16}
    return build("BridgeTowerModel", transformers.BridgeTowerConfig(**config, text_config=text, vision_config=vision))


def deepseek() -> Any:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    }
    sparse = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    config = transformers.AutoConfig.for_model(
        "deepseek_v32", **TEXT, num_key_value_heads=4, first_k_dense_replace=1, **ranks, **experts, **sparse
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


SINKS = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5}


def gpt_oss() -> Any:
    return build("GptOssForCausalLM", transformers.GptOssConfig(**TEXT, **SINKS))


def informer() -> Any:
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    times = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
    return build("InformerModel", transformers.InformerConfig(**small, **times))


def gemma4(shared: int = 0) -> Any:
    layers = ["sliding_attention", "full_attention"] * 2
    config = {**TEXT, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    config |= {"layer_types": layers, "sliding_window": 5, "num_kv_shared_layers": shared}
    config |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    return build("Gemma4ForCausalLM", transformers.Gemma4TextConfig(**config))


def lasr() -> Any:
    config = {**VISION, "num_hidden_layers": 2, "num_mel_bins": 16, "subsampling_conv_channels": 8}
    return build("LasrEncoder", transformers.LasrEncoderConfig(**config))


def encoder_as_decoder() -> Any:
    return build("BertLMHeadModel", transformers.BertConfig(**TEXT, **NO_DROPOUT))  # is_decoder stays False


def pix2struct() -> Any:
    text = {"vocab_size": 97, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    vision = {"hidden_size": 32, "patch_embed_hidden_size": 64, "d_ff": 48, "d_kv": 8, "seq_len": 16, **VISION}
    config = transformers.Pix2StructConfig(text_config=text, vision_config=vision)
    return build("Pix2StructForConditionalGeneration", config)


def sam() -> Any:
    vision = {**VISION, "hidden_size": 16, "output_channels": 16, "image_size": 32, "patch_size": 8, "window_size": 2}
    vision |= {"global_attn_indexes": [0], "num_pos_feats": 8, "mlp_dim": 16}
    prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    config = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    return build("SamModel", transformers.SamConfig(**config))


PATCHES = torch.cat([torch.randint(0, 8, (2, 16, 2)).float(), ramp(2, 16, 64)], dim=-1)
PATCHES[1, 10:] = 0
SERIES = {"past_values": ramp(2, 10), "past_time_features": ramp(2, 10, 1), "past_observed_mask": torch.ones(2, 10)}
SERIES |= {"future_values": ramp(2, 4), "future_time_features": ramp(2, 4, 1)}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}


def text(model: Any, **options: Any) -> Tensor:
    return model(IDS, attention_mask=PADDING, **options).logits[:, -1:]


def generated(model: Any, **options: Any) -> Tensor:
    return model.generate(IDS, **GREEDY, **options)


def read(model: Any, **options: Any) -> Tensor:
    seen = (PATCHES.sum(-1) != 0).float()
    return model.generate(flattened_patches=PATCHES, attention_mask=seen, decoder_start_token_id=0, **GREEDY, **options)


def forecast(model: Any) -> Tensor:
    torch.manual_seed(0)  # its sparse attention samples the keys
    return model(**SERIES).last_hidden_state


STATIC = {"cache_implementation": "static"}
OWN: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], str]] = {
    "git": (git, text, 'GitForCausalLM does not support "sdpa"'),
    "bridgetower": (
        bridgetower,
        lambda m: m(IDS, attention_mask=PADDING, pixel_values=ramp(2, 3, 16, 16)).text_features,
        'BridgeTowerModel does not support "sdpa"',
    ),
    "informer": (informer, forecast, 'InformerModel does not support "sdpa"'),
    "gpt_oss": (gpt_oss, text, 'GptOssForCausalLM does not support "sdpa"'),
    "deepseek_v32": (deepseek, text, 'DeepseekV32Attention makes its own mask, only for "eager" and "sdpa"'),
}
OURS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "gemma4": (gemma4, text),
    "gemma4, the last layers on the last tokens": (
        functools.partial(gemma4, 2),
        functools.partial(text, logits_to_keep=2),
    ),
    "gemma4, static": (functools.partial(gemma4, 2), functools.partial(generated, **STATIC)),
    "gemma4, static, padded": (gemma4, functools.partial(generated, attention_mask=PADDING, **STATIC)),
    "lasr": (
        lasr,
        lambda m: m(ramp(2, 64, 16), attention_mask=torch.tensor([[1] * 64, [1] * 40 + [0] * 24])).last_hidden_state,
    ),
    "bert, an encoder, static": (encoder_as_decoder, functools.partial(generated, **STATIC)),
    "bert, an encoder, static, padded": (
        encoder_as_decoder,
        functools.partial(generated, attention_mask=PADDING, **STATIC),
    ),
    "pix2struct": (pix2struct, read),
    "pix2struct, beams, static": (pix2struct, functools.partial(read, num_beams=2, **STATIC)),
    "sam": (
        sam,
        lambda m: m(pixel_values=ramp(1, 3, 32, 32), input_points=torch.tensor([[[[4.0, 5.0]]]])).pred_masks,
    ),
}


def implementations(model: nn.Module) -> dict[str, str | None]:
    """The attention that every config in a model names, nested configs too."""
    found: dict[str, str | None] = {}

    def walk(name: str, config: PreTrainedConfig) -> None:
        found[name] = config._attn_implementation
        for key, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                walk(f"{name}.{key}", value)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                walk(f"{name}:{key}", value)
    return found


def check(plain: Any, run: Callable[[Any], Tensor]) -> dict[str, str | None]:
    """Checks that results are equal when accelerated and bit-equal when restored; returns what the accelerated configs name."""
    ours, before = copy.deepcopy(plain), implementations(plain)
    with torch.no_grad():
        expected = run(plain)
        accelerate_model(ours)
        named = implementations(ours)
        torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-5)
        gptkernels.restore_modules(ours)
        assert implementations(ours) == before
        assert torch.equal(run(ours), expected)
    return named


@pytest.mark.parametrize("name", OURS)
def test_models_that_compute_with_their_mask(name: str):
    make, run = OURS[name]
    assert "gptkernels" in check(make(), run).values()


@pytest.mark.parametrize("name", OWN)
def test_models_without_sdpa_support_keep_their_attention(name: str, caplog: pytest.LogCaptureFixture):
    make, run, reason = OWN[name]
    plain = make()
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        assert check(plain, run) == implementations(plain)
    assert f"attention: {reason}: the model itself" in caplog.text


def test_the_log_says_what_became_of_the_attention(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger=integration.__name__):
        accelerate_model(build("LlamaForCausalLM", transformers.LlamaConfig(**TEXT)))
    assert "switched 1 module:\n     1  attention -> gptkernels.attention: the model itself" in caplog.text


def test_a_part_keeps_its_attention_and_the_others_get_ours():
    text = {**TEXT, **SINKS, "model_type": "gpt_oss"}
    vision = {**VISION, **IMAGE, "model_type": "siglip_vision_model"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    model = accelerate_model(build("LlavaForConditionalGeneration", config))
    assert model.config.vision_config._attn_implementation == model.config._attn_implementation == "gptkernels"
    assert model.config.text_config._attn_implementation == "eager"


def test_sparse_attention_is_never_made_dense_silently():
    """With the name set by hand, the model passes indices in place of the mask."""
    model = deepseek()
    model.set_attn_implementation("gptkernels")
    with pytest.raises(
        NotImplementedError, match=r"DeepseekV32Attention: got indices, .* accepted is .*\"sdpa\" or \"eager\""
    ):
        model(IDS)


class Layer(nn.Module):
    """A layer whose eager attention has an unusual name and a keyword of its own."""

    is_causal = True

    def forward(self) -> Any:
        return integration.AttentionInterface().get_interface("eager", my_eager_attention_forward)


def my_eager_attention_forward(module, query, key, value, mask, scaling, dropout=0.0, shift=None, **kwargs):
    weights = (query @ key.mT * scaling + mask + shift).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


def test_an_unknown_keyword_goes_to_the_layers_own_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=generator)
    shift = torch.randn(6, 6, generator=generator)
    padding = PADDING[:, 3:9]
    mask = make_mask(2, 6, 6, attention_mask=padding)
    out, weights = attend(Layer(), q, k, v, mask, scaling=0.5, shift=shift)
    dense = torch.ones(6, 6).tril().bool() & padding.bool()[:, None, None]
    allowed = torch.zeros(()).where(dense, torch.finfo(torch.float32).min)
    expected = (q @ k.mT * 0.5 + shift + allowed).softmax(dim=-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, (expected @ v).transpose(1, 2))
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(Layer(), q, k, v, mask, scaling=0.5, shift=shift)[0], out)
    known = {"position_ids": torch.arange(6)[None], "cu_seq_lens_q": None, "use_cache": True, "sliding_window": 4}
    assert attend(Layer(), q, k, v, mask, scaling=0.5, **known)[1] is None


def test_a_layer_gets_its_own_of_two_eager_attentions_in_a_file():
    models = transformers.models.llama4.modeling_llama4
    assert own_eager(models.Llama4VisionAttention) is models.vision_eager_attention_forward
    assert own_eager(models.Llama4TextAttention) is models.eager_attention_forward
    assert own_eager(nn.Identity) is None


def test_models_of_one_config_are_switched_one_at_a_time():
    config = transformers.LlamaConfig(**TEXT)
    first, second = (build("LlamaForCausalLM", config) for _ in range(2))
    accelerate_model(first)
    assert (
        first.config._attn_implementation == first.model.layers[0].self_attn.config._attn_implementation == "gptkernels"
    )
    assert first.config is first.model.config is first.model.layers[0].self_attn.config
    assert second.config is config
    assert set(implementations(second).values()) == {config._attn_implementation} == {"sdpa"}
    kept = first.config
    accelerate_model(first)
    assert first.config is kept
    first.config.use_cache = False  # a change in between stays
    gptkernels.restore_modules(first)
    assert (first.config._attn_implementation, first.config.use_cache, config.use_cache) == ("sdpa", False, True)


def test_copies_are_restored_too():
    model = accelerate_model(sam())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gptkernels.restore_modules(other)
        assert "gptkernels" not in implementations(other).values()
    assert "gptkernels" in implementations(model).values()


def test_an_attention_chosen_later_is_not_undone():
    model = accelerate_model(build("LlamaForCausalLM", transformers.LlamaConfig(**TEXT)))
    model.set_attn_implementation("eager")
    gptkernels.restore_modules(model)
    assert model.config._attn_implementation == "eager"
