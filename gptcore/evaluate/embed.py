"""Sentence vectors of an encoder such as BERT, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gptcore.models import BERT


@torch.no_grad()
def embed(model: BERT, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """A vector of length 1 for each text, ``(N, C)`` float32 on the CPU; see `BERT.embed`.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        tokenizer: the model's.
        texts: each up to the model's context.
        batch_size: texts at a time.

    Raises:
        ValueError: no text, or one that is longer than the context.
    """
    if not texts:
        raise ValueError("texts: got none; accepted are one or more")
    rows = [tokenizer.encode_prompt(text) for text in texts]
    for text, row in zip(texts, rows):
        if len(row) > model.config.context:
            raise ValueError(
                f"texts: got one of {len(row)} tokens ({text[:40]!r}...); accepted are up to the context, {model.config.context}"
            )
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # those of like length together: little padding
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            lengths = torch.tensor([len(rows[i]) for i in chosen])
            tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long)
            for row, i in enumerate(chosen):
                tokens[row, : len(rows[i])] = torch.tensor(rows[i])
            found = model.embed(tokens.to(device), lengths=lengths.to(device)).cpu()
            for i, vector in zip(chosen, found):
                vectors[i] = vector
    finally:
        model.train(was_training)
    return torch.stack(vectors)


def similarity_table(texts: Sequence[str], vectors: Tensor) -> str:
    """The cosines between all pairs of vectors ``(N, C)`` of length 1, for people to read."""
    cosines = vectors @ vectors.T
    lines = [" " * 4 + "".join(f"{i + 1:>7}" for i in range(len(texts)))]
    lines += [
        f"{i + 1:>3} " + "".join(f"{value:>7.2f}" for value in row) + f"  {text}"
        for i, (text, row) in enumerate(zip(texts, cosines.tolist()))
    ]
    return "\n".join(lines)
