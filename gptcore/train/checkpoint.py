"""A run on disk: weights that load anywhere, and one file from which training goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gptcore._files import atomic_writer
from gptcore.models import GPT
from gptcore.train.config import TrainConfig
from gptcore.weights import WeightsError, check_state

STATE = "training.safetensors"
# Fields that may differ between a run and its continuation: where and how it computes, not what.
_FREE = {"data", "out", "kernels", "precision", "compile", "device", "resume", "overwrite"}
_FREE |= {"steps", "eval_interval", "eval_windows", "sample_prompt", "sample_tokens"}


def _fixed(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}


def save_run(
    config: TrainConfig,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    step: int,
    fingerprint: str,
) -> None:
    """Writes the run's state after `step` steps, then the model alone. Each file appears whole or not at all."""
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors["generator"] = generator.get_state()
    tensors["random"] = torch.get_rng_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"step": step, "fingerprint": fingerprint, "config": _fixed(config)}
    with atomic_writer(config.out / STATE) as file:
        file.write(save(tensors, metadata={"training": json.dumps(about)}))
    model.save_pretrained(config.out)


def load_run(
    config: TrainConfig,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    fingerprint: str,
) -> int:
    """Restores what `save_run` wrote; returns how many steps were done. Nothing is changed if it does not fit.

    Raises:
        WeightsError: no checkpoint, or a damaged one.
        ValueError: a checkpoint of another configuration or tokenizer; names the field.
    """
    path = config.out / STATE
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file; nothing to resume (leave out --resume to start)")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        step, saved = int(about["step"]), about["config"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: is damaged or no checkpoint of gptcore train ({error})") from error
    for name, value in _fixed(config).items():
        if saved.get(name) != value:
            raise ValueError(f"{name}: got {value!r}; accepted when resuming is the run's, {saved.get(name)!r}")
    if about["fingerprint"] != fingerprint:
        raise ValueError(f"data: {config.data} was made with another tokenizer than the run in {config.out}")
    if step >= config.steps:
        raise ValueError(f"steps: got {config.steps}; the run in {config.out} has done {step}, accepted are more")
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    check_state(weights, model.config, path)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            moments.setdefault(parameter, {})[key] = tensor
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        restored = {key: t.to(parameter.device) if t.dim() else t for key, t in moments.get(name, {}).items()}
        if optimizer.defaults.get("fused"):  # the fused optimizer counts its steps on the device
            restored = {key: t.to(parameter.device) for key, t in restored.items()}
        optimizer.state[parameter] = restored
    generator.set_state(tensors["generator"])
    torch.set_rng_state(tensors["random"])
    return step
