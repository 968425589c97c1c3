"""GPT: a decoder-only transformer on gptkernels, GPT-2's or Llama's by its configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from gptkernels import linear, linear_cross_entropy
from torch import Tensor, nn

from gptcore.config import GPTConfig
from gptcore.generate import generate
from gptcore.layers import Block, Documents, KeyValueCache, Norm, Surroundings, backend, rotary_tables


class GPT(nn.Module):
    """Token embedding, pre-norm residual blocks of causal attention and an MLP, a last norm, and the output layer.

    By default GPT-2: learned positions, layer norms, GELU, biases, output weights tied to the embedding. `GPTConfig` has
    the choices that make it a Llama: rotary positions, RMS norms, SwiGLU, shared key/value heads, no biases.
    Parameters carry the names of Hugging Face's GPT-2 (without its ``transformer.`` prefix); initialisation is GPT-2's.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; Touvron et al., "LLaMA: Open and
    Efficient Foundation Language Models", arXiv 2302.13971.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @property
    def output_weight(self) -> Tensor:
        """``(vocab_size, C)`` weights of the output layer."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def init_weights(self) -> None:
        """Draws GPT-2's initial weights in place; what a model made on the meta device needs after ``to_empty``."""
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear | Norm) and module.bias is not None:
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
        documents: Documents | None = None,
        return_attention: bool = False,
    ) -> Any:
        """Next-token logits at every position; with `targets` the loss instead.

        Wrappers that know of forward alone (DistributedDataParallel, `torch.func.functional_call`) reach the loss this way.

        Args:
            tokens: ``(B, T)`` integer ids below vocab_size.
            cache: holds the keys and values of earlier tokens, and takes these ones'; positions go on from it.
            targets, documents: see `loss`.
            return_attention: also return the attention weights (needs ``attention_impl="explicit"``).

        Returns:
            Logits ``(B, T, vocab_size)``; with `return_attention` ``(logits, [weights (B, H, T, keys) of each layer])``;
            with `targets` a scalar.

        Raises:
            TypeError: tokens that are not integers.
            ValueError: another rank than 2, more tokens than the context holds, an id outside the vocabulary (checked
                on the CPU; on a GPU that would wait for the device at every step), `return_attention` with fused attention,
                `targets` beside a cache or `return_attention`, `documents` without targets or with explicit attention.
        """
        if targets is not None:
            if cache is not None or return_attention:
                raise ValueError("targets: got them beside a cache or return_attention; accepted are targets alone")
            if documents is not None and self.config.attention_impl == "explicit":
                raise ValueError('documents: got them with explicit attention; accepted is attention_impl="fused"')
            return self._loss(tokens, targets, documents)
        if documents is not None:
            raise ValueError("documents: got them without targets; accepted are both")
        if return_attention and self.config.attention_impl != "explicit":
            raise ValueError(
                f"return_attention: attention_impl is {self.config.attention_impl!r}, which never holds the weights; "
                'accepted is "explicit"'
            )
        x, weights = self._features(tokens, cache)
        logits = linear(x, self.output_weight, backend=backend(self.config))
        return (logits, weights) if return_attention else logits

    def next_logits(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits ``(B, vocab_size)`` after the last of `tokens` ``(B, T)`` alone: what generation needs."""
        x, _ = self._features(tokens, cache)
        return linear(x[:, -1], self.output_weight, backend=backend(self.config))

    def loss(self, tokens: Tensor, targets: Tensor, documents: Documents | None = None) -> Tensor:
        """Mean cross-entropy in nats, computed in float32; the fused kernels never hold all logits.

        Args:
            tokens: ``(B, T)`` integer ids.
            targets: ``(B, T)`` the ids that should follow; -100 counts for nothing.
            documents: keeps attention within each document, and counts positions from its beginning, as if each were a
                sequence by itself; None: attention over the whole row.

        Raises:
            TypeError, ValueError: as `forward`, for both arguments.
        """
        # Through __call__, so that forward hooks run: FSDP gathers the weights in one.
        return self(tokens, targets=targets, documents=documents)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continues `tokens` ``(B, T)``: see `gptcore.generate.generate` for the options and what is returned."""
        return generate(self, tokens, max_new_tokens, **options)

    def new_cache(self, capacity: int | None = None, padding: Tensor | None = None) -> KeyValueCache:
        """An empty key/value cache for this model; see `KeyValueCache` for the arguments."""
        return KeyValueCache(self.config, capacity, padding)

    def num_parameters(self, positions: bool = True) -> int:
        """Number of trained values; without `positions`, those of the position embedding are left out."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if positions or self.wpe is None else total - self.wpe.weight.numel()

    def flops_per_token(self, tokens: int) -> int:
        """Floating-point operations of a training step for each token of sequences of `tokens`.

        Six for each parameter in a matrix product (two forward, four backward; norms and biases are counted as if they
        were in one, embeddings that are only looked up are not), and causal attention's ``6 * n_layer * width * tokens``
        (half the square counted; nothing recomputed counted).
        """
        products = self.num_parameters(positions=False) - (0 if self.lm_head is None else self.wte.weight.numel())
        return 6 * products + 6 * self.config.n_layer * self.config.width * tokens

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, *, dtype: torch.dtype | None = None, **changes: Any) -> GPT:
        """Loads weights that `save_pretrained` or Hugging Face wrote (GPT-2, Llama, Mistral), or a Llama's GGUF file.

        Args:
            path_or_name: a folder with ``config.json`` and ``model.safetensors`` (or its shards), a ``.gguf`` file or a
                folder with one, a name that ``gptcore fetch`` brought, or a model of the Hugging Face hub such as ``"gpt2"``.
            dtype: of the parameters; None leaves that of the file (float32 from GGUF).
            changes: fields of `GPTConfig` to change, e.g. ``kernels="reference"``.

        Raises:
            WeightsError: a file that is missing, damaged, or does not describe this model; names the file and what is wrong.
        """
        from gptcore import weights

        config, state = weights.load(path_or_name, changes)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, assign=True)
        return model if dtype is None else model.to(dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into `folder`; each file appears whole or not at all."""
        from gptcore import weights

        weights.save_folder(folder, self.config, self.state_dict())

    def _loss(self, tokens: Tensor, targets: Tensor, documents: Documents | None) -> Tensor:
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: got shape {tuple(targets.shape)}; accepted is {tuple(tokens.shape)}")
        self._check_ids("targets", targets, ignored=-100)
        x, _ = self._features(tokens, None, documents)
        return linear_cross_entropy(x, self.output_weight, targets, ignore_index=-100, backend=backend(self.config))

    def _features(
        self, tokens: Tensor, cache: KeyValueCache | None, documents: Documents | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """``(B, T) -> (B, T, C)`` after the last norm, and the attention weights of explicit layers."""
        self._check_ids("tokens", tokens)
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context:
            held = f" after {start} in the cache" if start else ""
            raise ValueError(
                f"tokens: got {tokens.shape[1]}{held}; accepted is up to the context, {self.config.context}"
            )
        positions, around = self._surroundings(tokens, start, end, cache, documents)
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x = self.dropout(x)
        branch = None
        collected = []
        for block in self.h:
            x, branch, weights = block(x, branch, around)
            collected.append(weights)
        if cache is not None and cache.at is None:
            cache.length = end
        return self.ln_f(x, branch)[0], collected

    def _surroundings(
        self, tokens: Tensor, start: int, end: int, cache: KeyValueCache | None, documents: Documents | None
    ) -> tuple[Tensor, Surroundings]:
        """The positions of `tokens`, ``(T,)`` or ``(B, T)``, and what every layer's attention is to know."""
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
            key_mask = torch.arange(end, device=tokens.device) >= cache.padding[:, None]  # (B, keys)
            positions = (positions - cache.padding[:, None]).clamp(min=0)
        tables = rotary_tables(self.config, positions) if self.config.positions == "rotary" else None
        return positions, Surroundings(tables, cache, key_mask, key_lengths, documents)

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
