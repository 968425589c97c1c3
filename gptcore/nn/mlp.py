"""The MLP of every transformer block."""

from __future__ import annotations

from typing import Literal

from gptkernels import gelu, swiglu
from torch import Tensor, nn

from gptcore.nn.linear import Linear

Activation = Literal["gelu", "gelu_exact", "swiglu"]


class MLP(nn.Module):
    """Linear, activation, linear. The GELU kernel adds the first layer's bias; SwiGLU's two inputs are one matrix product.

    Args:
        width: features of a row before and after.
        hidden: features of the hidden layer.
        activation: "gelu" (tanh form), "gelu_exact" (with erf), or "swiglu": SiLU of one hidden layer times another.
        bias: whether the linear layers add a bias.
        backend: a `gptkernels` backend; None leaves the choice to `gptkernels.use_backend`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation = "gelu",
        *,
        bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.backend = backend
        products = 2 if activation == "swiglu" else 1
        self.c_fc = Linear(width, products * hidden, bias=bias, backend=backend)  # rows of swiglu: gate, then up
        self.c_proj = Linear(hidden, width, bias=bias, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width) -> (..., width)``"""
        if self.activation == "swiglu":
            gate, up = self.c_fc(x).chunk(2, dim=-1)  # views
            return self.c_proj(swiglu(gate, up, backend=self.backend))
        approximate = "tanh" if self.activation == "gelu" else "none"
        hidden = self.c_fc(x, add_bias=False)
        return self.c_proj(gelu(hidden, self.c_fc.bias, approximate, backend=self.backend))
