"""Low-rank adapters (LoRA): small trained matrices beside the frozen weights of linear layers.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

import torch
from gptkernels import linear
from torch import Tensor, nn

from gptcore.nn.attention import CrossAttention, SelfAttention
from gptcore.nn.linear import Linear
from gptcore.nn.mlp import MLP

LoRALayers = Literal["all", "attention", "mlp"]

_BLOCKS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (SelfAttention, CrossAttention, MLP),
    "attention": (SelfAttention, CrossAttention),
    "mlp": (MLP,),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Sizes and choices of adapters.

    Raises:
        ValueError: a value that is not accepted.
    """

    rank: int = 8
    """Columns of B and rows of A in the product B A, which is added to a weight."""
    alpha: float = 16.0
    """The product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input, in training."""
    layers: LoRALayers = "all"
    """The linear layers that get an adapter: those of the attention, of the MLP, or all of both."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank: got {self.rank!r}; accepted are positive integers")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"alpha: got {self.alpha!r}; accepted are positive numbers")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout!r}; accepted is 0 <= dropout < 1")
        if self.layers not in get_args(LoRALayers):
            raise ValueError(f"layers: got {self.layers!r}; accepted are {', '.join(map(repr, get_args(LoRALayers)))}")


class LoRALinear(Linear):
    """A linear layer with an adapter: ``x W^T + b + alpha / rank * dropout(x) A^T B^T``. W and b are frozen.

    A layer may hold the rows of several published layers, such as query, key and value. Each of these parts then has a pair
    (A, B) of its own; rows outside the parts have no adapter.

    Parameters: `weight` and `bias`, those of the layer it was made from; `lora_A` ``(parts * rank, inputs)``, the parts' A
    below one another; `lora_B` ``(rows of all parts, rank)``, the parts' B below one another. Both are float32, so that small
    steps of training are not lost; the products are computed in x's dtype, or autocast's.

    Args:
        layer: the layer to adapt, whose parameters this one takes over.
        config: rank, alpha and dropout.
        parts: the first row and the row after the last of each part, in order; None: one part, the whole layer.
    """

    def __init__(self, layer: Linear, config: LoRAConfig, parts: Sequence[tuple[int, int]] | None = None) -> None:
        nn.Module.__init__(self)  # not Linear's, which would draw another weight
        self.in_features, self.out_features, self.backend = layer.in_features, layer.out_features, layer.backend
        self.weight, self.bias = layer.weight, layer.bias
        self.config, self.adapted = config, True
        self.parts = tuple(parts or [(0, self.out_features)])
        """The first row and the row after the last of each part."""
        options: dict[str, Any] = {"dtype": torch.float32, "device": layer.weight.device}
        rows = sum(end - start for start, end in self.parts)
        self.lora_A = nn.Parameter(torch.empty(len(self.parts) * config.rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(rows, config.rank, **options))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.reset_adapter()
        self.train(layer.training)

    def reset_adapter(self) -> None:
        """Draws the adapter's initial values in place: A uniform within 1 / sqrt(inputs), B zero, so that B A is zero."""
        if self.lora_A.device.type != "meta":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # depends on the inputs only: the same for each part
            nn.init.zeros_(self.lora_B)

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank

    def forward(self, input: Tensor, add_bias: bool = True) -> Tensor:
        """``(..., inputs) -> (..., outputs)``; without `add_bias` the bias is left out, for a caller that adds it itself."""
        out = super().forward(input, add_bias)
        if not self.adapted:
            return out
        dropped = nn.functional.dropout(input, self.config.dropout, self.training)
        down, up = self.lora_A, self._spread()
        if not torch.is_autocast_enabled(input.device.type):  # autocast casts by itself, and rounds the gradient once
            down, up = down.to(input.dtype), up.to(input.dtype)
        low = linear(dropped, down, backend=self.backend)  # (..., parts * rank)
        return out + linear(low, up, backend=self.backend)

    def product(self) -> Tensor:
        """Returns ``alpha / rank * B A`` of all parts, ``(outputs, inputs)``; rows outside the parts are zero."""
        return self._spread() @ self.lora_A

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight with the adapter added: computed in float32 and rounded once to `dtype`, or to the weight's."""
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            return (self.weight.float() + self.product().float()).to(dtype or self.weight.dtype)

    def part_rows(self) -> list[int]:
        """Returns the number of rows of each part."""
        return [end - start for start, end in self.parts]

    def _spread(self) -> Tensor:
        """``alpha / rank * B`` with each part's B in columns of its own, ``(outputs, parts * rank)``, otherwise zero.

        One product with it then serves all parts.
        """
        scaled = self.lora_B * self.scale
        if self.parts == ((0, self.out_features),):
            return scaled
        blocks, row = [], 0
        for (start, end), block in zip(self.parts, scaled.split(self.part_rows())):
            blocks += [scaled.new_zeros(start - row, 0), block]
            row = end
        return torch.block_diag(*blocks, scaled.new_zeros(self.out_features - row, 0))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.config.rank}, alpha={self.config.alpha}, parts={self.parts}"


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns the adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def has_lora(model: nn.Module) -> bool:
    """Returns whether a layer of the model has an adapter."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Gives linear layers of the model an adapter, in place, and freezes all other parameters.

    The adapters change nothing until they are trained. Where the model has a method ``row_parts(layer)``, it says which rows
    of a layer get a pair (A, B) of their own: those that are a layer of their own in the published model.

    Args:
        model: on any device. Its state dict keeps its names; ``LAYER.lora_A`` and ``LAYER.lora_B`` are added.
        config: sizes, and which layers.

    Raises:
        ValueError: the model has adapters already, or no such layers.
    """
    row_parts: Callable[[str], Sequence[int]] = getattr(model, "row_parts", lambda _: ())
    layers = {}
    for block_name, block in model.named_modules():
        if isinstance(block, _BLOCKS[config.layers]):
            for name, layer in block.named_children():
                if isinstance(layer, Linear):
                    ends = accumulate(row_parts(f"{block_name}.{name}"), initial=0)
                    layers[f"{block_name}.{name}"] = list(pairwise(ends))
    if not layers:
        raise ValueError(
            f"layers: got {config.layers!r}; accepted are layers that the model has, and it has none of these"
        )
    adapt(model, layers, config)


