"""GPT: a decoder-only transformer on gptkernels. Its configuration makes it a GPT-2 or a Llama."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from gptkernels import linear, linear_cross_entropy
from torch import Tensor, nn

from gptcore.generate import generate
from gptcore.models.gpt_config import GPTConfig
from gptcore.models.model import Model, check_ids
from gptcore.nn import MLP, AttentionArgs, Documents, KeyValueCache, Norm, SelfAttention, backend_of, rotary_tables


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP. The MLP's output is added in the kernel of the next block's norm."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": config.bias, "backend": backend_of(config.kernels)}
        self.ln_1 = _norm(config)
        self.attn = SelfAttention(
            config.width, config.n_head, config.n_kv_head, causal=True, layer=layer, implementation=config.attention_impl,
            dropout=config.dropout, **options,
        )  # fmt: skip
        self.ln_2 = _norm(config)
        self.mlp = MLP(config.width, config.hidden, config.activation, **options)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, stream: Tensor, branch: Tensor | None, args: AttentionArgs
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Maps ``(stream, branch)``, each ``(B, T, C)``, whose sum is the residual stream, to the same after this block.

        The third result is the attention weights with explicit attention, otherwise None.
        """
        normed, stream = self.ln_1(stream, branch)
        attended, weights = self.attn(normed, args)  # weights: (B, H, T, keys)
        normed, stream = self.ln_2(stream, self.dropout(attended))
        return stream, self.dropout(self.mlp(normed)), weights


def _norm(config: GPTConfig) -> Norm:
    return Norm(config.width, config.norm, config.eps, backend=backend_of(config.kernels))


