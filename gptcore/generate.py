"""Sampling from a model, one token at a time, with a key/value cache; token ids in and out, or text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gptkernels
import torch
from torch import Tensor

from gptcore.layers import KeyValueCache, backend

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.pretrained_tokenizer import PretrainedTokenizer
    from gptcore.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the model's logits.

    Raises:
        ValueError: an option outside its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability (applied after top_k)."""
    repetition_penalty: float = 1.0
    """Makes tokens that have come already less likely when over 1: positive logits are divided by it, others multiplied."""
    seed: int | None = None
    """Makes the sample repeatable; another one is drawn each time if left out."""

    def __post_init__(self) -> None:
        # Outside these ranges a float32 of ordinary size overflows when it is divided or multiplied.
        if self.temperature != 0.0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature: got {self.temperature}; accepted are 0 (the likeliest token) and numbers from 1e-6 on"
            )
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k: got {self.top_k}; accepted are positive integers, or None for all")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: got {self.top_p}; accepted is 0 < top_p <= 1, or None for all")
        if not 1e-6 <= self.repetition_penalty <= 1e9:
            raise ValueError(
                f"repetition_penalty: got {self.repetition_penalty}; accepted are numbers from 1e-6 to 1e9, 1 for none"
            )
        if self.seed is not None and not (isinstance(self.seed, int) and -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed: got {self.seed}; accepted are integers from -2**63 to 2**64 - 1, or None for any")


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


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens that are True in `seen` ``(B, vocab)`` less likely: logits ``(B, vocab)`` over 0 are divided by
    `penalty`, others multiplied.

    Source: Keskar et al., "CTRL", arXiv 1909.05858, section 4.1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
                probabilities = gptkernels.softmax(likely, backend=backend(model.config))
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
        self.graph: _Graph | None = None

    def __call__(self, window: Tensor) -> Tensor:
        if self.cache is None:
            return self.model.next_logits(window)
        new = window[:, self.cache.length :]
        if new.shape[1] != 1 or not new.is_cuda:
            return self.model.next_logits(new, self.cache)
        if self.graph is None:
            self.graph = _Graph(self.model, self.cache, new)
        return self.graph(new)


class _Graph:
    """A decoding step, captured once for a cache and repeated."""

    def __init__(self, model: GPT, cache: KeyValueCache, tokens: Tensor) -> None:
        self.cache = cache
        self.tokens = tokens.clone()
        cache.at = torch.tensor([cache.length], device=tokens.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and allocates; what it stores is stored again by the first real step
                model.next_logits(self.tokens, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.next_logits(self.tokens, cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        assert self.cache.at is not None
        self.tokens.copy_(tokens)
        self.cache.at.fill_(self.cache.length)
        self.graph.replay()
        self.cache.length += 1
        return self.logits


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


class _Text:
    """The text of one row as its tokens come: whole characters, nothing that may turn out to be a stop string, and
    nothing for special tokens and for ids that the tokenizer does not have (rows that pad a model's vocabulary).

    `before` are the tokens that it goes on from: some decoders leave out the space at the beginning of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer | PretrainedTokenizer, stop: Sequence[str], before: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.finished = False
        # Whole characters, decoded again with what comes.
        self._before = [i for i in before if i < tokenizer.vocab_size]
        self._open: list[int] = []  # tokens since then; the last may end inside a character
        self._taken = len(self._decoded())  # how much of their text has been taken
        self._waited = 0  # for how many tokens nothing was
        self._held = ""  # text that may be the beginning of a stop string

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._before + self._open, skip_special=True)

    def push(self, token: int) -> str:
        """The text that `token` makes certain; sets `finished` at a stop token or string, which are not part of it."""
        if self.finished:
            return ""
        if token in self.tokenizer.stop_tokens:
            return self.end()
        if token >= self.tokenizer.vocab_size:
            return ""
        self._open.append(token)
        decoded = self._decoded()
        certain = len(decoded.rstrip("\ufffd"))  # what follows may be bytes of a character that is not there yet
        self._waited = 0 if certain > self._taken else self._waited + 1
        if self._waited == 4:  # a character has at most four bytes
            certain, self._waited = len(decoded), 0
        text = decoded[self._taken : certain]
        self._taken = max(self._taken, certain)
        if text and certain == len(decoded):
            self._before, self._open = self._open, []
            self._taken = len(self._decoded())
        self._held += text
        places = [place for place in map(self._held.find, self.stop) if place >= 0]
        if places:
            self.finished = True
            return self._held[: min(places)]
        keep = max((_overlap(self._held, text) for text in self.stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        self.finished = True
        return self._held + self._decoded()[self._taken :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    continues: bool = True,
    **sampling: Any,
) -> Iterator[str]:
    """Yields the continuation of `prompt`, token ids, in pieces of whole characters as they become certain.

    Ends at one of the tokenizer's stop tokens or before one of the strings in `stop`, neither of which is yielded, nor are
    other special tokens; ids that the tokenizer does not have are nothing. The other arguments and errors are those of
    `generate`.

    Args:
        continues: what is yielded goes on from the prompt's text, with a space before it where one belongs; False: it is a
            text of its own, as a reply is.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
    stream = generate_stream(model, ids, max_new_tokens, stop=tokenizer.stop_tokens, **sampling)

    def pieces() -> Iterator[str]:
        text = _Text(tokenizer, stop, prompt if continues else ())
        for new in stream:
            if piece := text.push(int(new[0])):
                yield piece
            if text.finished:
                return
        if piece := text.end():
            yield piece

    return pieces()


def generate_text(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> list[str]:
    """The continuation of each of `prompts`, in one batch whatever their lengths; arguments as `stream_text`."""
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    tokens, padding = pad_left(ids)
    device = next(model.parameters()).device
    texts = [_Text(tokenizer, stop, before) for before in ids]
    shown = [""] * len(prompts)
    stream = generate_stream(
        model, tokens.to(device), max_new_tokens, padding=padding, stop=tokenizer.stop_tokens, **sampling
    )
    for new in stream:
        for row, token in enumerate(new.tolist()):
            shown[row] += texts[row].push(token)
        if all(text.finished for text in texts):
            break
    return [done if text.finished else done + text.end() for done, text in zip(shown, texts)]
