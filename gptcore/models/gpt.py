"""GPT: a decoder-only transformer of GPT-2's architecture, on gptkernels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from gptkernels import linear, linear_cross_entropy
from torch import Tensor, nn

from gptcore.config import GPTConfig
from gptcore.generate import generate
from gptcore.layers import Block, KeyValueCache, LayerNorm, backend


class GPT(nn.Module):
    """GPT-2's architecture: learned positions, pre-norm blocks, output weights tied to the token embedding.

    Parameters carry the names of Hugging Face's GPT-2 (without its ``transformer.`` prefix); initialisation is GPT-2's.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws GPT-2's initial weights in place; what a model made on the meta device needs after ``to_empty``."""
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            # Each block adds twice to the residual stream: scaled so that the sum's variance does not grow with depth.
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        *,
        targets: Tensor | None = None,
        return_attention: bool = False,
    ) -> Any:
        """Next-token logits at every position; with `targets` the loss instead.

        Wrappers that know of forward alone (DistributedDataParallel, `torch.func.functional_call`) reach the loss this way.

        Args:
            tokens: ``(B, T)`` integer ids below vocab_size.
            cache: holds the keys and values of earlier tokens, and takes these ones'; positions go on from it.
            targets: see `loss`.
            return_attention: also return the attention weights (needs ``attention_impl="explicit"``).

        Returns:
            Logits ``(B, T, vocab_size)``; with `return_attention` ``(logits, [weights (B, H, T, keys) of each layer])``;
            with `targets` a scalar.

        Raises:
            TypeError: tokens that are not integers.
            ValueError: another rank than 2, more tokens than the context holds, an id outside the vocabulary (checked
                on the CPU; on a GPU that would wait for the device at every step), `return_attention` with fused attention,
                `targets` beside a cache or `return_attention`.
        """
        if targets is not None:
            if cache is not None or return_attention:
                raise ValueError("targets: got them beside a cache or return_attention; accepted are targets alone")
            return self._loss(tokens, targets)
        if return_attention and self.config.attention_impl != "explicit":
            raise ValueError(
                f"return_attention: attention_impl is {self.config.attention_impl!r}, which never holds the weights; "
                'accepted is "explicit"'
            )
        x, weights = self._features(tokens, cache)
        logits = linear(x, self.wte.weight, backend=backend(self.config))
        return (logits, weights) if return_attention else logits

    def next_logits(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits ``(B, vocab_size)`` after the last of `tokens` ``(B, T)`` alone: what generation needs."""
        x, _ = self._features(tokens, cache)
        return linear(x[:, -1], self.wte.weight, backend=backend(self.config))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, computed in float32; the fused kernels never hold all logits.

        Args:
            tokens: ``(B, T)`` integer ids.
            targets: ``(B, T)`` the ids that should follow; -100 counts for nothing.

        Raises:
            TypeError, ValueError: as `forward`, for both arguments.
        """
        # Through __call__, so that forward hooks run: FSDP gathers the weights in one.
        return self(tokens, targets=targets)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continues `tokens` ``(B, T)``: see `gptcore.generate.generate` for the options and what is returned."""
        return generate(self, tokens, max_new_tokens, **options)

    def new_cache(self) -> KeyValueCache:
        """An empty key/value cache for this model."""
        return KeyValueCache(self.config)

    def num_parameters(self, positions: bool = True) -> int:
        """Number of trained values; without `positions`, those of the position embedding are left out."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if positions else total - self.wpe.weight.numel()

    def flops_per_token(self, tokens: int) -> int:
        """Floating-point operations of a training step for each token of sequences of `tokens`.

        Six for each parameter in a matrix product (two forward, four backward), and causal attention's
        ``6 * n_layer * width * tokens`` (half the square counted; nothing recomputed counted).
        """
        products = self.num_parameters(positions=False)
        return 6 * products + 6 * self.config.n_layer * self.config.width * tokens

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, **changes: Any) -> GPT:
        """Loads a folder that `save_pretrained` or Hugging Face wrote, or a GPT-2 of the Hugging Face hub by name.

        Args:
            path_or_name: a folder with ``config.json`` and ``model.safetensors``, or a name such as ``"gpt2"``.
            changes: fields of `GPTConfig` to change, e.g. ``kernels="reference"``.

        Raises:
            WeightsError: a file that is missing, damaged, or does not describe this model; names the file and what is wrong.
        """
        from gptcore import weights

        config, state = weights.load(path_or_name, changes)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into `folder`; each file appears whole or not at all."""
        from gptcore import weights

        weights.save_folder(folder, self.config, self.state_dict())

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: got shape {tuple(targets.shape)}; accepted is {tuple(tokens.shape)}")
        self._check_ids("targets", targets, ignored=-100)
        x, _ = self._features(tokens, None)
        return linear_cross_entropy(x, self.wte.weight, targets, ignore_index=-100, backend=backend(self.config))

    def _features(self, tokens: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, list[Tensor]]:
        """``(B, T) -> (B, T, C)`` after the last norm, and the attention weights of explicit layers."""
        self._check_ids("tokens", tokens)
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context:
            held = f" after {start} in the cache" if start else ""
            raise ValueError(
                f"tokens: got {tokens.shape[1]}{held}; accepted is up to the context, {self.config.context}"
            )
        positions = torch.arange(start, end, device=tokens.device)
        x = self.dropout(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        branch = None
        collected = []
        for block in self.h:
            x, branch, weights = block(x, branch, cache)
            collected.append(weights)
        if cache is not None:
            cache.length = end
        return self.ln_f(x, branch)[0], collected

    def _check_ids(self, name: str, ids: Tensor, ignored: int | None = None) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: got dtype {ids.dtype}; accepted are int64 and int32")
        if ids.dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(ids.shape)}; accepted is (batch, tokens)")
        # Nothing to look at where there are no values: on other devices (it would wait), under the compiler and torch.func.
        valueless = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(ids)  # type: ignore[attr-defined]
        if valueless or type(ids) is not Tensor or ids.device.type != "cpu" or ids.numel() == 0:
            return
        wrong = (ids < 0) | (ids >= self.config.vocab_size)
        if ignored is not None:
            wrong &= ids != ignored
        if wrong.any():
            raise ValueError(
                f"{name}: got id {int(ids[wrong][0])}; accepted are 0 to {self.config.vocab_size - 1} (vocab_size - 1)"
            )
