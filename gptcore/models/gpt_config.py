"""GPT's configuration: one frozen dataclass, and the sizes people ask for by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gptcore.models.model import ModelConfig, check_choices, check_sizes, check_transformer
from gptcore.nn import AttentionImpl, Kernels, NormKind, RotaryScaling

Positions = Literal["learned", "rotary"]
GPTActivation = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Sizes and choices of a `gptcore.GPT`. The defaults are GPT-2's smallest model; `PRESETS` has Llama's choices too.

    Raises:
        ValueError: a size, probability or name that is not accepted.
    """

    model_type: ClassVar[str] = "gpt"

    vocab_size: int = 50257
    """Number of token ids."""
    context: int = 1024
    """Longest sequence, tokens."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads of each block; divides width."""
    n_kv_head: int | None = None
    """Heads of keys and values, each shared by n_head / n_kv_head query heads (grouped-query attention); None: n_head."""
    width: int = 768
    """Width of the residual stream."""
    mlp_width: int | None = None
    """Width of the MLP's hidden layer; None: four times width."""
    norm: NormKind = "layer_norm"
    """layer_norm, or rms_norm, which subtracts no mean and has no bias (Llama)."""
    positions: Positions = "learned"
    """learned: a vector for each position; rotary: queries and keys are rotated by angles that grow with it (Llama)."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies: the slowest rotation takes nearly 2 pi times this many tokens."""
    rotary_scaling: RotaryScaling | None = None
    """Llama 3.1's scaling of the rotary frequencies; None: none."""
    activation: GPTActivation = "gelu"
    """gelu (tanh form), or swiglu: SiLU of one hidden layer times another (Llama)."""
    bias: bool = True
    """Whether linear layers add a bias."""
    tied: bool = True
    """Whether the output layer's weights are the token embedding."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings, the attention weights and each block's two outputs, in training."""
    eps: float = 1e-5
    """Added to the variance, or the mean square, in every norm."""
    kernels: Kernels = "auto"
    """The kernels that run; auto takes the fastest available."""
    attention_impl: AttentionImpl = "fused"
    """fused: one kernel, memory linear in the tokens; explicit: softmax(QK^T)V step by step, which returns the weights."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "context", "n_layer", "n_head", "width", "n_kv_head", "mlp_width")
        check_transformer(self)
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head: got {self.n_kv_head}; accepted are divisors of n_head, {self.n_head}")
        if not self.rotary_base > 0.0:
            raise ValueError(f"rotary_base: got {self.rotary_base}; accepted are positive numbers")
        check_choices(self)
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"n_head: got {self.n_head}, heads of {self.head_dim}; accepted for rotary are even heads")
        if self.rotary_scaling is not None and self.positions != "rotary":
            raise ValueError(f"rotary_scaling: got it with positions {self.positions!r}; accepted is 'rotary'")

    @property
    def head_dim(self) -> int:
        return self.width // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return PRESETS

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        if isinstance(scaling := values.get("rotary_scaling"), dict):
            values = values | {"rotary_scaling": RotaryScaling(**scaling)}
        return super().from_dict(values)


_LLAMA = {"norm": "rms_norm", "positions": "rotary", "activation": "swiglu", "bias": False}

PRESETS: dict[str, dict[str, Any]] = {
    # For tests: small enough for Triton's interpreter.
    "tiny": {"context": 64, "n_layer": 2, "n_head": 2, "width": 64},
    # A few million parameters: minutes on two CPU cores.
    "mini": {"context": 128, "n_layer": 4, "n_head": 4, "width": 256},
    "small": {"context": 256, "n_layer": 6, "n_head": 6, "width": 384},
    # GPT-2's four sizes.
    "gpt2-124m": {"context": 1024, "n_layer": 12, "n_head": 12, "width": 768},
    "gpt2-medium": {"context": 1024, "n_layer": 24, "n_head": 16, "width": 1024},
    "gpt2-large": {"context": 1024, "n_layer": 36, "n_head": 20, "width": 1280},
    "gpt2-xl": {"context": 1024, "n_layer": 48, "n_head": 25, "width": 1600},
    # Llama's choices at the first sizes, and SmolLM2's two small ones.
    "llama-tiny": _LLAMA | {"context": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "width": 64, "mlp_width": 192},
    "llama-mini": _LLAMA | {"context": 128, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "width": 256, "mlp_width": 704},
    "llama-small": _LLAMA
    | {"context": 256, "n_layer": 6, "n_head": 6, "n_kv_head": 2, "width": 384, "mlp_width": 1024},
    "smollm2-135m": _LLAMA
    | {"context": 8192, "n_layer": 30, "n_head": 9, "n_kv_head": 3, "width": 576, "mlp_width": 1536}
    | {"rotary_base": 100000.0, "vocab_size": 49152},
    "smollm2-360m": _LLAMA
    | {"context": 8192, "n_layer": 32, "n_head": 15, "n_kv_head": 5, "width": 960, "mlp_width": 2560}
    | {"rotary_base": 100000.0, "vocab_size": 49152},
}
