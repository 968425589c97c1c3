"""The order in which a task with a fixed set of examples goes through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Epochs:
    """Shuffles the examples anew in each epoch, in which every example comes once.

    The order depends only on `seed` and the batch's number, so that a resumed run needs no state to continue it. A batch may
    end one epoch and begin the next.

    Args:
        count: number of examples.
        seed: of the shuffles.
        lengths: of each example; then a batch holds examples of similar length, which need little padding: `pool` batches
            that follow each other in the shuffle are sorted by length, cut into batches, and these are shuffled.
        pool: number of batches that are sorted together.
    """

    def __init__(self, count: int, seed: int, lengths: Sequence[int] | None = None, pool: int = 32) -> None:
        if count < 1:
            raise ValueError(f"count: got {count}; accepted are positive integers")
        self.count, self.seed, self.pool = count, seed, pool
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self._cached: tuple[tuple[int, int], list[int]] | None = None

    def indices(self, batch_size: int, index: int) -> list[int]:
        """Returns the examples of the batch with number `index`, from 0."""
        start = batch_size * index
        chosen: list[int] = []
        while len(chosen) < batch_size:
            epoch, place = divmod(start + len(chosen), self.count)
            chosen += self._order(epoch, batch_size)[place : place + batch_size - len(chosen)]
        return chosen

    def _order(self, epoch: int, batch_size: int) -> list[int]:
        """Returns the order of all examples in an epoch."""
        if self._cached is None or self._cached[0] != (epoch, batch_size):
            # A generator of its own for each epoch; the multiplication keeps seed 1, epoch 0 apart from seed 0, epoch 1.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(self.count, generator=generator)
            if self.lengths is not None:
                started = -epoch * self.count % batch_size  # examples that a batch of the epoch before still takes
                batches = [order[:started]]
                for part in order[started:].split(self.pool * batch_size):
                    *full, last = part[self.lengths[part].argsort(stable=True)].split(batch_size)
                    full += [last] if len(last) == batch_size else []
                    batches += [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
                    batches += [last] if len(last) < batch_size else []
                order = torch.cat(batches)
            self._cached = (epoch, batch_size), order.tolist()
        return self._cached[1]