def adapt(model: nn.Module, layers: Mapping[str, Sequence[tuple[int, int]]], config: LoRAConfig) -> None:
    """Gives these layers an adapter, in place, and freezes all other parameters; `add_lora` with the layers chosen.

    Args:
        model: the model.
        layers: the name of each layer, with the first row and the row after the last of its parts; no parts: the whole layer.
        config: sizes; its field `layers` is not used.

    Raises:
        ValueError: the model has adapters already.
    """
    if has_lora(model):
        raise ValueError("model: has adapters already; accepted is a model without, such as after merge_lora")
    model.requires_grad_(False)
    for name, parts in layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear)
        _replace(model, name, LoRALinear(layer, config, parts))


def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Adds the adapters to the weights and removes them, in place: the model has its plain layers again, still frozen.

    Args:
        model: a model with or without adapters.
        dtype: of all parameters afterwards; None keeps each one's. The sums are computed in float32 and rounded once to it.
    """
    for name, adapted in lora_layers(model).items():
        with torch.device("meta"):
            layer = Linear(
                adapted.in_features, adapted.out_features, bias=adapted.bias is not None, backend=adapted.backend
            )
        layer.weight, layer.bias = nn.Parameter(adapted.merged_weight(dtype), requires_grad=False), adapted.bias
        _replace(model, name, layer.train(adapted.training))
    if dtype is not None:
        model.to(dtype)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Switches the adapters off for the length of the block: the model computes what its frozen weights alone compute.

    Parameters that are trained whole, such as a classifier's head, stay as they are.
    """
    layers = [(module, module.adapted) for module in model.modules() if isinstance(module, LoRALinear)]
    try:
        for layer, _ in layers:
            layer.adapted = False
        yield
    finally:
        for layer, adapted in layers:
            layer.adapted = adapted


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
