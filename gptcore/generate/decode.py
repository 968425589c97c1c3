"""Decoding: one token after the other with a key/value cache; token ids in and out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gptkernels
import torch
from torch import Tensor

from gptcore.generate.cuda_graph import DecodingGraph
from gptcore.generate.sampling import Sampling, keep_likely, penalise

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT


def pad_left(prompts: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch: ids ``(B, longest)`` and ``(B,)`` how many of each row's are padding.

    Raises:
        ValueError: no prompts, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"prompts: got {'an empty one' if prompts else 'none'}; accepted are one or more, none empty")
    longest = max(map(len, prompts))
    rows = [[fill] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor([longest - len(prompt) for prompt in prompts])


def generate_stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    padding: Tensor | None = None,
    stop: int | Collection[int] | None = None,
    use_cache: bool = True,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yields the next ids ``(B,)``, one position after the other; the arguments are those of `generate`.

    Arguments are checked here, before the first token is asked for.
    """
    options = Sampling(**sampling)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; accepted are 0 and more")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}; accepted is (batch, tokens), one token or more")
    if tokens.shape[1] > model.config.context:
        raise ValueError(
            f"tokens: got a prompt of {tokens.shape[1]}; accepted is up to the model's context, {model.config.context}"
        )
    vocab_size = model.config.vocab_size
    for i in (int(tokens.min()), int(tokens.max())) if tokens.numel() else ():
        if not 0 <= i < vocab_size:
            raise ValueError(f"tokens: got id {i}; accepted are 0 to {vocab_size - 1} (vocab_size - 1)")
    if padding is not None:
        if padding.shape != tokens.shape[:1] or not ((padding >= 0) & (padding < tokens.shape[1])).all():
            raise ValueError(
                f"padding: got {padding.tolist()}; accepted are {tokens.shape[0]} numbers from 0 to {tokens.shape[1] - 1}"
            )
        if not use_cache:
            raise ValueError("padding: got it without a cache; accepted is use_cache=True")
        padding = padding.to(tokens.device) if padding.any() else None
    stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    stops = [i for i in stops if 0 <= i < vocab_size]  # others, of tokens that were added later, cannot come
    return _stream(model, tokens, max_new_tokens, padding, stops, use_cache, options)


@torch.no_grad()
def _stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    padding: Tensor | None,
    stops: list[int],
    use_cache: bool,
    options: Sampling,
) -> Iterator[Tensor]:
    context = model.config.context
    generator = torch.Generator(tokens.device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    ends = torch.tensor(stops, device=tokens.device)
    seen = _seen(tokens, padding, model.config.vocab_size) if options.repetition_penalty != 1.0 else None
    window = tokens  # what the model sees, (B, n)
    was_training = model.training
    model.eval()
    steps = _Steps(model, use_cache, tokens.shape[1] + max_new_tokens, padding)
    try:
        for _ in range(max_new_tokens):
            if window.shape[1] > context:
                # A full context cannot slide, the positions of what is kept would change: its newer half starts a new one.
                dropped = window.shape[1] - max(context // 2, 1)
                window = window[:, dropped:]
                padding = None if padding is None else (padding - dropped).clamp(min=0)
                steps = _Steps(model, use_cache, context, padding)
            logits = steps(window).float()  # (B, vocab)
            if seen is not None:
                logits = penalise(logits, seen, options.repetition_penalty)
            if options.temperature == 0.0:
                ids = logits.argmax(-1)
            else:
                likely = keep_likely(logits / options.temperature, options.top_k, options.top_p)
                probabilities = gptkernels.softmax(likely, backend=model.backend)
                ids = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            if stops:
                ids = ids.masked_fill(finished, stops[0])
                finished |= torch.isin(ids, ends)
            yield ids
            if stops and finished.all():
                return
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            window = torch.cat([window, ids[:, None].to(window.dtype)], dim=1)
    finally:
        model.train(was_training)


def _seen(tokens: Tensor, padding: Tensor | None, vocab_size: int) -> Tensor:
    """``(B, vocab)`` True where an id comes in a row's prompt; padding is none."""
    counts = torch.zeros(tokens.shape[0], vocab_size, device=tokens.device)
    real = torch.ones_like(tokens, dtype=counts.dtype)
    if padding is not None:
        real = (torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None]).to(counts.dtype)
    return counts.scatter_add_(1, tokens.long(), real) > 0


class _Steps:
    """Logits ``(B, vocab)`` after the last token of a growing window ``(B, n)``, each token computed once where there is
    a cache; on a GPU single tokens repeat a CUDA graph, so that the host has one launch to make instead of hundreds."""

    def __init__(self, model: GPT, use_cache: bool, capacity: int, padding: Tensor | None) -> None:
        self.model = model
        self.cache = model.new_cache(capacity, padding) if use_cache else None
        self.graph: DecodingGraph | None = None

    def __call__(self, window: Tensor) -> Tensor:
        if self.cache is None:
            return self.model.next_logits(window)
        new = window[:, self.cache.length :]
        if new.shape[1] != 1 or not new.is_cuda:
            return self.model.next_logits(new, self.cache)
        if self.graph is None:
            self.graph = DecodingGraph(self.model, self.cache, new)
        return self.graph(new)


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    padding: Tensor | None = None,
    stop: int | Collection[int] | None = None,
    use_cache: bool = True,
    **sampling: Any,
) -> Tensor:
    """Continues `tokens`, sampling one token after the other.

    When prompt and continuation outgrow the context, the newer half of what the model sees is kept and the rest
    forgotten; what is returned is whole.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        tokens: ``(B, T)`` integer ids, T from 1 to the model's context.
        max_new_tokens: how many to add at most.
        padding: ``(B,)`` how many of each row's first tokens are padding (`pad_left` makes both); None for none.
        stop: ids that end a row: one that samples any of them is finished and repeats the first; ends when every row is.
        use_cache: keep keys and values of earlier tokens instead of computing them again.
        sampling: the fields of `Sampling`: temperature, top_k, top_p, repetition_penalty, seed.

    Returns:
        ``(B, T + new)`` the prompt and its continuation.

    Raises:
        ValueError: an option outside its range, an empty prompt or one longer than the context, an id outside the
            vocabulary.
    """
    new = list(
        generate_stream(model, tokens, max_new_tokens, padding=padding, stop=stop, use_cache=use_cache, **sampling)
    )
    return torch.cat([tokens, *(ids[:, None].to(tokens.dtype) for ids in new)], dim=1)
