"""The beginning of a fine-tuning run: the base, the task's model made from it, and which of its weights are trained."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore import weights
from gptcore.models import Model, from_pretrained
from gptcore.nn import LoRAConfig, add_lora, has_lora, merge_lora
from gptcore.tasks import TASKS, Task
from gptcore.text import get_tokenizer
from gptcore.train.finetune_config import FinetuneConfig

_CONTEXT = 512
"""The default of `FinetuneConfig.context`: enough for most examples, and little memory."""


def begin(config: FinetuneConfig, bf16: bool) -> tuple[FinetuneConfig, Task, Model, str]:
    """Loads the base and the data, and returns what the run trains.

    Args:
        config: the options of the run.
        bf16: whether the run computes in bfloat16; LoRA then stores the frozen weights in it.

    Returns:
        The options with `context` and `steps` filled in; the task; the model, whose frozen parameters do not require
        gradients; and a digest of the base's weights.

    Raises:
        ValueError: base, data and options do not fit; names the argument.
        WeightsError: the base cannot be read.
    """
    place = weights.locate(config.model)
    tokenizer = get_tokenizer(place)
    dtype = torch.bfloat16 if bf16 and config.trained == "lora" else torch.float32
    changes: dict[str, Any] = {"dropout": config.dropout, "kernels": config.kernels}
    base = from_pretrained(place, dtype=dtype, attention_impl=config.attention_impl, **changes)
    if has_lora(base):
        merge_lora(base)
    config.task.check_model(base.config)
    longest = base.config.context
    context = config.context or min(_CONTEXT, longest)
    if context > longest:
        raise ValueError(f"context: got {context}; accepted are up to the base's, {longest}")
    make_task: Any = TASKS[config.task.name][1]
    task: Task = make_task(config.task, config.data, context, config.seed, tokenizer)
    steps = config.steps
    if not steps:
        if task.rows is None:
            raise ValueError(f"steps: got 0; accepted for the task {config.task.name} are 1 and more, it has no epochs")
        steps = max(1, math.ceil(config.epochs * task.rows / (config.batch_size * config.batches())))
    digest = weights_digest(base.state_dict())
    model = task.build(base)
    choose_trained(model, config)
    return dataclasses.replace(config, context=context, steps=steps), task, model, digest


def choose_trained(model: Model, config: FinetuneConfig) -> None:
    """Freezes the weights that ``config.trained`` leaves as they are, or adds LoRA.

    Raises:
        ValueError: "head" for a model without a head of its own.
    """
    model.requires_grad_(True)  # a base that was merged with its adapters is frozen
    head = model.head_parameters()
    if config.trained == "head" and not head:
        raise ValueError(
            f"trained: got 'head' for the task {config.task.name}, whose model has none; accepted are lora, all, last-block"
        )
    if config.trained == "all":
        return
    if config.trained == "lora":
        add_lora(model, LoRAConfig(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_layers))
    else:
        model.requires_grad_(False)
    if config.trained == "last-block":
        for layer in model.last_layers():
            layer.requires_grad_(True)
    for parameter in head:
        parameter.requires_grad_(True)


def weights_digest(state: dict[str, Tensor]) -> str:
    """Returns a hash, 32 hexadecimal digits, of the names, shapes and values of tensors.

    The values are rounded to bfloat16: a run may be resumed with another dtype.
    """
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().bfloat16().contiguous()
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def portable(model: str) -> str:
    """Returns the name of a base for an adapter's configuration: a local path becomes absolute."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model
