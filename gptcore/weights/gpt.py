"""Converts Hugging Face's GPT-2, Llama and Mistral (names and layouts of tensors, configuration) to `gptcore.GPT` and back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptcore.weights.error import WeightsError

if TYPE_CHECKING:
    from gptcore.models.gpt import GPTConfig


MODEL_TYPE = "gpt"
"""The model's name in `gptcore.models.MODELS`."""
# Hugging Face's GPT-2 stores these as (in, out); nn.Linear as (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Our name -> Hugging Face's, here and below.
_GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "width": "n_embd",
}
_LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
}
# Options of Hugging Face's configuration of which this model supports one choice -> the default, and the accepted values.
_GPT2_FIXED = {
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
}
_LLAMA_FIXED = {
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "sliding_window": (None, (None,)),
}
_LLAMA = {"norm": "rms_norm", "positions": "rotary", "activation": "swiglu", "bias": False}
# The tokenizer knows which tokens begin and end a text. transformers' defaults for the two models would be wrong.
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
_LLAMA_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
# Modules of a block that are one module in Llama, and modules that hold the rows of several.
_LLAMA_PARTS = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_LLAMA_PACKED = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
}


def from_huggingface(state: dict[str, Tensor], *, tied: bool = True) -> dict[str, Tensor]:
    """The state dict of a Hugging Face GPT-2 or Llama under this model's names and layouts.

    Args:
        state: GPT-2's names may begin with ``transformer.`` or not.
        tied: the output layer shares the token embedding.

    Raises:
        WeightsError: output weights that differ from the token embedding although they are tied, or a query, key, value,
            gate or up projection that is missing.
    """
    llama = any(name.startswith("model.layers.") for name in state)
    ours = _from_llama(state) if llama else _from_gpt2(state)
    head = ours.get("lm_head.weight")
    if head is not None and tied:
        if "wte.weight" in ours and not torch.equal(head, ours["wte.weight"]):
            raise WeightsError("lm_head.weight: differs from the token embedding; accepted are tied weights")
        del ours["lm_head.weight"]
    return ours


