"""The tokens whose embeddings lie in nearly the same direction as a word's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from gptcore.models import Model
    from gptcore.text import PretrainedTokenizer, Tokenizer


@torch.no_grad()
def nearest_tokens(
    model: Model, tokenizer: Tokenizer | PretrainedTokenizer, words: Sequence[str], count: int = 10
) -> list[list[tuple[str, float]]]:
    """Returns for each word the `count` nearest tokens with their cosines, the nearest first, without the word's own.

    A word's embedding is that of its token after a space, or of the word alone if that takes fewer tokens; of several tokens
    it is the mean. Tokens that are no text (special ones, parts of characters) and tokens that differ from a nearer one
    only in spaces or case are left out.

    Args:
        model: a model with token embeddings ``wte``.
        tokenizer: the model's tokenizer.
        words: one word or more, none empty.
        count: tokens for each word; at least 1.

    Raises:
        ValueError: no words, an empty word, or a count under 1.
    """
    if not words or not all(word.strip() for word in words):
        raise ValueError(f"words: got {'an empty one' if words else 'none'}; accepted are one or more, none empty")
    if count < 1:
        raise ValueError(f"count: got {count}; accepted are positive integers")
    embedding = next(weight for name, weight in model.named_parameters() if name.endswith("wte.weight"))
    table = nn.functional.normalize(embedding.float(), dim=-1)  # (vocab, C)
    found = []
    for word in words:
        own = min((tokenizer.encode(text) for text in (f" {word}", word)), key=len)
        cosines = table @ nn.functional.normalize(table[own].mean(0), dim=-1)  # (vocab,)
        seen, nearest = {word.strip().lower()}, []
        for token in cosines.argsort(descending=True).tolist():
            if len(nearest) == count:
                break
            text = "" if token >= tokenizer.vocab_size else tokenizer.decode([token], skip_special=True)
            shown = text.strip()
            if shown and "\ufffd" not in shown and token not in own and shown.lower() not in seen:
                seen.add(shown.lower())
                nearest.append((shown, float(cosines[token])))
        found.append(nearest)
    return found
