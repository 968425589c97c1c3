"""Gradients that are differentiated again: double backward, what PyTorch builds on it, and what it must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gptkernels
import pytest
import torch
import torch.nn.functional as F
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, Case, Inputs, OpSpec, assert_within_budget, outputs, run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

BACKENDS = [name for name in gptkernels.available_backends() if name != "reference"]
# What an operation keeps for its backward depends on these; "33x17" where nothing is said.
CASES = {
    "add_layer_norm": ("33x17", "9x96-float32_residual"),
    "add_rms_norm": ("33x17", "9x96-float32_residual"),
    "softmax": ("4x33x70-dim1-scale0.5", "2x5x64-causal", "6x40-masked"),
    "attention": (
        "B1-H4-T9-D32-full-keys40-kvheads1",
        "B2-H2-T60-D16-causal-window200-leftpadded",
        "B2-H2-T5-D16-full-keys70-lengths-lse",
        "B1-H2-T35-D16-causal-window5-dropout0.2-lse",
    ),
    "attention_varlen": ("T5:40+33+0:7+12-H4-D16-kv_heads2", "T40+9:25-H2-D16-dropout_p0.4-return_lseTrue"),
    "rotary": ("B2-H3-T19-D64",),
    "linear": ("7x40-N64",),
    "gelu": ("33x17", "2x3x65-nobias-exact"),
    "cross_entropy": ("33x17", "9x100-none-ignored0.5"),
    "linear_cross_entropy": ("33-C16-V17-bias-sum", "9-C33-V1000-bias-none-ignored0.5", "20-C40-V100-slice"),
}
EVERY_CASE = [
    pytest.param(spec, case, backend, id=f"{spec.name}-{case.name}-{backend}")
    for spec in SPECS
    for case in spec.cases
    for backend in BACKENDS
    if backend in FUSED[spec.name] and case.name in CASES.get(spec.name, ("33x17",))
]
# What all backends share is tried with the quickest that is here.
FIRST_CASES = [
    p
    for p in EVERY_CASE
    if p.values[2] == BACKENDS[-1] and p.values[1].name in [*(c[0] for c in CASES.values()), "33x17"]
]


def directions(shapes: list[Tensor], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(t.device, dtype) for t in shapes]


def second_derivatives(
    function: Callable[..., Any], inputs: Inputs, recompute: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """The derivatives of ``sum(direction * gradient)``: a Hessian product for inputs, a Jacobian product for grad_out."""
    leaves = inputs.mapped(lambda t: t.detach().requires_grad_())
    names, tensors = zip(*leaves.differentiable().items())

    def called(*args: Tensor) -> Any:
        return function(**(leaves.tensors | dict(zip(names, args))), **leaves.options)

    outs = outputs(called(*tensors) if recompute is None else recompute(called, *tensors))
    grad_outs = [g.to(o.dtype).requires_grad_() for g, o in zip(directions(list(outs), tensors[0].dtype, 1), outs)]
    grads = torch.autograd.grad(outs, tensors, grad_outs, create_graph=True)
    probe = torch.stack([(g * d).sum() for g, d in zip(grads, directions(list(tensors), tensors[0].dtype, 2))]).sum()
    found = torch.autograd.grad(probe, [*tensors, *grad_outs], allow_unused=True, materialize_grads=True)
    labels = [*(f"by {name}" for name in names), *(f"by grad_out {i}" for i in range(len(grad_outs)))]
    return {f"grad_{name}": grad.detach() for name, grad in zip(names, grads)} | dict(zip(labels, found))


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's fused attention has no second derivative; its plain one has."""

    def called(**kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(**kwargs)

    return called


@pytest.mark.parametrize(("spec", "case", "backend"), EVERY_CASE)
def test_second_derivatives_are_the_references(spec: OpSpec, case: Case, backend: str, device: str):
    def drawn(seed: int) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
        inputs = spec.make_inputs(case, torch.float32, torch.device(device), seed)
        exact = second_derivatives(plain(spec.reference), inputs.mapped(torch.Tensor.double))
        return inputs, second_derivatives(plain(spec.reference), inputs), exact

    inputs, expected, exact = drawn(0)
    errors = dict.fromkeys(exact, 0.0)  # of plain PyTorch; one small draw's largest is luck
    for _, found, best in map(drawn, range(5)):
        for name in errors:
            errors[name] = max(errors[name], float((found[name] - best[name]).abs().nan_to_num().max()))
    actual = second_derivatives(lambda **kw: spec.function(**kw, backend=backend), inputs)
    for name, value in actual.items():
        assert_within_budget(f"{spec.name}[{case.name}] {name}", value, expected[name], exact[name], errors[name])


@pytest.mark.parametrize(("spec", "case", "backend"), FIRST_CASES)
def test_second_derivatives_under_checkpointing_and_autocast(spec: OpSpec, case: Case, backend: str, device: str):
    inputs = spec.make_inputs(case, torch.float32, torch.device(device), 0)

    def function(**kwargs: Any) -> Any:
        return spec.function(**kwargs, backend=backend)

    alone = second_derivatives(function, inputs)
    again = second_derivatives(function, inputs, lambda f, *args: checkpoint(f, *args, use_reentrant=False))
    for name, value in alone.items():
        assert torch.equal(value, again[name]), name
    with torch.autocast(device, torch.bfloat16):
        cast = second_derivatives(function, inputs)
        expected = second_derivatives(plain(spec.reference), inputs)
    for name, value in cast.items():
        assert value.dtype == expected[name].dtype, name
        scale = float(alone[name].abs().max())
        torch.testing.assert_close(value.float(), alone[name].float(), rtol=0.05, atol=0.05 * scale, msg=name)


@pytest.mark.parametrize(("spec", "case", "backend"), FIRST_CASES)
def test_a_recorded_backward_leaves_the_others_as_they_are(spec: OpSpec, case: Case, backend: str, device: str):
    """With retain_graph, a later backward of the same graph without create_graph uses the kernels, as usual."""
    inputs = spec.make_inputs(case, torch.float32, torch.device(device), 0)
    leaves = inputs.mapped(lambda t: t.detach().requires_grad_())
    names, tensors = zip(*leaves.differentiable().items())
    outs = outputs(spec.function(**leaves.tensors, **leaves.options, backend=backend))
    grad_outs = directions(list(outs), torch.float32, 1)
    recorded = torch.autograd.grad(outs, tensors, grad_outs, create_graph=True)
    alone = run(lambda **kw: spec.function(**kw, backend=backend), inputs, tuple(grad_outs))
    first, second = (torch.autograd.grad(outs, tensors, grad_outs, retain_graph=True) for _ in range(2))
    for name, *grads in zip(names, first, second, recorded):
        assert torch.equal(grads[0], alone[f"grad_{name}"]), name
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_jvp_hvp_and_hessian(backend: str, device: str):
    x, v = torch.randn(2, 5, device=device).unbind(0)

    def ours(x: Tensor) -> Tensor:
        return gptkernels.gelu(x, backend=backend)

    def theirs(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    functional = torch.autograd.functional
    torch.testing.assert_close(functional.jvp(ours, x, v)[1], functional.jvp(theirs, x, v)[1])
    for product in (functional.hvp, functional.vhp):
        expected = product(lambda x: theirs(x).square().sum(), x, v)[1]
        torch.testing.assert_close(product(lambda x: ours(x).square().sum(), x, v)[1], expected)
    expected = functional.hessian(lambda x: theirs(x).square().sum(), x)
    torch.testing.assert_close(functional.hessian(lambda x: ours(x).square().sum(), x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_given_as_every_argument(backend: str, device: str):
    """Each argument has its own gradient; none may be counted twice."""
    x = torch.randn(1, 2, 7, 16, device=device)

    def penalty(attend: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(attend(leaf, leaf, leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    with sdpa_kernel(SDPBackend.MATH):
        expected = penalty(F.scaled_dot_product_attention)
    actual = penalty(lambda q, k, v: gptkernels.attention(q, k, v, backend=backend))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_penalty_through_a_small_model(backend: str, device: str):
    """Second derivatives flow through one operation into the next, and third ones exist."""
    weight = torch.randn(11, 16, device=device)
    target = torch.randint(0, 11, (6,), device=device)

    def derivatives(backend: str) -> list[Tensor]:
        x, w = (t.clone().requires_grad_() for t in (base, weight))
        normed, summed = gptkernels.add_rms_norm(x, 0.5 * x, torch.ones(16, device=device), backend=backend)
        hidden = gptkernels.swiglu(normed, gptkernels.softmax(summed, scale=0.3, backend=backend), backend=backend)
        loss = gptkernels.linear_cross_entropy(hidden, w, target, backend=backend)
        found = [loss]
        for _ in range(3):
            grads = torch.autograd.grad(found[-1], (x, w), create_graph=True)
            found.append(torch.stack([100 * grad.square().sum() for grad in grads]).sum())
        return [value.detach() for value in (*found, *grads)]

    base = torch.randn(6, 16, device=device)
    for ours, theirs in zip(derivatives(backend), derivatives("reference")):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
