"""Sampling options for the next token: temperature, top-k, nucleus (top-p), repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """Sample among the likeliest tokens that together have this probability (applied after top_k)."""
    repetition_penalty: float = 1.0
    """A value above 1 makes tokens of the prompt and the text so far less likely: it divides their positive logits, and
    multiplies the others."""
    seed: int | None = None
    """The same seed gives the same sample; without it each sample is different."""

    def __post_init__(self) -> None:
        # Outside these ranges ordinary float32 logits could overflow when they are divided or multiplied.
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
    """Returns the logits with all but the likeliest set to -inf: first all but `top_k`, then all but the nucleus.

    The nucleus is the smallest set of the likeliest tokens whose probabilities sum to `top_p` or more. It is never empty.

    Args:
        logits: ``(B, vocab)``, temperature already applied.
        top_k: number of tokens to keep; None keeps all.
        top_p: probability to keep, 0 < top_p <= 1; None keeps all.

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
        before = probabilities.cumsum(-1) - probabilities  # total probability of the likelier tokens
        outside = before >= top_p
        outside[..., 0] = False
        logits = nothing.scatter(-1, ids, values.masked_fill(outside, -torch.inf))
    return logits


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Returns the logits ``(B, vocab)`` with the tokens that are True in `seen` ``(B, vocab)`` made less likely.

    Their positive logits are divided by `penalty`, the others multiplied.

    Source: Keskar et al., "CTRL", arXiv 1909.05858, section 4.1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
