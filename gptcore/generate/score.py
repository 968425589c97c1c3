"""Log-likelihoods of texts that may follow a context. What several contexts have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
from gptkernels import linear
from torch import Tensor

from gptcore.generate.decode import pad_left
from gptcore.nn.cache import KeyValueCache
from gptcore.nn.mode import evaluation_mode

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.text.pretrained import PretrainedTokenizer
    from gptcore.text.tokenizer import Tokenizer

_PREFIX_KEY = 16
"""Contexts whose first tokens, as many as this, are the same are scored together."""
_LOGIT_ROWS = 256
"""Positions whose logits are held at a time."""
_ROWS = 32
"""Rows that keep a machine busy even if each has one token."""
_CACHE_BYTES = 512 << 20
"""The most that the key/value cache of a batch should take."""


class Request(NamedTuple):
    """A context and the candidates that may follow it, as token ids. Neither the context nor a candidate is empty."""

    context: Sequence[int]
    candidates: Sequence[Sequence[int]]

    @property
    def longest(self) -> int:
        """The most tokens that the model reads: it need not read the last token of a candidate."""
        return len(self.context) + max(map(len, self.candidates)) - 1


class Score(NamedTuple):
    """How likely a candidate is."""

    log_likelihood: float
    """The natural logarithm of the candidate's probability, given its context."""
    tokens: int
    """Tokens of the candidate."""
    greedy: bool
    """Whether each of its tokens is the likeliest one, so that greedy decoding gives this candidate."""


