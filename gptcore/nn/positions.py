"""Rotary position embedding: the angles by which queries and keys are rotated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3.1's scaling of rotary frequencies, for contexts longer than the one the model was first trained on."""

    factor: float
    """The low frequencies are divided by this."""
    low_freq_factor: float
    """Frequencies with fewer turns than this in `original_context` tokens are low."""
    high_freq_factor: float
    """Frequencies with more turns than this stay; between the two bounds the division fades out linearly."""
    original_context: int
    """Context of the first training, tokens."""


def rotary_tables(
    positions: Tensor, head_dim: int, base: float = 10000.0, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """``cos, sin`` of ``position * base^(-2i / D)``, each ``(*positions.shape, D / 2)`` float32, with D the `head_dim`.

    Source: Su et al., "RoFormer", arXiv 2104.09864; the scaling: Grattafiori et al., "The Llama 3 Herd of Models",
    arXiv 2407.21783, as its released configuration defines it.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-pairs / head_dim)  # (D / 2,), radians a token
    if scaling is not None:
        turns = scaling.original_context * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)  # 1: unchanged, 0: divided
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()
