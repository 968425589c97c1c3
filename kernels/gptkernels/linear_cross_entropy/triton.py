"""Linear cross-entropy on the GPU, by chunks of tokens: PyTorch's matrix products, and the losses' kernels on the logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gptkernels import _library
from gptkernels._loss.triton import rows_cross_entropy

# A chunk is a fifth of the tokens, but at least MIN_TOKENS, which keep the products efficient (each chunk reads the weight
# twice, and reads and writes its float32 gradient). Within that, its logits take at most MAX_BYTES.
CHUNKS = 5
MIN_TOKENS = 2048
MAX_BYTES = 1 << 30
# The multiples to which the tokens of a chunk and the classes of a row of logits are rounded up, for the matrix products.
TOKEN_MULTIPLE = 128
CLASS_MULTIPLE = 64


class Results(NamedTuple):
    losses: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def chunk_tokens(tokens: int, classes: int, itemsize: int) -> int:
    """The tokens of a chunk: chunks of about equal size, which depends on the shape only."""
    most = max(MIN_TOKENS, min(math.ceil(tokens / CHUNKS), MAX_BYTES // (classes * itemsize)))
    equal = math.ceil(tokens / math.ceil(tokens / most))
    return min(tokens, math.ceil(equal / TOKEN_MULTIPLE) * TOKEN_MULTIPLE)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total (+)= a @ b`` with a float32 total."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif a.is_cuda and torch.version.hip is None and not torch.cuda.tunable.is_enabled():
        # A product with a float32 result, added in float32. PyTorch has it for cuBLAS only, and not for tuned products.
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0.0 if first else 1.0, out=total)
    else:  # each chunk's product is rounded, their sum is float32
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)


@torch.no_grad()
def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> Results:
    """Computes the losses and, with `row_weight`, the gradients that are needed; the others are empty."""
    classes, width = weight.shape
    tokens = target.numel()
    results = Results(
        torch.empty(target.shape, dtype=torch.float32, device=x.device),
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        torch.empty(weight.shape if need_weight else (0,), dtype=torch.float32, device=x.device),
        torch.empty(classes if need_bias else 0, dtype=torch.float32, device=x.device),
    )
    if tokens == 0:
        results.grad_weight.zero_()
        results.grad_bias.zero_()
        return results
    rows = x.reshape(tokens, width)
    grad_rows = results.grad_x.view(tokens, width) if need_x else None
    losses, targets = results.losses.view(-1), target.reshape(-1).contiguous()
    weights = None if row_weight is None else row_weight.to(torch.float32).reshape(-1).contiguous()
    most = chunk_tokens(tokens, classes, x.element_size())
    # Pad rows, so that they start at multiples of 16 bytes: products and kernels then read them in wide loads.
    padded = math.ceil(classes / CLASS_MULTIPLE) * CLASS_MULTIPLE
    buffer = torch.empty(most, padded, dtype=x.dtype, device=x.device)
    with _library.no_autocast(x):
        for start in range(0, tokens, most):
            chunk = slice(start, min(start + most, tokens))
            part = rows[chunk]
            logits = buffer[: part.shape[0], :classes]
            if bias is None:
                torch.mm(part, weight.t(), out=logits)
            else:
                torch.addmm(bias, part, weight.t(), out=logits)
            if weights is None:
                rows_cross_entropy(logits, targets[chunk], ignore_index, losses[chunk], padded=padded)
                continue
            rows_cross_entropy(logits, targets[chunk], ignore_index, losses[chunk], weights[chunk], logits, padded)
            gradient = logits
            if grad_rows is not None:
                torch.mm(gradient, weight, out=grad_rows[chunk])
            if need_weight:
                _add_product(results.grad_weight, gradient.t(), part, first=start == 0)
            if need_bias:
                sums = gradient.sum(0, dtype=torch.float32)
                results.grad_bias.copy_(sums) if start == 0 else results.grad_bias.add_(sums)
    return results


def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> Tensor:
    """The losses, float32, of target's shape."""
    return _run(x, weight, bias, target, None, ignore_index, False, False, False).losses


def linear_cross_entropy_backward(
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
    """``(losses, grad_x, grad_weight, grad_bias)``: the gradients of the losses' sum weighted by `row_weight`.

    grad_x has x's shape and dtype, the others are float32; a gradient that is not needed is empty.
    """
    return tuple(_run(x, weight, bias, target, row_weight, ignore_index, need_x, need_weight, need_bias))
