"""Documents in a batch of packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
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
        return cls._between(bounds, batch)

    @classmethod
    def from_lengths(cls, rows: Sequence[Sequence[int]], length: int) -> Documents:
        """Documents of these lengths in each of the `rows` of `length` tokens; the rest of a row is one more document.

        Raises:
            ValueError: the documents of a row have more tokens than it.
        """
        lengths: list[int] = []
        for row in rows:
            rest = length - sum(row)
            if rest < 0 or min(row, default=1) < 1:
                raise ValueError(
                    f"rows: got documents of {list(row)} tokens; accepted are positive and at most {length} together"
                )
            lengths += [*row, rest] if rest else row
        return cls._between(torch.tensor([0, *lengths]).cumsum(0), len(rows))

    @classmethod
    def _between(cls, bounds: Tensor, batch: int) -> Documents:
        """Documents between `bounds` ``(documents + 1,)``, of `batch` rows."""
        lengths = bounds.diff()
        positions = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(lengths)
        return cls(bounds.int(), int(lengths.max()), positions.view(batch, -1))

    def to(self, device: torch.device) -> Documents:
        """The same with its tensors on `device`."""
        return Documents(self.cu_lengths.to(device), self.max_length, self.positions.to(device))
