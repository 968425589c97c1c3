"""Decoding: generates token ids one after the other, with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gptkernels
import torch
from torch import Tensor

from gptcore.generate.cuda_graph import DecodingGraph
from gptcore.generate.sampling import Sampling, keep_likely, penalise
from gptcore.nn.mode import evaluation_mode

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT


def pad_left(prompts: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Pads prompts of different lengths on the left to one batch.

    Returns:
        The ids ``(B, longest)``, and the number of padding tokens of each row ``(B,)``.

    Raises:
        ValueError: no prompts, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"prompts: got {'an empty one' if prompts else 'none'}; accepted are one or more, none empty")
    longest = max(map(len, prompts))
    rows = [[fill] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor([longest - len(prompt) for prompt in prompts])


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pads rows of token ids on the right with 0; returns them as ``(B, longest)`` int64, and their lengths ``(B,)`` int64."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


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
    """Yields the next ids ``(B,)`` of each step. Arguments and errors are those of `generate`.

    The arguments are checked by the call itself, before the first step.
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
            raise ValueError("padding: got it with use_cache=False; accepted is padding with use_cache=True")
        padding = padding.to(tokens.device) if padding.any() else None
    stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    stops = [i for i in stops if 0 <= i < vocab_size]  # the model never gives an id that it has no logit for
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
    seen = _seen_ids(tokens, padding, model.config.vocab_size) if options.repetition_penalty != 1.0 else None
    window = tokens  # the tokens that the model sees, (B, n)
    next_logits = _NextLogits(model, use_cache, tokens.shape[1] + max_new_tokens, padding)
    with evaluation_mode(model):
        for _ in range(max_new_tokens):
            if window.shape[1] > context:
                # The window cannot slide by one token: the cached keys have fixed positions. Start anew with its newer half.
                dropped = window.shape[1] - max(context // 2, 1)
                window = window[:, dropped:]
                padding = None if padding is None else (padding - dropped).clamp(min=0)
                next_logits = _NextLogits(model, use_cache, context, padding)
            logits = next_logits(window).float()  # (B, vocab)
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


def _seen_ids(tokens: Tensor, padding: Tensor | None, vocab_size: int) -> Tensor:
    """``(B, vocab)``, True for the ids in a row's prompt; padding does not count."""
    counts = torch.zeros(tokens.shape[0], vocab_size, device=tokens.device)
    real = torch.ones_like(tokens, dtype=counts.dtype)
    if padding is not None:
        real = (torch.arange(tokens.shape[1], device=tokens.device) >= padding[:, None]).to(counts.dtype)
    return counts.scatter_add_(1, tokens.long(), real) > 0


class _NextLogits:
    """Computes the logits ``(B, vocab)`` after the last token of a growing window ``(B, n)``.

    With a cache each token is computed once, and on a GPU the steps of a single token run as a CUDA graph.
    """

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

    When prompt and continuation outgrow the context, the model sees only the newer half of the context and goes on from
    there. The result has all tokens.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        tokens: ``(B, T)`` integer ids, T from 1 to the model's context.
        max_new_tokens: number of tokens to add at most.
        padding: ``(B,)`` number of padding tokens at the beginning of each row, as `pad_left` makes them; None: no padding.
        stop: ids that end a row. A row that samples one of them is finished, and then repeats the first of these ids.
            Generation ends when all rows are finished.
        use_cache: keep the keys and values of earlier tokens instead of computing them again.
        sampling: the fields of `Sampling`: temperature, top_k, top_p, repetition_penalty, seed.

    Returns:
        The prompt and its continuation, ``(B, T + new)``.

    Raises:
        ValueError: an option outside its range, an empty prompt or one longer than the context, an id outside the
            vocabulary.
    """
    new = list(
        generate_stream(model, tokens, max_new_tokens, padding=padding, stop=stop, use_cache=use_cache, **sampling)
    )
    return torch.cat([tokens, *(ids[:, None].to(tokens.dtype) for ids in new)], dim=1)
