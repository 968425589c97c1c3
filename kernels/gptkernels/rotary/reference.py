"""Rotary position embedding in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates pairs of x (B, H, T, D) by the angles of cos and sin, (T, R/2) or (B, T, R/2); copies dimensions from R on.

    A pair is ``(i, i + R/2)``, or ``(2i, 2i + 1)`` when interleaved. Computed in float32 or wider and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide).unsqueeze(-3) for t in (cos, sin))  # (1, T, R/2) or (B, 1, T, R/2)
    pairs = cos.shape[-1]
    rotated, rest = x.split((2 * pairs, x.shape[-1] - 2 * pairs), dim=-1)
    rotated = rotated.to(wide)
    if interleaved:
        a, b = rotated.unflatten(-1, (pairs, 2)).unbind(-1)
    else:
        a, b = rotated.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)
