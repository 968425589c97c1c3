"""BERT: a bidirectional transformer encoder on gptkernels, with a head that guesses masked words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from gptkernels import gelu, linear, linear_cross_entropy
from torch import Tensor, nn

from gptcore.models.model import Model, ModelConfig, check_choices, check_ids, check_sizes, check_transformer
from gptcore.nn import MLP, AttentionArgs, AttentionImpl, Kernels, Linear, Norm, SelfAttention, backend_of

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"context": 64, "n_layer": 2, "n_head": 2, "width": 64},
    "mini": {"context": 128, "n_layer": 4, "n_head": 4, "width": 256},
    "small": {"context": 256, "n_layer": 6, "n_head": 6, "width": 384},
    "bert-base": {"context": 512, "n_layer": 12, "n_head": 12, "width": 768},
    "bert-large": {"context": 512, "n_layer": 24, "n_head": 16, "width": 1024},
}


@dataclass(frozen=True)
class BERTConfig(ModelConfig):
    """Sizes and choices of a `gptcore.models.BERT`. The defaults are those of BERT's base model.

    Raises:
        ValueError: a size, probability or name that is not accepted.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    """Number of token ids."""
    context: int = 512
    """Longest sequence, tokens."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads of each block; divides width."""
    width: int = 768
    """Features of a token."""
    mlp_width: int | None = None
    """Width of the MLP's hidden layer; None: four times width."""
    token_types: int = 2
    """Number of token types (segments): BERT gives the two texts of a pair different types."""
    masked_words: bool = True
    """Whether the model has the head for masked words; encoders for embeddings have none."""
    eps: float = 1e-12
    """Added to the variance in every norm."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings, the attention weights and each block's two outputs, in training."""
    kernels: Kernels = "auto"
    """The kernels that run; auto takes the fastest available."""
    attention_impl: AttentionImpl = "fused"
    """fused: one kernel, memory linear in the tokens; explicit: softmax(QK^T)V step by step, which returns the weights."""

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "context", "n_layer", "n_head", "width", "mlp_width", "token_types")
        check_transformer(self)
        check_choices(self)

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return PRESETS


class Block(nn.Module):
    """Post-norm residual block: the norm comes after each sum, of the attention and of the MLP."""

    def __init__(self, config: BERTConfig, layer: int) -> None:
        super().__init__()
        backend = backend_of(config.kernels)
        self.attn = SelfAttention(
            config.width, config.n_head, causal=False, layer=layer, implementation=config.attention_impl,
            dropout=config.dropout, backend=backend,
        )  # fmt: skip
        self.ln_1 = Norm(config.width, eps=config.eps, backend=backend)
        self.mlp = MLP(config.width, config.hidden, "gelu_exact", backend=backend)
        self.ln_2 = Norm(config.width, eps=config.eps, backend=backend)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, args: AttentionArgs) -> tuple[Tensor, Tensor | None]:
        """``(B, T, C) -> (B, T, C)``, and with explicit attention its weights ``(B, H, T, T)``."""
        attended, weights = self.attn(x, args)
        x, _ = self.ln_1(x, self.dropout(attended))
        x, _ = self.ln_2(x, self.dropout(self.mlp(x)))
        return x, weights


class MaskedWordsHead(nn.Module):
    """Linear, GELU, norm: its output times the token embedding's weights gives the logits."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.backend = backend_of(config.kernels)
        self.transform = Linear(config.width, config.width, backend=self.backend)
        self.ln = Norm(config.width, eps=config.eps, backend=self.backend)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C) -> (..., C)``"""
        hidden = self.transform(x, add_bias=False)
        return self.ln(gelu(hidden, self.transform.bias, "none", backend=self.backend))[0]


