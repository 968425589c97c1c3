"""Modules like torch.nn's that run on this library's functions, with the same arguments, initial values and state dict.

>>> import torch, gptkernels
>>> norm = gptkernels.nn.LayerNorm(64)
>>> norm.load_state_dict(torch.nn.LayerNorm(64).state_dict())
<All keys matched successfully>
>>> norm(torch.randn(2, 5, 64)).shape
torch.Size([2, 5, 64])

Each is a subclass of its twin in torch.nn, so ``isinstance`` works as before. If there is no fused kernel for a configuration
or an input, the twin's own forward runs. `gptkernels.use_backend` chooses the kernels.

Three results differ from the twins' on purpose:

- Under autocast on a GPU, PyTorch widens the results of layer norm and softmax to float32. Here they keep the input's dtype,
  as under PyTorch's autocast on the CPU, because the next matrix product would narrow them again. Statistics are float32
  here too, and the losses are float32 in either case.
- `CrossEntropyLoss` of 16-bit logits is float32 without autocast too; PyTorch's is rounded to 16 bits.
- `Softmax` of a row of -inf is 0 everywhere; PyTorch's is NaN.
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
    """Whether x can be normalised over `normalized_shape`; if not, the twin raises the error."""
    if not normalized_shape or not x.dtype.is_floating_point:
        return False
    if x.is_nested:  # strided nested tensors have no `shape`
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
        if eps is None:  # PyTorch's default: that of the dtype it computes in
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        if len(self.normalized_shape) == 1:
            return rms_norm(x, self.weight, eps)
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(x.flatten(-len(self.normalized_shape)), weight, eps).view(x.shape)


class Softmax(nn.Softmax):
    """`torch.nn.Softmax` on `gptkernels.softmax`; a row of -inf gives zeros, where PyTorch gives NaN."""

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None or not -input.dim() <= self.dim < input.dim() or not input.dtype.is_floating_point:
            return super().forward(input)
        if input.is_nested and input.layout is torch.strided:  # few other functions take such
            return super().forward(input)
        return softmax(input, self.dim)


class GELU(nn.GELU):
    """`torch.nn.GELU`, exact and tanh form, on `gptkernels.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 0 or not input.dtype.is_floating_point:
            return super().forward(input)
        return gelu(input, approximate=self.approximate)


def _class_indices(rows: Tensor, target: Tensor) -> bool:
    """Whether `target` holds a class index for each row of ``(..., N)``, as the fused losses need it."""
    return target.dtype == torch.int64 and target.shape == rows.shape[:-1] and rows.shape[-1] > 0


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on `gptkernels.cross_entropy`.

    Fused for logits ``(N, C)`` or ``(C)`` with class indices. PyTorch's own forward handles class weights, label smoothing,
    probabilities as targets and logits ``(N, C, d1, ...)``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        plain = self.weight is None and self.label_smoothing == 0.0 and 1 <= input.dim() <= 2
        if not plain or not input.dtype.is_floating_point or not _class_indices(input, target):
            return super().forward(input, target)
        return cross_entropy(input, target, self.ignore_index, self.reduction)


class _LinearCrossEntropyLoss(nn.Module):
    """The base of `LinearCrossEntropyLoss` for versions of PyTorch without a module of that name (it came with 2.13)."""

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
    """`torch.nn.LinearCrossEntropyLoss` on `gptkernels.linear_cross_entropy`, which never holds all logits.

    Fused for class indices; PyTorch's own forward handles class weights, label smoothing and `out_features`. It takes
    ``(..., in_features)`` with targets ``(...)``, not only ``(N, in_features)``. The fused kernels ignore `options`, which
    size PyTorch's chunks, and support a second backward (``retain_graph``) without them.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        plain = self.weight is None and self.label_smoothing == 0.0 and self.out_features == ()
        if not plain or not input.dtype.is_floating_point or not _class_indices(input, target):
            return super().forward(input, target)
        ignore_index = -100 if self.ignore_index is None else self.ignore_index
        linear: Any = self.linear
        return linear_cross_entropy(input, linear.weight, target, linear.bias, ignore_index, self.reduction)
