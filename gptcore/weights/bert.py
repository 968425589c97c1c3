"""Converts Hugging Face's BERT (names of tensors, configuration) to `gptcore.models.BERT` and back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptcore.weights.error import WeightsError

if TYPE_CHECKING:
    from gptcore.models.bert import BERTConfig

MODEL_TYPE = "bert"
"""The model's name in `gptcore.models.MODELS`."""
# Our name -> Hugging Face's, here and below.
_SIZES = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "token_types": "type_vocab_size",
}
# Options of Hugging Face's configuration of which this model supports one choice -> the default, and the accepted values.
_FIXED = {
    "hidden_act": ("gelu", ("gelu",)),
    "position_embedding_type": ("absolute", ("absolute",)),
    "is_decoder": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
}
_OUTSIDE = {
    "wte": "embeddings.word_embeddings",
    "wpe": "embeddings.position_embeddings",
    "wtype": "embeddings.token_type_embeddings",
    "ln_emb": "embeddings.LayerNorm",
}
_PARTS = {
    "attn.c_proj": "attention.output.dense",
    "ln_1": "attention.output.LayerNorm",
    "mlp.c_fc": "intermediate.dense",
    "mlp.c_proj": "output.dense",
    "ln_2": "output.LayerNorm",
}
_QKV = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
_HEAD = {"head.transform": "cls.predictions.transform.dense", "head.ln": "cls.predictions.transform.LayerNorm"}
# Tensors that this model does not have (a pooler, other heads), a copy of the token embedding, and constants.
_DROPPED = re.compile(
    r"(pooler\.|cls\.seq_relationship\.|cls\.predictions\.decoder\.|.*position_ids$|.*token_type_ids$)"
)


def config_from_huggingface(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `BERTConfig` from the ``config.json`` of a Hugging Face BERT.

    Raises:
        WeightsError: an option with a value that this model does not support.
        KeyError: a size that is missing.
    """
    for name, (default, accepted) in _FIXED.items():
        if (value := values.get(name, default)) not in accepted:
            raise WeightsError(f"{name}: got {value!r}; accepted is {accepted[0]!r}")
    return {ours: values[theirs] for ours, theirs in _SIZES.items()} | {"eps": values.get("layer_norm_eps", 1e-12)}


def convert(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a Hugging Face BERT, with or without the head for masked words, under this model's names.

    Sets ``config["masked_words"]`` to whether the head is there.

    Raises:
        WeightsError: a query, key or value without the other two.
    """
    state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    outside = {theirs: ours for ours, theirs in (_OUTSIDE | _HEAD).items()}
    parts = {theirs: ours for ours, theirs in _PARTS.items()}
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _DROPPED.match(name):
            continue
        if name == "cls.predictions.bias":
            ours["head.bias"] = tensor
            continue
        module, _, kind = name.rpartition(".")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)  # names of old files, converted from TensorFlow
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", module)
        if block is None:
            ours[f"{outside.get(module, module)}.{kind}"] = tensor
        elif block[2] in _QKV:
            if block[2] != _QKV[0]:
                continue  # the query takes all three
            names = [f"encoder.layer.{block[1]}.{part}.{kind}" for part in _QKV]
            if missing := [piece for piece in names if piece not in state]:
                raise WeightsError(f"{missing[0]}: is missing, beside {name}")
            ours[f"h.{block[1]}.attn.c_attn.{kind}"] = torch.cat([state[piece] for piece in names])
        else:
            ours[f"h.{block[1]}.{parts.get(block[2], block[2])}.{kind}"] = tensor
    config["masked_words"] = any(name.startswith("head.") for name in ours)
    return ours


def config_to_huggingface(config: BERTConfig) -> dict[str, Any]:
    """The ``config.json`` of the Hugging Face BERT that computes the same as a BERT of `config`."""
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM" if config.masked_words else "BertModel"],
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.eps,
        **{name: default for name, (default, _) in _FIXED.items()},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def row_parts(config: BERTConfig, part: str) -> tuple[int, ...]:
    """The rows of a block's layer that are a layer of their own in Hugging Face's BERT; () if it is one layer there too."""
    return (config.width,) * 3 if part == "attn.c_attn" else ()


def layer_names(config: BERTConfig, layer: int, part: str) -> tuple[str, ...]:
    """The names in Hugging Face's model of a module of a block, those of its `row_parts` in order."""
    prefix = "bert." if config.masked_words else ""
    return tuple(
        f"{prefix}encoder.layer.{layer}.{name}" for name in (_QKV if part == "attn.c_attn" else (_PARTS[part],))
    )


def to_huggingface(state: dict[str, Tensor], config: BERTConfig) -> dict[str, Tensor]:
    """This model's state dict under Hugging Face's names: ``BertForMaskedLM``'s, or ``BertModel``'s without the head."""
    prefix = "bert." if config.masked_words else ""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name == "head.bias":
            theirs["cls.predictions.bias"] = tensor
        elif module in _HEAD:
            theirs[f"{_HEAD[module]}.{kind}"] = tensor
        elif module in _OUTSIDE:
            theirs[f"{prefix}{_OUTSIDE[module]}.{kind}"] = tensor
        else:
            _, layer, part = module.split(".", 2)
            pieces = tensor.chunk(3) if part == "attn.c_attn" else (tensor,)
            names = layer_names(config, int(layer), part)
            theirs |= {f"{n}.{kind}": piece.contiguous() for n, piece in zip(names, pieces)}
    return theirs
