"""Sampling from a model, one token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import gptkernels
import torch
from torch import Tensor

from gptcore.layers import backend

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT


def keep_likely(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Sets all but the likeliest logits to -inf: first all but the `top_k` largest, then all but the nucleus.

    The nucleus is the smallest set of the likeliest tokens whose probabilities sum to `top_p` or more; it is never empty.

    Args:
        logits: ``(B, vocab)``, temperature already applied.
        top_k: how many to keep; None for all.
        top_p: probability to keep, 0 < top_p <= 1; None for all.

    Returns:
        ``(B, vocab)``.

    Source (nucleus): Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751.
    """
    nothing = torch.full_like(logits, -torch.inf)
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
        logits = nothing.scatter(-1, ids, values)
    if top_p is not None and top_p < 1.0:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what the likelier ones already hold
        outside = before >= top_p
        outside[..., 0] = False
        logits = nothing.scatter(-1, ids, values.masked_fill(outside, -torch.inf))
    return logits


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; accepted are 0 and more")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}; accepted are 0 (the likeliest token) and positive numbers")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}; accepted are positive integers, or None for all")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: got {top_p}; accepted is 0 < top_p <= 1, or None for all")


def generate_stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields the next ids ``(B,)``, one position after the other; the arguments are those of `generate`.

    Arguments are checked here, before the first token is asked for.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}; accepted is (batch, tokens), one token or more")
    if tokens.numel() and int(tokens.max()) >= model.config.vocab_size:
        raise ValueError(
            f"tokens: got id {int(tokens.max())}; accepted are 0 to {model.config.vocab_size - 1} (vocab_size - 1)"
        )
    return _stream(model, tokens, max_new_tokens, temperature, top_k, top_p, seed, stop, use_cache)


@torch.no_grad()
def _stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: int | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    context = model.config.context
    generator = torch.Generator(tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    window = tokens[:, -context:]  # what the model sees, (B, n)
    cache = model.new_cache() if use_cache else None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if window.shape[1] > context:
                # Positions are learned, so a full window cannot slide: its newer half starts a new one.
                window = window[:, -max(context // 2, 1) :]
                cache = model.new_cache() if use_cache else None
            new = window if cache is None else window[:, cache.length :]
            logits = model.next_logits(new, cache).float()  # (B, vocab)
            if temperature == 0.0:
                ids = logits.argmax(-1)
            else:
                likely = keep_likely(logits / temperature, top_k, top_p)
                probabilities = gptkernels.softmax(likely, backend=backend(model.config))
                ids = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            if stop is not None:
                ids = ids.masked_fill(finished, stop)
                finished |= ids == stop
            yield ids
            if stop is not None and finished.all():
                return
            window = torch.cat([window, ids[:, None].to(window.dtype)], dim=1)
    finally:
        model.train(was_training)


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continues `tokens`, sampling one token after the other.

    A prompt longer than the model's context is seen from its last `context` tokens on. When prompt and continuation
    outgrow the context, the newer half of what the model sees is kept and the rest forgotten; what is returned is whole.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        tokens: ``(B, T)`` integer ids, T at least 1.
        max_new_tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the likeliest `top_k` only.
        top_p: sample among the likeliest that together hold this probability only (applied after `top_k`).
        seed: makes the samples repeatable; None draws another seed each time.
        stop: a row that samples this id is finished and repeats it; ends when every row is finished.
        use_cache: keep keys and values of earlier tokens instead of computing them again.

    Returns:
        ``(B, T + new)`` the prompt and its continuation.

    Raises:
        ValueError: an option outside its range, an empty prompt, an id outside the vocabulary.
    """
    new = list(
        generate_stream(
            model,
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            use_cache=use_cache,
        )
    )
    return torch.cat([tokens, *(ids[:, None].to(tokens.dtype) for ids in new)], dim=1)