def convert(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """`from_huggingface` for a model with these fields of `GPTConfig`."""
    return from_huggingface(state, tied=config["tied"])


def _from_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks
            ours[name] = tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
    return ours


def _from_llama(state: dict[str, Tensor]) -> dict[str, Tensor]:
    singles = {theirs: ours for ours, theirs in (_LLAMA_OUTSIDE | _LLAMA_PARTS).items()}
    packed = {part: ours for ours, parts in _LLAMA_PACKED.items() for part in parts}
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        prefix, part = (f"h.{block[1]}.", block[2]) if block else ("", module)
        if part in packed:
            whole = packed[part]
            if part != _LLAMA_PACKED[whole][0]:
                continue  # the first module of the pack takes all of them
            names = [f"model.layers.{block[1]}.{piece}.{kind}" for piece in _LLAMA_PACKED[whole]]  # type: ignore[index]
            if missing := [piece for piece in names if piece not in state]:
                raise WeightsError(f"{missing[0]}: is missing, beside {name}")
            ours[f"{prefix}{whole}.{kind}"] = torch.cat([state[piece] for piece in names])
        else:
            ours[f"{prefix}{singles.get(part, part)}.{kind}"] = tensor
    return ours


def to_huggingface(state: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """This model's state dict under Hugging Face's names and layouts; a tied output layer is left out.

    Raises:
        WeightsError: a configuration that neither GPT-2 nor Llama has; names the field.
    """
    if architecture(config) == "gpt2":
        return {
            name if name.startswith("lm_head.") else f"transformer.{name}": (
                tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
            )
            for name, tensor in state.items()
        }
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in _LLAMA_OUTSIDE:
            theirs[f"{_LLAMA_OUTSIDE[module]}.{kind}"] = tensor
            continue
        _, layer, part = module.split(".", 2)
        rows = row_parts(config, part)
        pieces = tensor.split(rows) if rows else (tensor,)
        names = layer_names(config, int(layer), part)
        theirs |= {f"{n}.{kind}": piece.contiguous() for n, piece in zip(names, pieces)}
    return theirs


def row_parts(config: GPTConfig, part: str) -> tuple[int, ...]:
    """The rows of a block's layer that are a layer of their own in Hugging Face's model; () if it is one layer there too.

    Args:
        config: the model's configuration.
        part: the layer's name in the block, such as ``attn.c_attn``.
    """
    if part not in _LLAMA_PACKED or not _is("llama", config):
        return ()
    key_rows = config.kv_heads * config.head_dim
    return (config.width, key_rows, key_rows) if part == "attn.c_attn" else (config.hidden, config.hidden)


def layer_names(config: GPTConfig, layer: int, part: str) -> tuple[str, ...]:
    """The names in Hugging Face's model of a module of a block, those of its `row_parts` in order.

    A model that Hugging Face does not have keeps its own name.
    """
    if _is("llama", config):
        return tuple(f"model.layers.{layer}.{name}" for name in _LLAMA_PACKED.get(part) or (_LLAMA_PARTS[part],))
    return (f"transformer.h.{layer}.{part}",)


def is_gpt2(config: GPTConfig) -> bool:
    """Whether Hugging Face's GPT-2 computes the same."""
    return _is("gpt2", config)


def _is(name: str, config: GPTConfig) -> bool:
    try:
        return architecture(config) == name
    except WeightsError:  # Hugging Face has no such model
        return False


def architecture(config: GPTConfig) -> str:
    """The Hugging Face model that computes the same as a GPT of `config`: ``"gpt2"`` or ``"llama"``.

    Raises:
        WeightsError: neither does; names the field that differs.
    """
    gpt2: dict[str, Any] = {"norm": "layer_norm", "positions": "learned", "activation": "gelu", "bias": True}
    name, choices = ("gpt2", gpt2) if config.positions == "learned" else ("llama", _LLAMA)
    if name == "gpt2":
        choices = choices | {"kv_heads": config.n_head}
    for field, value in choices.items():
        if getattr(config, field) != value:
            raise WeightsError(
                f"{field}: got {getattr(config, field)!r} with {config.positions} positions; Hugging Face's {name} has {value!r}"
            )
    return name


def config_from_huggingface(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `GPTConfig` from the ``config.json`` of a Hugging Face GPT-2, Llama or Mistral.

    Raises:
        WeightsError: another model, or an option with a value that this model does not support.
        KeyError: a size that is missing.
    """
    kind = values.get("model_type", "gpt2")
    if kind not in ("gpt2", "llama", "mistral"):
        raise WeightsError(f"model_type: got {kind!r}; accepted are 'gpt2', 'llama' and 'mistral'")
    for name, (default, accepted) in (_GPT2_FIXED if kind == "gpt2" else _LLAMA_FIXED).items():
        if (value := values.get(name, default)) not in accepted:
            raise WeightsError(f"{name}: got {value!r}; accepted is {accepted[0]!r}")
    if kind == "gpt2":
        sizes = {ours: values[theirs] for ours, theirs in _GPT2_SIZES.items()}
        return {
            **sizes,
            "mlp_width": values.get("n_inner"),
            "tied": values.get("tie_word_embeddings", True),
            "eps": values.get("layer_norm_epsilon", 1e-5),
        }
    sizes = {ours: values[theirs] for ours, theirs in _LLAMA_SIZES.items()}
    if values.get("head_dim") not in (None, sizes["width"] // sizes["n_head"]):
        raise WeightsError(
            f"head_dim: got {values['head_dim']}; accepted is hidden_size / num_attention_heads, "
            f"{sizes['width'] // sizes['n_head']}"
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return {
        **sizes,
        **_LLAMA,
        "n_kv_head": values.get("num_key_value_heads"),
        "rotary_base": float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        "rotary_scaling": _scaling(rope),
        "tied": values.get("tie_word_embeddings", False),
        "eps": values.get("rms_norm_eps", 1e-6),
    }


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise WeightsError(f"rope_type: got {kind!r}; accepted are 'default' and 'llama3'")
    factors = {name: rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return factors | {"original_context": rope["original_max_position_embeddings"]}


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """The ``config.json`` of the Hugging Face GPT-2 or Llama that computes the same as a GPT of `config`.

    Raises:
        WeightsError: a configuration that neither GPT-2 nor Llama has; names the field.
    """
    if architecture(config) == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            **{theirs: getattr(config, ours) for ours, theirs in _GPT2_SIZES.items()},
            "n_inner": config.mlp_width,
            "layer_norm_epsilon": config.eps,
            "tie_word_embeddings": config.tied,
            **{name: default for name, (default, _) in _GPT2_FIXED.items()},
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **_NO_TOKENS,
        }
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{theirs: getattr(config, ours) for ours, theirs in _LLAMA_SIZES.items()},
        "intermediate_size": config.hidden,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rotary_base,
        **{name: default for name, (default, _) in _LLAMA_FIXED.items() if name != "sliding_window"},
        "attention_dropout": 0.0,
        **_NO_TOKENS,
    }
    if (scaling := config.rotary_scaling) is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return values
