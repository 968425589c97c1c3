"""Documents in a batch of packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Where the documents of a batch of packed sequences begin and end: attention stays within a document."""

    cu_lengths: Tensor
    """``(documents + 1,)`` int32: the start of each in the flattened batch (B * T), then B * T. No document spans two rows."""
    max_length: int
    """Tokens of the longest document."""
    positions: Tensor
    """``(B, T)`` int64: each token's position in its document."""

    @classmethod
    def of(cls, tokens: Tensor, end_of_text: int) -> Documents:
        """Documents in ``(B, T)`` ids on the CPU: each ends with `end_of_text`, or where its row does."""
        batch, length = tokens.shape
        begins = torch.ones(batch, length, dtype=torch.bool)
        begins[:, 1:] = tokens[:, :-1] == end_of_text
        starts = begins.flatten().nonzero().flatten()  # (documents,)
        bounds = torch.cat([starts, starts.new_tensor([batch * length])])
        lengths = bounds.diff()
        positions = torch.arange(batch * length) - starts.repeat_interleave(lengths)
        return cls(bounds.int(), int(lengths.max()), positions.view(batch, length))

    def to(self, device: torch.device) -> Documents:
        """The same with its tensors on `device`."""
        return Documents(self.cu_lengths.to(device), self.max_length, self.positions.to(device))
