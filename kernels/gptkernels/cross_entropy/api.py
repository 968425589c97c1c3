"""Cross-entropy: the public function, its checks and its autograd.Function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

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

    Computed in float32 whatever the dtype. When the logits need a gradient, forward computes it in the same pass as the
    loss, and backward returns it: the logits may be changed in place in between. With "none", and for float16 logits,
    backward computes the gradient from the logits (a loss scale must multiply a float16 gradient before it is rounded).
    On a GPU the host never waits, in forward or backward.

    Args:
        logits: ``(..., V)``, floating point; any layout, a last dimension of stride 1 is read in place.
        target: ``(...)`` int64 or int32, the index of the right class, or `ignore_index`.
        ignore_index: targets of this value do not count, in the loss or in the mean.
        reduction: "mean" over the targets that count (NaN if none does), "sum", or "none".
        backend: overrides `use_backend` for this call.

    Returns:
        A scalar, or with "none" target's shape; float32 (float64 for float64 logits).

    Raises:
        ValueError: a shape or reduction that is not accepted, or tensors on different devices.
        TypeError: logits that are not floating point, targets that are not integers.
        IndexError: a target that is not a class, on the CPU. On a GPU it is not checked: its loss and the gradient of its
            logits are NaN (in the reference, PyTorch stops the device by an assertion).
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: the gradient ``softmax - onehot`` is in Bishop, "Pattern Recognition and Machine Learning", 4.3.4; computing
    it with the loss is from Hsu et al., "Liger Kernel", arXiv 2410.10989. The derivation is in ``MATH.md``.
    """
    _loss.validate("logits", logits, target, reduction)
    name = _backend.choose("cross_entropy", logits, backend)
    if name == "reference":
        return reference.cross_entropy(logits, target, ignore_index, reduction)
    return _library.apply(CrossEntropyFunction, logits, target, ignore_index, reduction, torch.is_grad_enabled(), name)


class CrossEntropyFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves the finished gradient, and the logits to compute it in or for a backward.

    `recording` says whether gradients are recorded; ``needs_input_grad`` does not, it is True in no_grad mode too.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, reduction: str, recording: bool, backend: str
    ) -> Tensor:
        ops = _library.ops(backend)
        ctx.ignore_index, ctx.reduction, ctx.backend = ignore_index, reduction, backend
        if recording and ctx.needs_input_grad[0] and _loss.gradient_in_forward(logits, reduction):
            weights = _loss.row_weights(target, ignore_index, reduction)
            losses, *gradients = ops.cross_entropy_backward(logits, target, weights, ignore_index)
        else:
            losses, gradients = ops.cross_entropy_forward(logits, target, ignore_index), ()
        _loss.save(ctx, (logits, target), tuple(gradients))
        return losses if reduction == "none" else _loss.reduced(losses, target, ignore_index, reduction)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        graph = _library.graph_wanted()
        gradients = () if graph else _loss.saved_gradients(ctx, 2, grad_out)
        if not gradients:
            logits, target = ctx.saved_tensors[:2]
            if graph:
                options = {"target": target, "ignore_index": ctx.ignore_index, "reduction": ctx.reduction}
                gradients = _library.differentiable_gradients(
                    partial(reference.cross_entropy, **options), (logits,), grad_out
                )
            else:
                row_weight = _loss.row_gradients(target, ctx.ignore_index, ctx.reduction, grad_out)
                ops = _library.ops(ctx.backend)
                _, *gradients = ops.cross_entropy_backward(logits, target, row_weight, ctx.ignore_index)
        return *gradients, None, None, None, None, None


def _fake_forward(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(target.shape, dtype=torch.float32)


def _fake_backward(logits: Tensor, target: Tensor, row_weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(target.shape, dtype=torch.float32), logits.new_empty(logits.shape)


_library.register(
    "cross_entropy_forward",
    "(Tensor logits, Tensor target, int ignore_index) -> Tensor",
    fake=_fake_forward,
)
# Returns the losses, and the gradient of their sum weighted by row_weight (of target's shape).
_library.register(
    "cross_entropy_backward",
    "(Tensor logits, Tensor target, Tensor row_weight, int ignore_index) -> (Tensor losses, Tensor grad_logits)",
    fake=_fake_backward,
)
