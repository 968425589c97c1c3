"""A decoding step as a CUDA graph: captured once, replayed for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptcore.nn.cache import KeyValueCache

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT


class DecodingGraph:
    """A decoding step, captured once for a cache and repeated."""

    def __init__(self, model: GPT, cache: KeyValueCache, tokens: Tensor) -> None:
        self.cache = cache
        self.tokens = tokens.clone()
        cache.at = torch.tensor([cache.length], device=tokens.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and allocates; what it stores is stored again by the first real step
                model.next_logits(self.tokens, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.next_logits(self.tokens, cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        assert self.cache.at is not None
        self.tokens.copy_(tokens)
        self.cache.at.fill_(self.cache.length)
        self.graph.replay()
        self.cache.length += 1
        return self.logits
