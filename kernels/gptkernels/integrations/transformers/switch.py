"""Which parts of a model look their attention up under our name, and what they looked it up under before."""

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
    """Has the parts of a model that "sdpa" can serve use our attention.

    Layers read the name from their config, which parts of a model share, and models that were built from it too. So the
    model gets copies of its configs, alike but for the name.

    Returns:
        What was switched, and what was left and why; and for each `PreTrainedModel` the configs to be named as before.
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
        config._attn_implementation_internal = NAME  # this config's alone, not its parts'
    return report, before


def _parts(
    module: nn.Module, name: str = "", part: PreTrainedModel | None = None
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Each module in a `PreTrainedModel`, its name, and the innermost one that it is in."""
    part = module if isinstance(module, PreTrainedModel) else part
    if part is not None:
        yield name, module, part
    for key, child in module.named_children():
        yield from _parts(child, f"{name}.{key}" if name else key, part)


def _obstacle(module: nn.Module, part: PreTrainedModel) -> str | None:
    """Why a module must keep the attention it has; None when it can have ours."""
    if not part._supports_sdpa:
        return f'{type(part).__name__} opts out of "sdpa"'
    if not part._can_set_attn_implementation():
        return f"{type(part).__name__} does not look its attention up by name"
    if not isinstance(module, PreTrainedModel) and chooses_by_name(type(module)):
        return f'{type(module).__name__} makes a mask of its own, for "eager" and "sdpa" alone'
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


def name_as_before(configs: list[tuple[Any, str]]) -> None:
    """Undoes `switch_attention` for these, but where somebody has chosen another attention since."""
    for config, name in configs:
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = name
