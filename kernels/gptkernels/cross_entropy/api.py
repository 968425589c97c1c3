"""Cross-entropy: the public function, its checks and its autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptkernels import _library, _loss
from gptkernels import backend as _backend
from gptkernels.cross_entropy import reference


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy in nats: ``log(sum(exp(logits))) - logits[target]``, over the last dimension.

    Computed in float32 whatever the dtype. When the logits need a gradient, it is computed in the same pass as the loss, and
    backward only hands it over.

    Args:
        logits: ``(..., V)``, floating point; any layout, a last dimension of stride 1 is read in place.
        target: ``(...)`` int64 or int32, the index of the right class, or `ignore_index`.
        ignore_index: targets of this value count for nothing, in the loss and in the mean.
        reduction: "mean" over the targets that count (NaN when none does), "sum", or "none".
        backend: overrides `use_backend` for this call.

    Returns:
        A scalar, or with "none" target's shape; float32 (float64 for float64 logits).

    Raises:
        ValueError: a shape or reduction that is not accepted, or tensors on different devices.
        TypeError: logits that are not floating point, targets that are not integers.
        IndexError: a target that is no class (on a GPU PyTorch reports it as a device assertion).
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: the gradient ``softmax - onehot`` is textbook (Bishop, "Pattern Recognition and Machine Learning", 4.3.4); to
    form it with the loss is from Hsu et al., "Liger Kernel", arXiv 2410.10989. The derivation is in ``MATH.md``.
    """
    _loss.validate("logits", logits, target, reduction)
    name = _backend.choose("cross_entropy", logits, backend)
    if name == "reference":
        return reference.cross_entropy(logits, target, ignore_index, reduction)
    return CrossEntropyFunction.apply(logits, target, ignore_index, reduction, name)


class CrossEntropyFunction(torch.autograd.Function):
    """Autograd around the fused kernels: keeps the finished gradient, or, without reduction, the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, reduction: str, backend: str) -> Tensor:
        ops = _library.ops(backend)
        ctx.ignore_index, ctx.reduction, ctx.backend = ignore_index, reduction, backend
        if reduction == "none":
            ctx.save_for_backward(logits, target)
            return ops.cross_entropy_forward(logits, target, ignore_index)
        weights = _loss.row_weights(target, ignore_index, reduction)
        if not ctx.needs_input_grad[0]:
            return _loss.reduced(ops.cross_entropy_forward(logits, target, ignore_index), weights)
        losses, grad_logits = ops.cross_entropy_backward(logits, target, weights, ignore_index)
        ctx.inputs = logits, target, weights
        _loss.keep_gradients(ctx, grad_logits)
        return _loss.reduced(losses, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, *rest = ctx.saved_tensors
        ops = _library.ops(ctx.backend)
        if ctx.reduction == "none":
            _, grad_logits = ops.cross_entropy_backward(logits, target, grad_out, ctx.ignore_index)
            return grad_logits, None, None, None, None
        kept = _loss.take_gradients(ctx)
        if kept is None:
            _, grad_logits = ops.cross_entropy_backward(logits, target, rest[0] * grad_out, ctx.ignore_index)
        else:
            grad_logits = kept[0] if _loss.is_one(grad_out) else kept[0] * grad_out.to(kept[0].dtype)
        return grad_logits, None, None, None, None


def _fake_forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(target.shape, dtype=torch.float32)


def _fake_backward(logits: Tensor, target: Tensor, row_weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(target.shape, dtype=torch.float32), logits.new_empty(logits.shape)


_library.register(
    "cross_entropy_forward",
    "(Tensor logits, Tensor target, int ignore_index) -> Tensor",
    fake=_fake_forward,
)
# The losses, and with them the gradient of their sum weighted by row_weight (target's shape).
_library.register(
    "cross_entropy_backward",
    "(Tensor logits, Tensor target, Tensor row_weight, int ignore_index) -> (Tensor losses, Tensor grad_logits)",
    fake=_fake_backward,
)
