"""Evaluation mode for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts `model` into evaluation mode (no dropout), and restores its mode when the block ends."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
