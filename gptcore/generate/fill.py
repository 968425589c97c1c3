"""Guesses masked words with an encoder such as BERT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gptcore.models import BERT


@torch.no_grad()
def fill(model: BERT, tokenizer: Any, text: str, count: int = 5) -> list[list[tuple[str, float]]]:
    """The likeliest words at each ``[MASK]`` of `text`, the likeliest first, with their probabilities.

    Args:
        model: with the head for masked words; runs in evaluation mode, its mode is restored afterwards.
        tokenizer: the model's, with a token for masked words.
        text: with one ``[MASK]`` or more, written as the tokenizer's makers do.
        count: words for each.

    Raises:
        ValueError: no ``[MASK]`` in the text, a text longer than the context, or a model without the head.
    """
    mask = tokenizer.special_id("mask_token")
    ids = tokenizer.encode_prompt(text, allowed_special="all")
    if mask not in ids:
        written = tokenizer.special_tokens_map["mask_token"]
        raise ValueError(f"text: got {text!r}; accepted is a text with one {written} or more")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    positions = (tokens[0] == mask).nonzero().flatten()  # (K,)
    was_training = model.training
    model.eval()
    try:
        logits = model(tokens, positions=positions)  # (K, vocab)
    finally:
        model.train(was_training)
    shares, words = logits.float().softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
    return [
        [(tokenizer.decode([word]), share) for word, share in zip(*row)] for row in zip(words.tolist(), shares.tolist())
    ]
