"""Rotary positions: the angles that queries and keys are turned by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3.1's stretching of rotary positions beyond the context that a model was trained on first."""

    factor: float
    """How many times longer the slow rotations become."""
    low_freq_factor: float
    """Rotations with fewer turns than this in `original_context` are stretched whole."""
    high_freq_factor: float
    """Those with more turns than this stay; between the two the stretching fades."""
    original_context: int
    """Tokens of the first training's sequences."""


def rotary_tables(
    positions: Tensor, head_dim: int, base: float = 10000.0, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """``cos, sin`` of ``position * base^(-2i / D)``, each ``(*positions.shape, D / 2)`` float32, with D the `head_dim`.

    Source: Su et al., "RoFormer", arXiv 2104.09864; the stretching: Grattafiori et al., "The Llama 3 Herd of Models",
    arXiv 2407.21783, as its released configuration defines it.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-pairs / head_dim)  # (D / 2,), radians a token
    if scaling is not None:
        turns = scaling.original_context * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)  # 1: as it is, 0: stretched
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()
