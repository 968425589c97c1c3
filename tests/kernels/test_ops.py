"""What every operation owes, for every operation, backend and dtype: one set of tests over the ops' specs."""

from __future__ import annotations

import gptkernels
import pytest
import torch
from gptkernels.testing import SPECS, Case, OpSpec, assert_within_budget, check_op, run

# The reference is what the budget is measured with; every other backend that can run here is held to it.
FUSED = [name for name in gptkernels.available_backends() if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]
# One representative case an op, for the checks that are about the registration and not about shapes.
FIRST_REAL_CASE = {"layer_norm": "33x17", "softmax": "33x17", "attention": "B2-H3-T37-D64-causal"}
REPRESENTATIVE = [
    pytest.param(spec, next((c for c in spec.cases if c.name == FIRST_REAL_CASE[spec.name]), spec.cases[0]), id=spec.name)
    for spec in SPECS
]  # fmt: skip


def test_a_fused_backend_is_under_test():
    assert "triton" in FUSED


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_within_the_error_budget(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str):
    check_op(spec, case, dtype, backend, device)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_reference_gradients(spec: OpSpec, case: Case):
    inputs = spec.make_inputs(case, torch.float64, torch.device("cpu"), 0)
    leaves = inputs.mapped(lambda t: t.double().detach().requires_grad_(True))
    names, tensors = zip(*leaves.differentiable().items())

    def function(*args: torch.Tensor) -> torch.Tensor:
        return spec.reference(**(leaves.tensors | dict(zip(names, args))), **leaves.options)

    # Fast mode projects the Jacobian on random vectors: the cost does not grow with the number of elements.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("spec", "case"), REPRESENTATIVE)
def test_same_bits_on_every_run(spec: OpSpec, case: Case, backend: str, device: str):
    inputs = spec.make_inputs(case, torch.float32, torch.device(device), 3)
    grad_out = torch.randn_like(spec.reference(**inputs.tensors, **inputs.options))
    runs = [run(lambda **kw: spec.function(**kw, backend=backend), inputs, grad_out) for _ in range(3)]
    for name in runs[0]:
        assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:]), name


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("spec", "case"), REPRESENTATIVE)
def test_compiled_equals_eager(spec: OpSpec, case: Case, backend: str, device: str):
    inputs = spec.make_inputs(case, torch.float32, torch.device(device), 4)
    grad_out = torch.randn_like(spec.reference(**inputs.tensors, **inputs.options))

    def function(**kwargs: object) -> torch.Tensor:
        return spec.function(**kwargs, backend=backend) * 2.0

    eager = run(function, inputs, grad_out)
    torch._dynamo.reset()
    compiled = run(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, grad_out)
    for name in eager:
        assert torch.equal(eager[name], compiled[name]), name


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("spec", "case"), REPRESENTATIVE)
def test_double_backward_is_an_error(spec: OpSpec, case: Case, backend: str, device: str):
    leaves = spec.make_inputs(case, torch.float32, torch.device(device), 5).mapped(lambda t: t.requires_grad_())
    first = next(iter(leaves.differentiable().values()))
    out = spec.function(**leaves.tensors, **leaves.options, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(("spec", "case"), REPRESENTATIVE)
def test_explicit_backend_refuses_float64_and_auto_takes_the_reference(spec: OpSpec, case: Case, device: str):
    inputs = spec.make_inputs(case, torch.float64, torch.device(device), 6)
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16; got torch\.float64"):
        spec.function(**inputs.tensors, **inputs.options, backend="triton")
    actual = spec.function(**inputs.tensors, **inputs.options)
    exact = spec.reference(**inputs.tensors, **inputs.options)
    assert_within_budget(spec.name, actual, exact, exact)


def _op_calls(device: str):
    """One call of every registered op, with the arguments that the public functions pass."""
    x = torch.randn(5, 33, device=device)
    w, b = torch.randn(33, device=device), torch.randn(33, device=device)
    statistics = torch.randn(5, device=device), torch.rand(5, device=device)
    yield "layer_norm_forward", (x, w, b, 1e-5)
    yield "layer_norm_forward", (x.bfloat16(), None, None, 1e-5)
    yield "layer_norm_backward", (x, x, w, *statistics, True, True)
    yield "layer_norm_backward", (x, x, None, *statistics, False, False)
    y = x.softmax(-1)
    yield "softmax_forward", (x, -1, 0.5, False)
    yield "softmax_forward", (x.T, 0, 0.5, False)
    yield "softmax_backward", (x, y, -1, 0.5, True)
    q = torch.randn(2, 4, 19, 16, device=device)
    k, v = torch.randn(2, 2, 2, 23, 16, device=device)
    lengths = torch.tensor([23, 7], device=device)
    mask = torch.rand(2, 23, device=device) > 0.3
    yield "attention_forward", (q, k, v, None, None, True, 0.25)
    out, lse = torch.ops.gptkernels_triton.attention_forward(q, k, v, lengths, mask, False, 0.25)
    yield "attention_forward", (q, k, v, lengths, mask, False, 0.25)
    yield "attention_backward", (q, q, k, v, out, lse, lengths, mask, False, 0.25)


def test_opcheck(device: str):
    called = set()
    for name, args in _op_calls(device):
        torch.library.opcheck(getattr(torch.ops.gptkernels_triton, name), args)
        called.add(name)
    registered = {f"{spec.name}_{direction}" for spec in SPECS for direction in ("forward", "backward")}
    assert called == registered