class BERT(Model):
    """Token, position and type embeddings, post-norm blocks of bidirectional attention and MLP, and a head for masked words.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", arXiv
    1810.04805. The next-sentence head is left out: RoBERTa (Liu et al., arXiv 1907.11692) found that it does not help.
    """

    config_class = BERTConfig
    forward_methods = ("features", "attention_weights")
    config: BERTConfig

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = backend_of(config.kernels)
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.wtype = nn.Embedding(config.token_types, config.width)
        self.ln_emb = Norm(config.width, eps=config.eps, backend=self.backend)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = MaskedWordsHead(config) if config.masked_words else None
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def init_weights(self) -> None:
        """Draws BERT's initial weights in place: normal with deviation 0.02, norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Norm):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.Linear | Norm | MaskedWordsHead) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Returns the logits of the word at each position; with `targets` the loss instead.

        Args:
            tokens, lengths, token_types: see `features`.
            positions: ``(K,)`` int64 indices into the flattened ``(B * T)`` tokens: compute logits or losses for these only;
                None for all.
            targets: ``(K,)``, or ``(B, T)`` without `positions`: the right ids; -100 is ignored.
            reduction: "mean" or "sum" of the loss, over the targets that are not ignored.

        Returns:
            ``(K, vocab_size)`` or ``(B, T, vocab_size)``; with `targets` a scalar, in nats.

        Raises:
            TypeError, ValueError: as `features`; a model without the head for masked words.
        """
        if self.head is None:
            raise ValueError("masked_words: got False; accepted is a model with the head that guesses masked words")
        x, _ = self._encode(tokens, lengths, token_types)
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (K, C)
        x = self.head(x)
        if targets is None:
            return linear(x, self.wte.weight, self.head.bias, backend=self.backend)
        return linear_cross_entropy(
            x, self.wte.weight, targets, self.head.bias, ignore_index=-100, reduction=reduction, backend=self.backend
        )

    def features(self, tokens: Tensor, *, lengths: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """Returns the last block's output for each token, ``(B, T, C)``.

        Args:
            tokens: ``(B, T)`` integer ids below vocab_size.
            lengths: ``(B,)`` the number of tokens of each row before its padding, which is on the right; None: all.
            token_types: ``(B, T)`` int64; None for 0.

        Raises:
            TypeError: tokens that are not integers.
            ValueError: a rank other than 2, more tokens than the context, an id outside the vocabulary (checked on the CPU).
        """
        return self._encode(tokens, lengths, token_types)[0]

    def attention_weights(self, tokens: Tensor, *, lengths: Tensor | None = None) -> list[Tensor]:
        """Returns each layer's attention weights, ``(B, H, T, T)``; needs ``attention_impl="explicit"``.

        Raises:
            ValueError: fused attention, which never holds the weights.
        """
        if self.config.attention_impl != "explicit":
            raise ValueError(f'attention_impl: got {self.config.attention_impl!r}; accepted is "explicit"')
        return self._encode(tokens, lengths, None)[1]

    def embed(self, tokens: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Returns a vector of length 1 for each row, ``(B, C)`` float32: the direction of the mean of its tokens' features.

        Source: Reimers and Gurevych, "Sentence-BERT", arXiv 1908.10084. Arguments and errors as `features`.
        """
        x = self.features(tokens, lengths=lengths).float()
        if lengths is not None:
            is_token = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (B, T), False on padding
            x = x * is_token[..., None]
        return nn.functional.normalize(x.sum(1), dim=-1)

    def summary(self) -> str:
        c = self.config
        return (
            f"{c.n_layer} layers, width {c.width}, {c.n_head} heads of {c.width // c.n_head}, MLP {c.hidden} (gelu), layer_norm "
            f"after each sum, context {c.context:,}, vocabulary {c.vocab_size:,}"
            f"{'' if c.masked_words else ', no head for masked words'}"
        )

    def flops(self, batch_shape: tuple[int, int]) -> int:
        """Returns the floating-point operations of a training step on ``(B, T)`` tokens, as if each were masked.

        For each token: six for each parameter in a matrix product, and attention's ``12 * n_layer * width * T``.
        """
        batch, tokens = batch_shape
        looked_up = self.wpe.weight.numel() + self.wtype.weight.numel()
        looked_up += 0 if self.head is not None else self.wte.weight.numel()
        products = self.num_parameters() - looked_up
        return batch * tokens * (6 * products + 12 * self.config.n_layer * self.config.width * tokens)

    def _encode(
        self, tokens: Tensor, lengths: Tensor | None, token_types: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        check_ids("tokens", tokens, self.config.vocab_size)
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens: got {length}; accepted is up to the context, {self.config.context}")
        x = self.wte(tokens) + self.wpe.weight[:length]  # (B, T, C)
        x = x + (self.wtype.weight[0] if token_types is None else self.wtype(token_types))
        x = self.dropout(self.ln_emb(x)[0])
        args = AttentionArgs(key_lengths=lengths)
        collected = []
        for block in self.h:
            x, weights = block(x, args)
            collected.append(weights)
        return x, collected