def encode_pair(
    tokenizer: Tokenizer | PretrainedTokenizer, context: str, candidate: str
) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of a candidate that follows it, split where the context ends.

    Both are encoded as one text, as the model reads it. Spaces at the end of the context go to the candidate, because
    tokens begin with a space and do not end with one. EleutherAI's lm-evaluation-harness splits in the same way.

    Raises:
        ValueError: an empty candidate, a context without tokens, or a candidate of which no token is left because it
            merges with the context.
    """
    text = context.rstrip()
    before = tokenizer.encode_prompt(text)
    both = tokenizer.encode_prompt(context + candidate)
    if not candidate or len(both) <= len(before):
        raise ValueError(f"candidate: got {candidate!r} after {context[-20:]!r}; accepted is one that adds tokens")
    if not before:
        raise ValueError(f"context: got {context!r}; accepted is a text with one token or more")
    return both[: len(before)], both[len(before) :]


@torch.no_grad()
def log_likelihoods(
    model: GPT,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 1024,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[Score]]:
    """Returns the score of each candidate of each request.

    Results are those of a forward pass over each context and candidate, to rounding. But tokens that contexts have in common
    at their beginning, such as the examples of a few-shot prompt, are computed once, and so is each context for all its
    candidates. The logarithm of the softmax is computed in float32 with float32 logits, at the candidates' tokens only.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        requests: contexts and candidates.
        batch_tokens: about how many tokens run together.
        advance: called after each batch with its number of requests, for a progress bar.

    Raises:
        ValueError: an empty context or candidate, no candidates, or more tokens than the model's context.
    """
    for i, request in enumerate(requests):
        if not request.context or not request.candidates or not all(request.candidates):
            raise ValueError(
                f"requests: got {request} at {i}; accepted are contexts and candidates of one token or more"
            )
        if request.longest > model.config.context:
            raise ValueError(
                f"requests: got one of {request.longest} tokens; accepted are up to the context, {model.config.context}"
            )
    results: list[list[Score]] = [[] for _ in requests]
    scorer = _Scorer(model, batch_tokens)
    with evaluation_mode(model):
        for group in _groups(requests):
            contexts = [list(requests[i].context) for i in group]
            prefix = _common(contexts)[: min(map(len, contexts)) - 1]  # each context keeps a token of its own
            cache = scorer.read(prefix)
            for batch in _batches(requests, group, len(prefix), scorer.limits):
                scored = scorer.batch([requests[i] for i in batch], cache)
                for i, scores in zip(batch, scored):
                    results[i] = scores
                advance(len(batch))
    return results


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Requests by the beginning of their contexts, each group from the longest to the shortest. Those alone are one group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(tuple(request.context[:_PREFIX_KEY]), []).append(i)
    several = [group for group in groups.values() if len(group) > 1]
    alone = [group[0] for group in groups.values() if len(group) == 1]
    return [sorted(group, key=lambda i: -requests[i].longest) for group in [*several, alone] if group]


def _batches(requests: Sequence[Request], group: list[int], prefix: int, limits: _Limits) -> Iterator[list[int]]:
    """Splits a group into batches of requests of similar length."""
    batch: list[int] = []
    before = after = 0  # the most tokens of a context, and of what is read after it: contexts are padded on the left
    for i in group:
        context = len(requests[i].context)
        before, after = max(before, context), max(after, requests[i].longest - context)
        rows, length = len(batch) + 1, before + after
        fits = length <= limits.context and rows * (length - prefix) <= limits.tokens
        if batch and not (fits and rows * length * limits.token_bytes <= _CACHE_BYTES):
            yield batch
            batch, before, after = [], context, requests[i].longest - context
        batch.append(i)
    if batch:
        yield batch


class _Limits(NamedTuple):
    """What bounds the size of a batch."""

    context: int
    """The most tokens of a row, its padding included."""
    tokens: int
    """About the most tokens of all rows, without those they have in common."""
    token_bytes: int
    """Bytes of a token in the key/value cache."""


class _Scorer:
    """Scores batches with a model whose output layer is held in float32."""

    def __init__(self, model: GPT, batch_tokens: int) -> None:
        self.model = model
        self.device = model.output_weight.device
        self.output_weight = model.output_weight.float()  # (vocab, C)
        config = model.config
        itemsize = model.output_weight.element_size()
        token_bytes = 2 * config.n_layer * config.kv_heads * config.head_dim * itemsize
        self.limits = _Limits(config.context, batch_tokens, token_bytes)

    def read(self, tokens: list[int]) -> KeyValueCache:
        """Returns a cache of one row that holds these tokens."""
        cache = self.model.new_cache(max(len(tokens), 1))
        if tokens:
            self.model.features(torch.tensor([tokens], device=self.device), cache)
        return cache

    def batch(self, requests: list[Request], prefix: KeyValueCache) -> list[list[Score]]:
        """Scores requests whose contexts begin with the tokens in `prefix`."""
        tokens, padding = pad_left([request.context[prefix.length :] for request in requests])
        # The model reads all tokens of a candidate but the last. A candidate of one token needs no reading.
        long = [[c for c, candidate in enumerate(request.candidates) if len(candidate) > 1] for request in requests]
        most = max(map(len, long))
        longest = max((len(candidate) - 1 for request in requests for candidate in request.candidates), default=0)
        capacity = prefix.length + tokens.shape[1] + longest
        cache = prefix.expand([0] * len(requests), capacity, padding.to(self.device) if padding.any() else None)
        x = self.model.features(tokens.to(self.device), cache)[:, -1]  # (B, C)
        firsts = [(row, candidate[0]) for row, request in enumerate(requests) for candidate in request.candidates]
        found = iter(self._log_probabilities(x, firsts))
        # For each candidate, the log-probability of each of its tokens and whether it is the likeliest.
        pieces = [[[next(found)] for _ in request.candidates] for request in requests]

        # A few rows of the cache would leave the machine idle: each context gets several, for several candidates at once.
        row_bytes, row_tokens = capacity * self.limits.token_bytes, max(longest, 1)
        room = min(_ROWS, _CACHE_BYTES // row_bytes, self.limits.tokens // row_tokens) // len(requests)
        copies = max(1, min(most, room))
        if copies > 1:
            cache = cache.expand([row for row in range(len(requests)) for _ in range(copies)], capacity)
        length = cache.length
        for start in range(0, most, copies):
            chosen = [
                (row * copies + copy, row, long[row][start + copy])
                for row in range(len(requests))
                for copy in range(min(copies, len(long[row]) - start))
            ]
            inputs = torch.zeros(len(requests) * copies, max(len(requests[r].candidates[c]) for _, r, c in chosen) - 1)
            inputs = inputs.long()  # padding is on the right, after all that counts
            wanted: list[tuple[int, int]] = []  # indices into the flattened batch, and the tokens that follow there
            for line, row, c in chosen:
                candidate = requests[row].candidates[c]
                inputs[line, : len(candidate) - 1] = torch.tensor(candidate[:-1])
                wanted += [(line * inputs.shape[1] + t, token) for t, token in enumerate(candidate[1:])]
            cache.length = length  # the next candidates overwrite the last ones
            x = self.model.features(inputs.to(self.device), cache).flatten(0, 1)  # (rows * T, C)
            found = iter(self._log_probabilities(x, wanted))
            for _, row, c in chosen:
                pieces[row][c] += [next(found) for _ in requests[row].candidates[c][1:]]
        return [
            [
                Score(sum(value for value, _ in parts), len(parts), all(greedy for _, greedy in parts))
                for parts in candidates
            ]
            for candidates in pieces
        ]

    def _log_probabilities(self, x: Tensor, wanted: list[tuple[int, int]]) -> list[tuple[float, bool]]:
        """For each pair of a row of `x` ``(N, C)`` and a token: its log-probability, and whether it is the likeliest token.

        The pairs are in the order of the rows.
        """
        rows, tokens = torch.tensor(wanted, device=self.device).unbind(1)  # (K,) each
        distinct, place = rows.unique_consecutive(return_inverse=True)  # (R,), (K,)
        results: list[tuple[float, bool]] = []
        for start in range(0, len(distinct), _LOGIT_ROWS):
            part = x[distinct[start : start + _LOGIT_ROWS]].float()  # (rows, C)
            logits = linear(part, self.output_weight, backend=self.model.backend)  # (rows, vocab)
            here = (place >= start) & (place < start + _LOGIT_ROWS)
            row, token = place[here] - start, tokens[here]
            values = logits[row, token] - logits.logsumexp(-1)[row]
            results += zip(values.tolist(), (logits.argmax(-1)[row] == token).tolist())
        return results


def _common(sequences: list[list[int]]) -> list[int]:
    """The longest common beginning of these sequences."""
    low, high = min(sequences), max(sequences)  # what these two have in common, all have
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high))]
