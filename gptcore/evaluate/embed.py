"""Sentence vectors from an encoder such as BERT, and a table of their similarities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptcore.generate import pad_right
from gptcore.nn.mode import evaluation_mode

if TYPE_CHECKING:
    from gptcore.models import BERT
    from gptcore.text import PretrainedTokenizer, Tokenizer


@torch.no_grad()
def embed(
    model: BERT, tokenizer: Tokenizer | PretrainedTokenizer, texts: Sequence[str], batch_size: int = 32
) -> Tensor:
    """Returns a vector of length 1 for each text, ``(N, C)`` float32 on the CPU; see `BERT.embed`.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        tokenizer: the model's tokenizer.
        texts: one text or more, each no longer than the model's context.
        batch_size: number of texts that run together.

    Raises:
        ValueError: no texts, or one that is longer than the context.
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
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # texts of similar length together: less padding
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            tokens, lengths = pad_right([rows[i] for i in chosen])
            embedded = model.embed(tokens.to(device), lengths=lengths.to(device)).cpu()
            for i, vector in zip(chosen, embedded):
                vectors[i] = vector
    return torch.stack(vectors)


def similarity_table(texts: Sequence[str], vectors: Tensor) -> str:
    """A table of the cosine similarities of all pairs of vectors ``(N, C)`` of length 1, for people to read."""
    cosines = vectors @ vectors.T
    lines = [" " * 4 + "".join(f"{i + 1:>7}" for i in range(len(texts)))]
    lines += [
        f"{i + 1:>3} " + "".join(f"{value:>7.2f}" for value in row) + f"  {text}"
        for i, (text, row) in enumerate(zip(texts, cosines.tolist()))
    ]
    return "\n".join(lines)
