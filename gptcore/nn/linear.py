"""The linear layer of every model."""

from __future__ import annotations

from gptkernels import linear
from torch import Tensor, nn


class Linear(nn.Linear):
    """`torch.nn.Linear` on `gptkernels.linear`.

    Args:
        inputs, outputs: features of a row before and after.
        bias: whether a bias is added.
        backend: a `gptkernels` backend; None leaves the choice to `gptkernels.use_backend`.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, backend: str | None = None) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.backend = backend

    def forward(self, input: Tensor, add_bias: bool = True) -> Tensor:
        """``(..., inputs) -> (..., outputs)``; without `add_bias` only the product, for a caller that adds the bias itself."""
        return linear(input, self.weight, self.bias if add_bias else None, backend=self.backend)
