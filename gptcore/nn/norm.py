"""The norm of every model, fused with the residual sum before it."""

from __future__ import annotations

from typing import Literal

import torch
from gptkernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from torch import Tensor, nn

NormKind = Literal["layer_norm", "rms_norm"]


class Norm(nn.Module):
    """Adds a branch's output to the residual stream and normalises the sum, in one kernel.

    Args:
        width: features of a row.
        kind: "layer_norm", or "rms_norm", which has no bias and subtracts no mean.
        eps: added to the variance or to the mean square.
        backend: a `gptkernels` backend; None leaves the choice to `gptkernels.use_backend`.
    """

    def __init__(
        self, width: int, kind: NormKind = "layer_norm", eps: float = 1e-5, *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer_norm" else None
        self.eps = eps
        self.backend = backend

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``(norm of the sum, the sum)``, both ``(B, T, C)``: the norm in the branch's dtype, the sum in the stream's."""
        if self.bias is None:
            if branch is None:
                return rms_norm(stream, self.weight, self.eps, backend=self.backend), stream
            return add_rms_norm(branch, stream, self.weight, self.eps, backend=self.backend)
        if branch is None:
            return layer_norm(stream, self.weight, self.bias, self.eps, backend=self.backend), stream
        return add_layer_norm(branch, stream, self.weight, self.bias, self.eps, backend=self.backend)
