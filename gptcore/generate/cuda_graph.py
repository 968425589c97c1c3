"""Decoding with a CUDA graph: one step is captured once, and replayed for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptcore.nn.cache import KeyValueCache

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT


class DecodingGraph:
    """The decoding step of a model and a cache as a CUDA graph: the host makes one launch instead of hundreds.

    Args:
        model: the model.
        cache: the cache, which holds the prompt already.
        tokens: ``(B, 1)`` ids of the first step.
    """

    def __init__(self, model: GPT, cache: KeyValueCache, tokens: Tensor) -> None:
        self.cache = cache
        self.tokens = tokens.clone()
        cache.at = torch.tensor([cache.length], device=tokens.device)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(
                3
            ):  # compile and allocate before the capture; the first real step overwrites the cache entry
                model.next_logits(self.tokens, cache)
        torch.cuda.current_stream().wait_stream(side_stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.next_logits(self.tokens, cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Runs a step: stores the keys and values of `tokens` ``(B, 1)``, and returns the next logits ``(B, vocab)``."""
        assert self.cache.at is not None
        self.tokens.copy_(tokens)
        self.cache.at.fill_(self.cache.length)
        self.graph.replay()
        self.cache.length += 1
        return self.logits
