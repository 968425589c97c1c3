"""Weights on disk: safetensors and json, our own and Hugging Face GPT-2's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gptcore._files import atomic_writer
from gptcore.config import GPTConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Hugging Face's Conv1D holds these as (in, out); nn.Linear holds (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_SIZES = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "width": "n_embd",
}
# What a GPT-2 configuration may say otherwise, and this model does not compute.
_FIXED = {
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
    "add_cross_attention": (False, (False,)),
}


class WeightsError(ValueError):
    """Weights or a configuration that are missing, damaged, or of another model; names the file and what is wrong."""


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A GPT-2 state dict of Hugging Face (with or without ``transformer.``) under this model's names and layouts."""
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # causal masks, and the tied output weights
        ours[name] = tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
    head = state.get("lm_head.weight")
    if head is not None and "wte.weight" in ours and not torch.equal(head, ours["wte.weight"]):
        raise WeightsError("lm_head.weight: differs from wte.weight; accepted are tied weights")
    return ours


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This model's state dict under the names and layouts of Hugging Face's ``GPT2LMHeadModel`` (tied head left out)."""
    return {f"transformer.{n}": t.t().contiguous() if n.endswith(_TRANSPOSED) else t for n, t in state.items()}


def config_from_huggingface(values: dict[str, Any]) -> GPTConfig:
    """The `GPTConfig` of a Hugging Face GPT-2 ``config.json``; dropout is 0, as for inference."""
    for name, (default, accepted) in _FIXED.items():
        if (value := values.get(name, default)) not in accepted:
            raise WeightsError(f"{name}: got {value!r}; accepted is {accepted[0]!r}")
    if values.get("n_inner") not in (None, 4 * values["n_embd"]):
        raise WeightsError(f"n_inner: got {values['n_inner']}; accepted is 4 * n_embd, {4 * values['n_embd']}")
    sizes = {ours: values[theirs] for ours, theirs in _SIZES.items()}
    return GPTConfig(**sizes, eps=values.get("layer_norm_epsilon", 1e-5))


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """The ``config.json`` with which Hugging Face's ``GPT2LMHeadModel`` computes what a GPT of `config` does."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "layer_norm_epsilon": config.eps,
        **{name: default for name, (default, _) in _FIXED.items()},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def save_huggingface(folder: str | Path, config: GPTConfig, state: dict[str, Tensor]) -> None:
    """Writes a folder that Hugging Face's ``GPT2LMHeadModel.from_pretrained`` loads."""
    _write(folder, config_to_huggingface(config), to_huggingface(state))


def save_folder(folder: str | Path, config: GPTConfig, state: dict[str, Tensor]) -> None:
    """Writes a folder that `load` loads: each file appears whole or not at all."""
    _write(folder, dataclasses.asdict(config), state)


def _write(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_writer(folder / WEIGHTS) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with atomic_writer(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2).encode())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a missing or damaged one is a `WeightsError` that names it."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is damaged or no safetensors file ({error})") from error


def load(path_or_name: str | Path, changes: dict[str, Any]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Configuration (with `changes`) and checked state dict of a local folder or a model of the Hugging Face hub."""
    folder = Path(path_or_name)
    if not folder.is_dir():
        folder = _download(str(path_or_name))
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
        foreign = "model_type" in values
        if foreign and values["model_type"] != "gpt2":
            raise WeightsError(f"model_type: got {values['model_type']!r}; accepted is 'gpt2'")
        config = config_from_huggingface(values) if foreign else GPTConfig.from_dict(values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: describes no model this version can load ({error})") from error
    state = read_tensors(folder / WEIGHTS)
    state = from_huggingface(state) if foreign else state
    check_state(state, config, folder / WEIGHTS)
    return dataclasses.replace(config, **changes), state


def check_state(state: dict[str, Tensor], config: GPTConfig, source: Path) -> None:
    """Raises `WeightsError` unless `state` holds exactly the tensors of a GPT of `config`."""
    from gptcore.models import GPT

    with torch.device("meta"):
        expected = GPT(config).state_dict()
    if missing := sorted(set(expected) - set(state)):
        raise WeightsError(f"{source}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are)")
    if extra := sorted(set(state) - set(expected)):
        raise WeightsError(f"{source}: {extra[0]} belongs to no GPT ({len(extra)} such tensors)")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            accepted = tuple(expected[name].shape)
            raise WeightsError(f"{source}: {name} has shape {tuple(tensor.shape)}; accepted is {accepted}")


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WeightsError(f"{name}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise WeightsError(f"{name}: is no local folder, and huggingface_hub is not installed to fetch it") from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub raises a dozen kinds, of three libraries
        raise WeightsError(f"{name}: is no local folder and could not be fetched from the hub ({error})") from error
