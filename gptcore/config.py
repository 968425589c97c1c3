"""The model's configuration: one frozen dataclass, and the sizes people ask for by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kernels = Literal["auto", "reference", "triton", "native"]
AttentionImpl = Literal["fused", "explicit"]

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and choices of a `gptcore.GPT`. The defaults are GPT-2's smallest model.

    Raises:
        ValueError: a size, probability or name that is not accepted.
    """

    vocab_size: int = 50257
    """Number of token ids."""
    context: int = 1024
    """Longest sequence, tokens."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads of each block; divides width."""
    width: int = 768
    """Width of the residual stream; the MLP is four times as wide."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings, the attention weights and each block's two outputs, in training."""
    eps: float = 1e-5
    """Added to the variance in every layer norm."""
    kernels: Kernels = "auto"
    """Which kernels compute layer norms, softmaxes and attention; auto takes the fastest that can run."""
    attention_impl: AttentionImpl = "fused"
    """fused: one kernel, memory linear in the tokens; explicit: softmax(QK^T)V step by step, whose weights can be read."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "n_layer", "n_head", "width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}; accepted are positive integers")
        if self.width % self.n_head:
            raise ValueError(f"n_head: got {self.n_head}; accepted are divisors of width, {self.width}")
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"n_head: got {self.n_head}, heads of {self.head_dim}; accepted are heads of at most {MAX_HEAD_DIM}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}; accepted is 0 <= dropout < 1")
        if not self.eps > 0.0:
            raise ValueError(f"eps: got {self.eps}; accepted are positive numbers")
        for name, accepted in (("kernels", get_args(Kernels)), ("attention_impl", get_args(AttentionImpl))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; accepted are {', '.join(map(repr, accepted))}")

    @property
    def head_dim(self) -> int:
        return self.width // self.n_head

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """A named size, with `changes` to its fields: ``GPTConfig.preset("gpt2-124m", dropout=0.1)``."""
        if name not in PRESETS:
            raise ValueError(f"preset: got {name!r}; accepted are {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """The configuration that `dataclasses.asdict` made `values` from; fields left out take their defaults."""
        accepted = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(accepted)):
            raise ValueError(f"{unknown[0]}: is no field of GPTConfig; accepted are {', '.join(accepted)}")
        return cls(**values)


PRESETS: dict[str, dict[str, Any]] = {
    # Tests: runs in Triton's interpreter.
    "tiny": {"context": 64, "n_layer": 2, "n_head": 2, "width": 64},
    # A few million parameters: minutes on two CPU cores.
    "mini": {"context": 128, "n_layer": 4, "n_head": 4, "width": 256},
    "small": {"context": 256, "n_layer": 6, "n_head": 6, "width": 384},
    # GPT-2's four sizes.
    "gpt2-124m": {"context": 1024, "n_layer": 12, "n_head": 12, "width": 768},
    "gpt2-medium": {"context": 1024, "n_layer": 24, "n_head": 16, "width": 1024},
    "gpt2-large": {"context": 1024, "n_layer": 36, "n_head": 20, "width": 1280},
    "gpt2-xl": {"context": 1024, "n_layer": 48, "n_head": 25, "width": 1600},
}
