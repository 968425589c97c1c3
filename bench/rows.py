"""What benches share about a row: the operation's calls, its work, its name, and the group that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gptkernels.testing import SPECS, Case, Inputs, OpSpec, Output, outputs, random_grads
from torch import Tensor

from bench.measure import short

BOTH = "forward + backward"
DIRECTIONS = ("forward", "backward", BOTH)
GROUPS = {
    "attention": ("attention", "attention_varlen"),
    "norms": ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"),
    "losses": ("cross_entropy", "linear_cross_entropy"),
    "softmax": ("softmax",),
}
OTHERS = "others"
"""The group of all operations that `GROUPS` does not list."""


def specs_of(group: str) -> list[OpSpec]:
    """The operations of a group, in the order of `SPECS`."""
    listed = {name for names in GROUPS.values() for name in names}
    wanted = {spec.name for spec in SPECS} - listed if group == OTHERS else set(GROUPS[group])
    return [spec for spec in SPECS if spec.name in wanted]


def is_loss(spec: OpSpec) -> bool:
    return spec.name in GROUPS["losses"]


def directions(spec: OpSpec) -> tuple[str, ...]:
    """What is timed by itself. A loss computes its gradient in the forward pass, so its two directions are one row."""
    return (BOTH,) if is_loss(spec) else ("forward", "backward")


def row_name(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> str:
    return f"{spec.name} {case.name} {short(dtype)}: {direction}"


def work(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> tuple[int, int]:
    """The FLOPs of a row and the fewest bytes that it must move."""
    cost = spec.cost(case, dtype)
    if direction == "forward":
        return cost.forward_flops, cost.forward_bytes
    if direction == "backward":
        return cost.backward_flops, cost.backward_bytes
    # A loss reads its input once for both directions: backward_bytes is that read and the gradient's write.
    moved = cost.backward_bytes if is_loss(spec) else cost.forward_bytes + cost.backward_bytes
    return cost.forward_flops + cost.backward_flops, moved


def with_gradients(inputs: Inputs) -> Inputs:
    """`inputs` as leaves that require gradients; they share the memory of `inputs`."""
    return inputs.mapped(lambda t: t.detach().requires_grad_())


def output_gradients(spec: OpSpec, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of `outs` to differentiate with: random ones; for a loss 1, as in training.

    Another gradient of a mean loss would cost one more pass over the logits' saved gradient.
    """
    return tuple(map(torch.ones_like, outs)) if is_loss(spec) else random_grads(outs, 0)


def calls(
    function: Callable[..., Output], leaves: Inputs, outs: tuple[Tensor, ...], grad_outs: tuple[Tensor, ...]
) -> dict[str, Callable[[], Any]]:
    """`function` on `leaves` as a call for each of `DIRECTIONS`.

    The forward records no gradients. The backward differentiates `outs`, which `function` returned, as often as it is called.
    """
    tensors = list(leaves.differentiable().values())

    def run() -> Output:
        return function(**leaves.tensors, **leaves.options)

    def both() -> Any:
        return torch.autograd.grad(outputs(run()), tensors, grad_outs)

    backward = partial(torch.autograd.grad, outs, tensors, grad_outs, retain_graph=True)
    return {"forward": torch.no_grad()(run), "backward": backward, BOTH: both}
