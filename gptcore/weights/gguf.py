"""Reads Llama-family models from GGUF files: the configuration, the weights (dequantised by the ``gguf`` library), metadata."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore import _extras
from gptcore.nn import RotaryScaling, rotary_tables
from gptcore.weights.error import WeightsError
from gptcore.weights.gpt import from_huggingface

_DIVISORS = "rope_freqs.weight"
"""A tensor of divisors for the rotary frequencies: how Llama 3's scaling is stored."""
# GGUF's name -> Hugging Face's.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _reader(path: Path) -> Any:
    """The library's reader of the file. The last one is kept: making one is slow, and weights and tokenizer each need it."""
    return _kept_reader(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _kept_reader(path: Path, modified: int) -> Any:
    gguf = _extras.load("gguf", str(path))
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader checks nothing, so a damaged file can raise any error
        raise WeightsError(f"{path}: is damaged or no GGUF file ({error})") from error


def read_fields(path: Path, prefix: str) -> dict[str, Any]:
    """The file's metadata fields whose names begin with `prefix`."""
    reader = _reader(path)
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith(prefix)}


def load_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of `GPTConfig` and the state dict, float32, of a Llama-family GGUF file.

    Raises:
        WeightsError: a file that is damaged, or of another architecture.
        MissingPackageError: the gguf package is missing.
    """
    gguf = _extras.load("gguf", str(path))
    reader = _reader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = values.get("general.architecture")
    if kind != "llama":
        raise WeightsError(f"{path}: general.architecture: got {kind!r}; accepted is 'llama'")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(values, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: describes no model this version can load ({error})") from error
    state = {}
    for name, tensor in tensors.items():
        if name == _DIVISORS:
            continue
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
        prefix, part = (f"model.layers.{block[1]}.", block[2]) if block else ("", module)
        known = _PARTS if block else _OUTSIDE
        try:
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        except Exception as error:
            raise WeightsError(f"{path}: {name} cannot be dequantised ({error})") from error
        if part in ("attn_q", "attn_k"):
            weight = _half_split(weight, config["n_head" if part == "attn_q" else "n_kv_head"])
        state[f"{prefix}{known.get(part, part)}.{kind}"] = weight
    return config, from_huggingface(state, tied=config["tied"])


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows ``(heads * D, C)`` of a query or key projection for our rotary embedding.

    GGUF stores the two values that are rotated together side by side; ours are D / 2 apart: row ``2 i + j`` of a head
    becomes row ``j * D / 2 + i``. Attention scores are sums over a head's dimensions, so they do not change when queries
    and keys are reordered alike.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def llama3_scaling(divisors: Tensor, head_dim: int, rotary_base: float, original_context: int) -> RotaryScaling:
    """The `RotaryScaling` that divides the rotary frequencies by `divisors` ``(head_dim / 2,)``.

    A GGUF file holds the divisors and not the scaling's parameters. Llama 3's low and high frequency factors are 1 and 4,
    and its factor is the largest divisor.

    Raises:
        ValueError: this scaling has other divisors.
    """
    scaling = RotaryScaling(float(divisors.max()), 1.0, 4.0, original_context)
    position = torch.ones(1)  # the angle at position 1 is the frequency
    plain, scaled = (
        torch.atan2(sin, cos)[0]
        for cos, sin in (rotary_tables(position, head_dim, rotary_base, s) for s in (None, scaling))
    )
    if divisors.shape != plain.shape or not torch.allclose(divisors, plain / scaled, rtol=1e-3):
        raise ValueError(f"{_DIVISORS}: got other frequencies than Llama 3's; accepted are those, or none")
    return scaling


def _config(values: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The fields of `GPTConfig` from the file's metadata and tensors."""

    def value(name: str, *default: Any) -> Any:
        return values.get(f"llama.{name}", *default) if default else values[f"llama.{name}"]

    if (kind := value("rope.scaling.type", "none")) != "none":
        raise ValueError(f"rope.scaling.type: got {kind!r}; accepted is 'none'")
    heads, width = int(value("attention.head_count")), int(value("embedding_length"))
    if (rotated := value("rope.dimension_count", width // heads)) != width // heads:
        raise ValueError(f"rope.dimension_count: got {rotated}; accepted is the head's {width // heads}")
    base = float(value("rope.freq_base", 10000.0))
    scaling = None
    if _DIVISORS in tensors:
        divisors = torch.from_numpy(tensors[_DIVISORS].data.copy()).float().flatten()
        original_context = int(value("rope.scaling.original_context_length", 8192))  # the default is Llama 3's
        scaling = dataclasses.asdict(llama3_scaling(divisors, width // heads, base, original_context))
    return {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "context": int(value("context_length")),
        "n_layer": int(value("block_count")),
        "n_head": heads,
        "n_kv_head": int(value("attention.head_count_kv", heads)),
        "width": width,
        "mlp_width": int(value("feed_forward_length")),
        "norm": "rms_norm",
        "positions": "rotary",
        "rotary_base": base,
        "rotary_scaling": scaling,
        "activation": "swiglu",
        "bias": False,
        "tied": "output.weight" not in tensors,
        "eps": float(value("attention.layer_norm_rms_epsilon")),
    }
