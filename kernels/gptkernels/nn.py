"""torch.nn's modules on this library's functions: the same arguments, initial values, state dict and repr.

>>> import torch, gptkernels
>>> norm = gptkernels.nn.LayerNorm(64)
>>> norm.load_state_dict(torch.nn.LayerNorm(64).state_dict())
<All keys matched successfully>
>>> norm(torch.randn(2, 5, 64)).shape
torch.Size([2, 5, 64])

Each is a subclass of its twin (``isinstance`` and everything else that looks for the twin goes on working), and where there
is no fused kernel for a configuration or an input, the twin's own forward runs. `gptkernels.use_backend` chooses what runs.

What differs from the twins, on purpose:

- Under autocast on a GPU, PyTorch widens the results of layer norm and softmax to float32. Here, as in PyTorch's own autocast
  on the CPU, they keep the input's dtype (statistics are float32 all the same): the next matrix product would narrow them
  again. The losses are float32 in either case.
- `CrossEntropyLoss` of 16-bit logits is float32 without autocast too, where PyTorch rounds it to 16 bits.
- `Softmax` of nothing but -inf is 0 everywhere, not NaN.
- No second derivatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptkernels.activation import gelu
from gptkernels.cross_entropy import cross_entropy
from gptkernels.layer_norm import layer_norm
from gptkernels.linear_cross_entropy import linear_cross_entropy
from gptkernels.rms_norm import rms_norm
from gptkernels.softmax import softmax

__all__ = ["GELU", "CrossEntropyLoss", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm", "Softmax"]


def fits(x: Tensor, normalized_shape: tuple[int, ...]) -> bool:
    """Whether x is something to normalise over `normalized_shape`; if not, the error is the twin's to raise."""
    if not normalized_shape or not x.dtype.is_floating_point:
        return False
    if x.is_nested:  # the strided ones have no shape to ask for
        return len(normalized_shape) == 1 and x.size(-1) == normalized_shape[0]
    return x.shape[-len(normalized_shape) :] == normalized_shape


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on `gptkernels.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        if not fits(input, self.normalized_shape):
            return super().forward(input)
        if len(self.normalized_shape) == 1:
            return layer_norm(input, self.weight, self.bias, self.eps)
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        return layer_norm(input.flatten(-len(self.normalized_shape)), weight, bias, self.eps).view(input.shape)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` on `gptkernels.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not fits(x, self.normalized_shape):
            return super().forward(x)
        eps = self.eps
        if eps is None:  # PyTorch's: that of the dtype it computes in
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        if len(self.normalized_shape) == 1:
            return rms_norm(x, self.weight, eps)
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(x.flatten(-len(self.normalized_shape)), weight, eps).view(x.shape)


class Softmax(nn.Softmax):
    """`torch.nn.Softmax` on `gptkernels.softmax`; a row of nothing but -inf gives zeros, where PyTorch gives NaN."""

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None or not -input.dim() <= self.dim < input.dim() or not input.dtype.is_floating_point:
            return super().forward(input)
        if input.is_nested and input.layout is torch.strided:  # such a tensor has torch.softmax, and little beside it
            return super().forward(input)
        return softmax(input, self.dim)


class GELU(nn.GELU):
    """`torch.nn.GELU`, exact and tanh form, on `gptkernels.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 0 or not input.dtype.is_floating_point:
            return super().forward(input)
        return gelu(input, approximate=self.approximate)


def _class_indices(rows: Tensor, target: Tensor) -> bool:
    """Whether `target` names a class for each of the rows ``(..., N)``, as the fused losses take it."""
    return target.dtype == torch.int64 and target.shape == rows.shape[:-1] and rows.shape[-1] > 0


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `gptkernels.cross_entropy`.

    Fused for ``(N, C)`` or ``(C)`` and class indices; class weights, label smoothing, probabilities as targets and
    logits ``(N, C, d1, ...)`` are PyTorch's own.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        plain = self.weight is None and self.label_smoothing == 0.0 and 1 <= input.dim() <= 2
        if not plain or not input.dtype.is_floating_point or not _class_indices(input, target):
            return super().forward(input, target)
        return cross_entropy(input, target, self.ignore_index, self.reduction)


class _LinearCrossEntropyLoss(nn.Module):
    """What `LinearCrossEntropyLoss` is made of where PyTorch has no module of that name (2.13 does)."""

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.out_features = ()
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        ignore_index = -100 if self.ignore_index is None else self.ignore_index
        return nn.functional.cross_entropy(
            self.linear(input),
            target,
            self.weight,
            ignore_index=ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.linear.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )


if TYPE_CHECKING:
    _LinearCrossEntropyTwin = _LinearCrossEntropyLoss
else:
    _LinearCrossEntropyTwin = getattr(nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)


class LinearCrossEntropyLoss(_LinearCrossEntropyTwin):
    """`torch.nn.LinearCrossEntropyLoss` on `gptkernels.linear_cross_entropy`: the logits are never all held.

    Fused for class indices without class weights, label smoothing and `out_features`, the rest is PyTorch's own. Beside
    ``(N, in_features)`` it takes ``(..., in_features)`` with targets ``(...)``. `options`, which size the chunks of
    PyTorch's, have no effect on the fused kernels, and a second backward (``retain_graph``) needs none.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        plain = self.weight is None and self.label_smoothing == 0.0 and self.out_features == ()
        if not plain or not input.dtype.is_floating_point or not _class_indices(input, target):
            return super().forward(input, target)
        ignore_index = -100 if self.ignore_index is None else self.ignore_index
        linear: Any = self.linear
        return linear_cross_entropy(input, linear.weight, target, linear.bias, ignore_index, self.reduction)
