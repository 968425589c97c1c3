"""How gptkernels tests that an operation is right; your own tests can import it.

The error budget: measured against the float64 result, a fused operation may err at most twice as much as the plain PyTorch
operation does in the same dtype, plus the rounding of the result. No tolerance is tuned by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gptkernels._spec import Case, Cost, Draws, Inputs, OpSpec, Output
from gptkernels.activation.spec import GELU_SPEC, SWIGLU_SPEC
from gptkernels.attention import spec as attention
from gptkernels.cross_entropy.spec import SPEC as CROSS_ENTROPY
from gptkernels.layer_norm import spec as layer_norm
from gptkernels.linear.spec import SPEC as LINEAR
from gptkernels.linear_cross_entropy.spec import SPEC as LINEAR_CROSS_ENTROPY
from gptkernels.rms_norm import spec as rms_norm
from gptkernels.rotary.spec import SPEC as ROTARY
from gptkernels.softmax.spec import SPEC as SOFTMAX

__all__ = [
    "SPECS",
    "Case",
    "Cost",
    "Inputs",
    "OpSpec",
    "assert_within_budget",
    "check_op",
    "outputs",
    "poisoned_memory",
    "random_grads",
    "run",
]

SPECS: tuple[OpSpec, ...] = (
    layer_norm.SPEC,
    layer_norm.ADD_SPEC,
    rms_norm.SPEC,
    rms_norm.ADD_SPEC,
    SOFTMAX,
    attention.SPEC,
    attention.VARLEN_SPEC,
    ROTARY,
    LINEAR,
    GELU_SPEC,
    SWIGLU_SPEC,
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
)
"""The specification of every operation: inputs, shape grid, FLOPs and bytes."""


FEW = 16
"""A result with fewer elements than this says little about the operation's error."""
PIECE = 2**26
"""Longer results are compared in pieces of this many elements: a comparison takes ten times the memory of its operands."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every new uninitialised tensor with NaN (integers: the largest value), so that an unwritten output shows.

    It uses PyTorch's deterministic fill, which covers allocations in C++ and every device.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def assert_within_budget(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, plain_error: float | None = None
) -> None:
    """Asserts that `actual` is as close to `exact` (float64) as the plain operation's result allows.

    Both the largest and the root-mean-square error may be at most twice `plain`'s, plus the rounding of the result to
    `actual`'s dtype. Infinities and NaN must stand where `plain` has them.

    Args:
        name: what is compared, for the message.
        actual: the fused operation's result, dtype under test.
        plain: plain PyTorch's result in the same dtype.
        exact: the float64 result from the same inputs.
        plain_error: the plain operation's largest error, where it was measured over more than this one result.

    Raises:
        AssertionError: naming the error, the budget and the worst element.
    """
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, plain PyTorch gives {plain.dtype}"
    assert actual.shape == plain.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(plain.shape)}"
    if actual.numel() == 0:
        return
    if actual.numel() > PIECE:
        pieces = (t.detach().flatten().split(PIECE) for t in (actual, plain, exact))
        for got, reference, want in zip(*pieces):
            assert_within_budget(name, got, reference, want, plain_error)
        return
    eps = torch.finfo(actual.dtype).eps
    got, want, reference = (t.detach().double() for t in (actual, exact, plain))
    odd = ~reference.isfinite()
    same = (got == reference) | (got.isnan() & reference.isnan())
    assert bool(same[odd].all()), f"{name}: {got[odd & ~same][0]} where plain PyTorch has {reference[odd & ~same][0]}"
    assert bool(got[~odd].isfinite().all()), f"{name}: {int((~got[~odd].isfinite()).sum())} values are not finite"
    got, want, reference = got[~odd], want[~odd], reference[~odd]
    if got.numel() == 0:
        return
    error, plain_errors = (got - want).abs(), (reference - want).abs()
    # Rounding alone may cost half a unit in the last place of the result: eps / 2 of each value.
    largest = max(float(plain_errors.max()), plain_error or 0.0)
    budget = 2 * largest + eps / 2 * want.abs() + torch.finfo(actual.dtype).tiny
    worst = int((error - budget).argmax())
    assert bool((error <= budget).all()), (
        f"{name}: error {error[worst]:.3e} at element {worst} ({got[worst]:.6g}, exact {want[worst]:.6g}); "
        f"the budget is {budget[worst]:.3e} (plain PyTorch errs by at most {largest:.3e})"
    )
    rms = error.square().mean().sqrt()
    plain_rms = plain_errors.square().mean().sqrt() if plain_error is None else largest
    rms_budget = 2 * plain_rms + eps / 2 * want.square().mean().sqrt() + torch.finfo(actual.dtype).tiny
    assert rms <= rms_budget, f"{name}: RMS error {rms:.3e}; the budget is {rms_budget:.3e} (plain {plain_rms:.3e})"


def outputs(result: Output) -> tuple[Tensor, ...]:
    """Returns an operation's result as a tuple: most operations return one tensor, some two."""
    return result if isinstance(result, tuple) else (result,)


