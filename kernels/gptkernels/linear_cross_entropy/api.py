"""The cross-entropy of a linear layer's output: the public function, its checks and its autograd.Function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _flops, _library, _loss
from gptkernels import backend as _backend
from gptkernels.linear_cross_entropy import reference


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy` of the logits ``x @ weight^T + bias``, which exist only for a chunk of tokens at a time.

    When an input needs a gradient, forward computes all gradients with the loss, chunk by chunk, and backward returns
    them. With "none", and for float16, backward computes them, and the logits a second time (a loss scale must multiply
    float16 gradients before they are rounded). The weight's gradient is summed over the chunks in float32. Autocast casts
    x, weight and bias as it does for a linear layer; the gradients have the inputs' own dtypes. On a GPU a chunk is a fifth
    of the tokens, or some thousands, and the host never waits. Gradients that will be differentiated again
    (``create_graph=True``) are computed by the plain layer, which holds all logits.

    Args:
        x: ``(..., C)``, floating point.
        weight: ``(V, C)``, a row for each class: the output layer's weight, or the token embedding that it is tied to.
        target: ``(...)`` int64 or int32, the index of the right class, or `ignore_index`.
        bias: ``(V,)`` or None.
        ignore_index: targets of this value do not count, in the loss or in the mean.
        reduction: "mean" over the targets that count (NaN if none does), "sum", or "none".
        backend: overrides `use_backend` for this call.

    Returns:
        A scalar, or with "none" target's shape; float32 (float64 for float64 x).

    Raises:
        ValueError: a shape or reduction that is not accepted, or tensors on different devices.
        TypeError: tensors that are not floating point or, without autocast, of different dtypes; targets that are not
            integers.
        IndexError: a target that is not a class, on the CPU. On a GPU it is not checked: its loss and all gradients that
            it reaches are NaN (in the reference, PyTorch stops the device by an assertion).
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Hsu et al., "Liger Kernel", arXiv 2410.10989 (chunks, gradients with the loss); Wijmans et al., "Cut Your
    Losses", arXiv 2411.09009. The derivation is in ``MATH.md``.
    """
    _loss.validate("x", x, target, reduction)
    _check.floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted is (classes, {x.shape[-1]})")
    _check.same_device("weight", weight, "x", x)
    if bias is not None:
        _check.floating("bias", bias)
        _check.shape("bias", bias, (weight.shape[0],))
        _check.same_device("bias", bias, "x", x)
    if (dtype := _check.autocast_dtype(x)) is not None:
        x = x.to(dtype)
    else:
        _check.same_dtype("weight", weight, "x", x)
        if bias is not None:
            _check.same_dtype("bias", bias, "x", x)
    name = _backend.choose("linear_cross_entropy", x, backend)
    if name == "reference":
        return _formula(x, weight, bias, (target, ignore_index, reduction))
    return _library.apply(
        LinearCrossEntropyFunction, x, weight, target, bias, ignore_index, reduction, torch.is_grad_enabled(), name
    )


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves the finished gradients, and the inputs to compute them in or for a backward.

    Forward takes the model's own weight and casts it, so that the gradient is rounded once, from float32 to the weight's
    dtype, and not to autocast's first. `recording` says whether gradients are recorded; ``needs_input_grad`` does not, it
    is True in no_grad mode too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        reduction: str,
        recording: bool,
        backend: str,
    ) -> Tensor:
        ctx.ignore_index, ctx.reduction, ctx.backend = ignore_index, reduction, backend
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        cast_weight, cast_bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
        ops = _library.ops(backend)
        if recording and any(needs) and _loss.gradient_in_forward(x, reduction):
            weights = _loss.row_weights(target, ignore_index, reduction)
            losses, *gradients = ops.linear_cross_entropy_backward(
                x, cast_weight, cast_bias, target, weights, ignore_index, *needs
            )
        else:
            losses = ops.linear_cross_entropy_forward(x, cast_weight, cast_bias, target, ignore_index)
            gradients = ()
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        _loss.save(ctx, (x, weight, target, bias), tuple(gradients))
        return losses if reduction == "none" else _loss.reduced(losses, target, ignore_index, reduction)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        graph = _library.graph_wanted()
        gradients = () if graph else _loss.saved_gradients(ctx, 4, grad_out)
        if not gradients:
            x, weight, target, bias = ctx.saved_tensors[:4]
            options = target, ctx.ignore_index, ctx.reduction
            if graph:
                gradients = _library.differentiable_gradients(
                    partial(_formula, options=options), (x, weight, bias), grad_out
                )
            else:
                row_weight = _loss.row_gradients(*options, grad_out)
                cast_weight, cast_bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
                _, *gradients = _library.ops(ctx.backend).linear_cross_entropy_backward(
                    x, cast_weight, cast_bias, target, row_weight, ctx.ignore_index, *needs
                )
        grad_x, grad_weight, grad_bias = gradients
        return (
            grad_x if needs[0] else None,
            grad_weight.to(ctx.dtypes[0]) if needs[1] else None,
            None,
            grad_bias.to(ctx.dtypes[1]) if needs[2] else None,
            None,
            None,
            None,
            None,
        )


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Tensor, int, str]) -> Tensor:
    target, ignore_index, reduction = options
    weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
    return reference.linear_cross_entropy(x, weight, target, bias, ignore_index, reduction)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    return x.new_empty(target.shape, dtype=torch.float32)


def _fake_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(target.shape, dtype=torch.float32),
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32),
        x.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )


def _backward_flops(x: Tensor, weight: Tensor, *rest: Any) -> int:
    need_x, need_weight, _ = rest[-3:]
    return (1 + need_x + need_weight) * _flops.product(x, weight)


_library.register(
    "linear_cross_entropy_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index) -> Tensor",
    fake=_fake_forward,
    flops=lambda x, weight, *_: _flops.product(x, weight),
)
# Returns the losses, and the gradients of their sum weighted by row_weight (of target's shape).
_library.register(
    "linear_cross_entropy_backward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor row_weight, int ignore_index, bool need_x,"
    " bool need_weight, bool need_bias) -> (Tensor losses, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_backward,
    flops=_backward_flops,
)
