"""Guesses masked words with an encoder such as BERT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gptcore.nn.mode import evaluation_mode

if TYPE_CHECKING:
    from gptcore.models import BERT
    from gptcore.text import PretrainedTokenizer, Tokenizer


@torch.no_grad()
def fill(
    model: BERT, tokenizer: Tokenizer | PretrainedTokenizer, text: str, count: int = 5
) -> list[list[tuple[str, float]]]:
    """Returns for each ``[MASK]`` in `text` the likeliest words and their probabilities, the likeliest first.

    Args:
        model: a model with the head for masked words. It runs in evaluation mode; its mode is restored afterwards.
        tokenizer: the model's tokenizer, with a mask token.
        text: a text with one mask token or more, such as ``[MASK]``.
        count: number of words for each mask token.

    Raises:
        ValueError: a tokenizer without a mask token, a text without one, a text longer than the context, or a model
            without the head.
    """
    mask = tokenizer.special_id("mask_token")
    ids = tokenizer.encode_prompt(text, allowed_special="all")
    if mask not in ids:
        spelling = tokenizer.special_tokens_map["mask_token"]
        raise ValueError(f"text: got {text!r}; accepted is a text with one {spelling} or more")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    positions = (tokens[0] == mask).nonzero().flatten()  # (K,)
    with evaluation_mode(model):
        logits = model(tokens, positions=positions)  # (K, vocab)
    probabilities, words = logits.float().softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
    return [
        [(tokenizer.decode([word]), probability) for word, probability in zip(*row)]
        for row in zip(words.tolist(), probabilities.tolist())
    ]