def run(function: Callable[..., Output], inputs: Inputs, grad_out: Output | None = None) -> dict[str, Tensor]:
    """Calls `function` and differentiates it: ``{"out": ..., "grad_x": ...}`` for every floating-point input.

    `grad_out` holds a gradient for each output; None skips the backward. A second output is named ``out1``.
    """
    leaves = inputs.mapped(lambda t: t.detach().requires_grad_(grad_out is not None))
    outs = outputs(function(**leaves.tensors, **leaves.options))
    results = {f"out{i or ''}": out.detach() for i, out in enumerate(outs)}
    if grad_out is not None:
        names, tensors = zip(*leaves.differentiable().items())
        grads = torch.autograd.grad(outs, tensors, [g.to(o.dtype) for g, o in zip(outputs(grad_out), outs)])
        results |= {f"grad_{name}": grad for name, grad in zip(names, grads)}
    return results


def random_grads(result: Output, seed: int) -> tuple[Tensor, ...]:
    """Draws a gradient for each of an operation's outputs."""
    outs = outputs(result)
    draws = Draws(outs[0].device, seed)
    return tuple(draws.normal(*o.shape).to(o.device, o.dtype) for o in outs)


def check_op(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: torch.device | str = "cpu",
    seed: int = 0,
    grad_scale: float = 1.0,
) -> None:
    """Checks one case of one operation, forward and backward, against the float64 error budget, on poisoned memory.

    `grad_scale` multiplies the gradients of the outputs, as a loss scale does.
    """

    def drawn(seed: int) -> tuple[Inputs, tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]:
        inputs = spec.make_inputs(case, dtype, torch.device(device), seed)
        grad_out = random_grads(spec.reference(**inputs.tensors, **inputs.options), seed + 1)
        grad_out = tuple(grad_scale * g for g in grad_out)
        # Contiguous: the budget must not depend on the layout, and PyTorch's attention picks a kernel by it.
        plain = run(spec.reference, inputs.mapped(torch.Tensor.contiguous), grad_out)
        exact = run(spec.reference, inputs.mapped(lambda t: t.double()), tuple(g.double() for g in grad_out))
        return inputs, grad_out, plain, exact

    inputs, grad_out, plain, exact = drawn(seed)
    with poisoned_memory():
        actual = run(lambda **kwargs: spec.function(**kwargs, backend=backend), inputs, grad_out)
    # The error of a handful of numbers is luck (a mean loss may be exact): take the plain operation's largest error of
    # several draws.
    few = [name for name, value in plain.items() if 0 < value.numel() < FEW]
    errors: dict[str, float] = {}
    for other in range(seed + 1, seed + 8 if few else seed):
        _, _, others, exacts = drawn(other)
        for name in few:
            error = (others[name].double() - exacts[name].double()).abs()
            errors[name] = max(errors.get(name, 0.0), float(error.nan_to_num(0.0, 0.0).max()))
    for name, value in actual.items():
        assert_within_budget(f"{spec.name}[{case.name}] {name}", value, plain[name], exact[name], errors.get(name))