class GPT(Model):
    """Token embedding, pre-norm residual blocks of causal attention and an MLP, a last norm, and the output layer.

    The default is GPT-2: learned positions, layer norms, GELU, biases, output weights tied to the embedding. Options of
    `GPTConfig` make it a Llama: rotary positions, RMS norms, SwiGLU, shared key/value heads, no biases.
    Parameters carry the names of Hugging Face's GPT-2 (without its ``transformer.`` prefix); initialisation is GPT-2's.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; Touvron et al., "LLaMA: Open and
    Efficient Foundation Language Models", arXiv 2302.13971.
    """

    config_class = GPTConfig
    forward_methods = ("next_logits", "features")
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = backend_of(config.kernels)
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = _norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def last_layers(self) -> list[nn.Module]:
        return [self.h[-1], self.ln_f]

    @property
    def output_weight(self) -> Tensor:
        """``(vocab_size, C)`` weights of the output layer."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def init_weights(self) -> None:
        """Draws GPT-2's initial weights in place."""
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear | Norm) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            # Each block adds twice to the residual stream: the scale keeps the sum's variance from growing with depth.
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        *,
        targets: Tensor | None = None,
        documents: Documents | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        return_attention: bool = False,
    ) -> Any:
        """Returns the next-token logits at every position; with `targets` the loss instead.

        The loss is here for wrappers that only call forward (DistributedDataParallel, `torch.func.functional_call`).

        Args:
            tokens: ``(B, T)`` integer ids below vocab_size.
            cache: keys and values of earlier tokens, to which those of `tokens` are appended; positions continue from it.
            targets, documents, reduction: see `loss`.
            return_attention: also return the attention weights (needs ``attention_impl="explicit"``).

        Returns:
            Logits ``(B, T, vocab_size)``; with `return_attention` ``(logits, [weights (B, H, T, keys) of each layer])``;
            with `targets` a scalar, or ``(B, T)`` with reduction "none".

        Raises:
            TypeError: tokens that are not integers.
            ValueError: a rank other than 2, more tokens than the context, an id outside the vocabulary (checked on the
                CPU only: on a GPU that would wait for the device at every step), `return_attention` with fused attention,
                `targets` with a cache or `return_attention`, `documents` without targets or with explicit attention.
        """
        if targets is not None:
            if cache is not None or return_attention:
                raise ValueError("targets: got them with a cache or return_attention; accepted are targets alone")
            if documents is not None and self.config.attention_impl == "explicit":
                raise ValueError('documents: got them with explicit attention; accepted is attention_impl="fused"')
            return self._loss(tokens, targets, documents, reduction)
        if documents is not None:
            raise ValueError("documents: got them without targets; accepted are both")
        if return_attention and self.config.attention_impl != "explicit":
            raise ValueError(
                f"return_attention: attention_impl is {self.config.attention_impl!r}, which never holds the weights; "
                'accepted is "explicit"'
            )
        x, weights = self._features(tokens, cache)
        logits = linear(x, self.output_weight, backend=self.backend)
        return (logits, weights) if return_attention else logits

    def next_logits(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Returns only the logits ``(B, vocab_size)`` after the last of `tokens` ``(B, T)``, for generation."""
        x, _ = self._features(tokens, cache)
        return linear(x[:, -1], self.output_weight, backend=self.backend)

    def features(self, tokens: Tensor, cache: KeyValueCache | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """Returns the output of the last norm for each token, ``(B, T, C)``, from which the output layer makes logits.

        Args:
            tokens: ``(B, T)`` integer ids below vocab_size.
            cache: keys and values of earlier tokens, to which those of `tokens` are appended.
            lengths: ``(B,)`` the number of tokens of each row before its padding, which is on the right and is not attended
                to; None: all. The features of padding mean nothing.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        return self._features(tokens, cache, lengths=lengths)[0]

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Documents | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Returns the cross-entropy in nats, computed in float32; the fused kernels never hold all logits.

        Args:
            tokens: ``(B, T)`` integer ids.
            targets: ``(B, T)`` the ids that follow; -100 is ignored.
            documents: treat each document as a sequence of its own: attention stays within it, positions start at 0; None:
                each row is one sequence.
            reduction: "mean" or "sum", over the targets that are not ignored; "none": the loss ``(B, T)`` of each target, 0
                where it is ignored.

        Raises:
            TypeError, ValueError: as `forward`, for both arguments.
        """
        # Through __call__, which runs the forward hooks: FSDP gathers the weights in one.
        return self(tokens, targets=targets, documents=documents, reduction=reduction)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continues `tokens` ``(B, T)``; options and result are those of `gptcore.generate.generate`."""
        return generate(self, tokens, max_new_tokens, **options)

    def new_cache(self, capacity: int | None = None, padding: Tensor | None = None) -> KeyValueCache:
        """Returns an empty key/value cache for this model.

        Args:
            capacity: the most tokens it can hold; None, or more than the context, for the context.
            padding: ``(B,)`` int64, how many of each sequence's first tokens are padding, which no token attends to.
        """
        context = self.config.context
        return KeyValueCache(self.config.n_layer, context if capacity is None else min(capacity, context), padding)

    def summary(self) -> str:
        c = self.config
        shared = f" over {c.kv_heads} of keys and values" if c.kv_heads != c.n_head else ""
        return (
            f"{c.n_layer} layers, width {c.width}, {c.n_head} heads of {c.head_dim}{shared}, MLP {c.hidden} ({c.activation}), "
            f"{c.norm}, {c.positions} positions, context {c.context:,}, vocabulary {c.vocab_size:,}"
            f"{'' if c.tied else ', output layer of its own'}"
        )

    def flops(self, batch_shape: tuple[int, int]) -> int:
        """Returns the floating-point operations of a training step on ``(B, T)`` tokens.

        For each token: six for each parameter (two forward, four backward), embeddings that are only looked up left out, and
        causal attention's ``6 * n_layer * width * T``, half of the full square. Recomputation does not count.
        """
        batch, tokens = batch_shape
        looked_up = 0 if self.wpe is None else self.wpe.weight.numel()
        looked_up += 0 if self.lm_head is None else self.wte.weight.numel()
        products = self.num_parameters() - looked_up
        return batch * tokens * (6 * products + 6 * self.config.n_layer * self.config.width * tokens)

    def _loss(self, tokens: Tensor, targets: Tensor, documents: Documents | None, reduction: str) -> Tensor:
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: got shape {tuple(targets.shape)}; accepted is {tuple(tokens.shape)}")
        check_ids("targets", targets, self.config.vocab_size, ignored=-100)
        x, _ = self._features(tokens, None, documents)
        return linear_cross_entropy(
            x, self.output_weight, targets, ignore_index=-100, reduction=reduction, backend=self.backend
        )

    def _features(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None,
        documents: Documents | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """``(B, T) -> (B, T, C)`` after the last norm, and the attention weights of explicit layers."""
        check_ids("tokens", tokens, self.config.vocab_size)
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context:
            cached = f" after {start} in the cache" if start else ""
            raise ValueError(
                f"tokens: got {tokens.shape[1]}{cached}; accepted is up to the context, {self.config.context}"
            )
        positions, args = self._attention_args(tokens, start, end, cache, documents)
        if lengths is not None:
            args = args._replace(key_lengths=lengths)
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x = self.dropout(x)
        branch = None
        collected = []
        for block in self.h:
            x, branch, weights = block(x, branch, args)
            collected.append(weights)
        if cache is not None and cache.at is None:
            cache.length = end
        return self.ln_f(x, branch)[0], collected

    def _attention_args(
        self, tokens: Tensor, start: int, end: int, cache: KeyValueCache | None, documents: Documents | None
    ) -> tuple[Tensor, AttentionArgs]:
        """Returns the positions of `tokens`, ``(T,)`` or ``(B, T)``, and the arguments of every layer's attention."""
        key_mask = key_lengths = None
        if documents is not None:
            positions = documents.positions
        elif cache is not None and cache.at is not None:
            positions = cache.at
            key_lengths = (cache.at + 1).expand(tokens.shape[0])
            end = cache.capacity
        else:
            positions = torch.arange(start, end, device=tokens.device)
        if cache is not None and cache.padding is not None:
            key_mask = cache.key_mask(end)
            positions = (positions - cache.padding[:, None]).clamp(min=cache.shared)
        tables = None
        if self.config.positions == "rotary":
            tables = rotary_tables(positions, self.config.head_dim, self.config.rotary_base, self.config.rotary_scaling)
        return positions, AttentionArgs(tables, cache, key_mask, key_lengths, documents)
