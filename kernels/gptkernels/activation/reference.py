"""GELU (with bias) and SwiGLU in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """``z * Phi(z)`` with ``z = x + bias``, in x's dtype; "tanh" is the usual approximation of Phi."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``."""
    return F.silu(gate) * up
