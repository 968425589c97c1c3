"""Switches parts of a model to our attention by the name in their configs, and back."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from gptkernels.integrations.transformers.attention import chooses_by_name
from gptkernels.swap import SwapReport

NAME = "gptkernels"


def switch_attention(model: nn.Module) -> tuple[SwapReport, dict[nn.Module, list[tuple[Any, str]]]]:
    """Switches the parts of a model that support "sdpa" to our attention.

    Layers read the name of their attention from their config. Parts of a model share configs, and so may other models, so
    the model gets copies of its configs.

    Returns:
        The parts that were switched, and those that were left with the reason; and for each `PreTrainedModel` its changed
        configs with their former names, for `restore_names`.
    """
    report = SwapReport("switched")
    holders: dict[int, list[tuple[str, nn.Module, PreTrainedModel]]] = defaultdict(list)
    for name, module, part in _parts(model):
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and config._attn_implementation not in (None, NAME):
            holders[id(config)].append((name, module, part))
    switched = []
    for group in holders.values():
        name = group[0][0]
        reasons = [reason for _, module, part in group if (reason := _obstacle(module, part))]
        if reasons:
            report.left[name] = f"attention: {reasons[0]}"
        else:
            report.changed[name] = "attention -> gptkernels.attention"
            switched.append(group)
    if switched:
        _copy_configs(model)
    before: dict[nn.Module, list[tuple[Any, str]]] = defaultdict(list)
    for group in switched:
        config: Any = group[0][1].config
        for part in {part for _, _, part in group}:
            before[part].append((config, config._attn_implementation))
        config._attn_implementation_internal = NAME  # the property's setter would also set it in nested configs
    return report, before


def _parts(
    module: nn.Module, name: str = "", part: PreTrainedModel | None = None
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """``(name, module, innermost `PreTrainedModel` around it)`` of each module inside a `PreTrainedModel`."""
    part = module if isinstance(module, PreTrainedModel) else part
    if part is not None:
        yield name, module, part
    for key, child in module.named_children():
        yield from _parts(child, f"{name}.{key}" if name else key, part)


def _obstacle(module: nn.Module, part: PreTrainedModel) -> str | None:
    """Why a module must keep its attention; None if it can use ours."""
    if not part._supports_sdpa:
        return f'{type(part).__name__} does not support "sdpa"'
    if not part._can_set_attn_implementation():
        return f"{type(part).__name__} does not look its attention up by name"
    if not isinstance(module, PreTrainedModel) and chooses_by_name(type(module)):
        return f'{type(module).__name__} makes its own mask, only for "eager" and "sdpa"'
    try:
        part._check_and_adjust_attn_implementation(NAME)
    except ValueError as error:
        return str(error)
    return None


def _copy_configs(model: nn.Module) -> None:
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, copies)


def restore_names(configs: list[tuple[Any, str]]) -> None:
    """Undoes `switch_attention` for these configs, except where another attention has been chosen since."""
    for config, name in configs:
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = name
