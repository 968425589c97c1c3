"""What every operation must do, for every operation, backend and dtype: one set of tests over the specs."""

from __future__ import annotations

import gptkernels
import pytest
import torch
from gptkernels.backend import FUSED as FUSED_OPS
from gptkernels.testing import SPECS, Case, OpSpec, assert_within_budget, check_op, outputs, random_grads, run

# The reference is what the budget is measured with; every other backend that can run here is held to it.
FUSED = [name for name in gptkernels.available_backends() if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]
# One representative case an op, for the checks that are about the registration and not about shapes.
FIRST_REAL_CASE = {
    "attention": "B2-H3-T37-D64-causal",
    "attention_varlen": "T40+9:25-H2-D16-dropout_p0.4-return_lseTrue",
    "rotary": "B2-H3-T19-D64",
    "linear": "7x40-N64",
    "linear_cross_entropy": "33-C16-V17-bias-sum",
}


def representative(spec: OpSpec) -> Case:
    return next(case for case in spec.cases if case.name == FIRST_REAL_CASE.get(spec.name, "33x17"))


REPRESENTATIVE = [pytest.param(spec, representative(spec), id=spec.name) for spec in SPECS]
# A backend with the ops that it has.
FUSED_CASES = [
    pytest.param(spec, case, name, id=f"{spec.name}-{case.name}-{name}")
    for spec in SPECS
    for case in spec.cases
    for name in FUSED
    if name in FUSED_OPS[spec.name]
]
FUSED_REPRESENTATIVE = [p for p in FUSED_CASES if p.values[1] is representative(p.values[0])]


def test_fused_backends_are_under_test(device: str):
    assert "triton" in FUSED
    assert ("native" in FUSED) == (device == "cpu")
    assert {spec.name for spec in SPECS} == set(FUSED_OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case", "backend"), FUSED_CASES)
def test_within_the_error_budget(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: str):
    check_op(spec, case, dtype, backend, device)


@pytest.mark.parametrize("grad_scale", [2.0**-10, 2.0**16])
@pytest.mark.parametrize(("spec", "case", "backend"), FUSED_REPRESENTATIVE)
def test_within_the_error_budget_whatever_the_loss_scale(
    spec: OpSpec, case: Case, backend: str, grad_scale: float, device: str
):
    """Loss scales with float16: a float32 loss takes any, a float16 output's gradient up to 2^10."""
    if "cross_entropy" not in spec.name:
        grad_scale = min(grad_scale, 2.0**10)
    check_op(spec, case, torch.float16, backend, device, grad_scale=grad_scale)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_reference_gradients(spec: OpSpec, case: Case):
    inputs = spec.make_inputs(case, torch.float64, torch.device("cpu"), 0)
    leaves = inputs.mapped(lambda t: t.double().detach().requires_grad_(True))
    names, tensors = zip(*leaves.differentiable().items())

    def function(*args: torch.Tensor) -> torch.Tensor:
        return spec.reference(**(leaves.tensors | dict(zip(names, args))), **leaves.options)

    # Fast mode projects the Jacobian on random vectors: the cost does not grow with the number of elements.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize(("spec", "case", "backend"), FUSED_REPRESENTATIVE)
def test_same_bits_on_every_run(spec: OpSpec, case: Case, backend: str, device: str):
    inputs = spec.make_inputs(case, torch.float32, torch.device(device), 3)
    grad_out = random_grads(spec.reference(**inputs.tensors, **inputs.options), 0)
    runs = [run(lambda **kw: spec.function(**kw, backend=backend), inputs, grad_out) for _ in range(3)]
    for name in runs[0]:
        assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:]), name


@pytest.mark.parametrize(("spec", "case", "backend"), FUSED_REPRESENTATIVE)
def test_compiled_equals_eager(spec: OpSpec, case: Case, backend: str, device: str):
    inputs = spec.make_inputs(case, torch.float32, torch.device(device), 4)
    grad_out = random_grads(spec.reference(**inputs.tensors, **inputs.options), 0)

    def function(**kwargs: object) -> tuple[torch.Tensor, ...]:
        return tuple(out * 2.0 for out in outputs(spec.function(**kwargs, backend=backend)))

    eager = run(function, inputs, grad_out)
    torch._dynamo.reset()
    compiled = run(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs, grad_out)
    for name in eager:
        assert torch.equal(eager[name], compiled[name]), name


@pytest.mark.parametrize(("spec", "case", "backend"), FUSED_REPRESENTATIVE)
def test_explicit_backend_refuses_float64_and_auto_takes_the_reference(
    spec: OpSpec, case: Case, backend: str, device: str
):
    inputs = spec.make_inputs(case, torch.float64, torch.device(device), 6).mapped(lambda t: t.double())
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16; got torch\.float64"):
        spec.function(**inputs.tensors, **inputs.options, backend=backend)
    actual = outputs(spec.function(**inputs.tensors, **inputs.options))
    exact = outputs(spec.reference(**inputs.tensors, **inputs.options))
    for ours, theirs in zip(actual, exact):
        assert_within_budget(spec.name, ours, theirs, theirs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the thread count is the CPU's")
@pytest.mark.parametrize("case_of", ["one thread", "five threads"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_native_gives_the_same_bits_whatever_the_thread_count(spec: OpSpec, case_of: str):
    """Cases with several blocks of rows, heads or classes, which threads can divide."""
    threads = {"one thread": 1, "five threads": 5}[case_of]
    previous = torch.get_num_threads()
    for case in spec.cases[-6:]:
        inputs = spec.make_inputs(case, torch.bfloat16, torch.device("cpu"), 7)
        grad_out = random_grads(spec.reference(**inputs.tensors, **inputs.options), 0)
        results = []
        for count in (previous, threads):
            torch.set_num_threads(count)
            try:
                results.append(run(lambda **kw: spec.function(**kw, backend="native"), inputs, grad_out))
            finally:
                torch.set_num_threads(previous)
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), f"{case.name}: {name}"


def _op_calls(device: str, ops):
    """At least one call of every registered op, with arguments as the public functions pass them."""
    x = torch.randn(5, 33, device=device)
    w, b = torch.randn(33, device=device), torch.randn(33, device=device)
    mean, rstd = torch.randn(5, device=device), torch.rand(5, device=device)
    yield "layer_norm_forward", (x, w, b, 1e-5)
    yield "layer_norm_forward", (x.bfloat16(), None, None, 1e-5)
    yield "layer_norm_backward", (x, x, w, mean, rstd, True, True)
    yield "layer_norm_backward", (x, x, None, mean, rstd, False, False)
    y = x.softmax(-1)
    yield "softmax_forward", (x, -1, 0.5, False)
    yield "softmax_forward", (x.T, 0, 0.5, False)
    yield "softmax_backward", (x, y, -1, 0.5, True)
    q = torch.randn(2, 4, 19, 16, device=device)
    k, v = torch.randn(2, 2, 2, 23, 16, device=device)
    lengths = torch.tensor([23, 7], device=device)
    mask = torch.rand(2, 23, device=device) > 0.3
    plain = (None, None, None, None, None, 0, 0, True, None, 0.25, 0.0)
    yield "attention_forward", (q, k, v, *plain)
    yield "attention_forward", (q[:, :, :2], k, v, *plain)
    yield "attention_forward", (q.half(), k.half(), v.half(), *plain)
    masked = (lengths, mask, None, None, lengths, 0, 0, True, 9, 0.25, 0.1)
    cumulative = torch.tensor([0, 5, 19], device=device)
    packed = (None, None, cumulative, cumulative, None, 14, 14, False, None, 0.25, 0.0)
    for inputs, options in (((q, k, v), masked), ((q[:1], k[:1, :, :19], v[:1, :, :19]), packed)):
        out, statistics = ops.attention_forward(*inputs, *options)
        yield "attention_forward", (*inputs, *options)
        for grad_lse in (torch.ones_like(statistics[0]), None):
            yield "attention_backward", (out, grad_lse, *inputs, out, statistics, *options)
    angles = torch.randn(19, 5, device=device)
    for way in ("forward", "backward"):
        yield f"rotary_{way}", (q, angles, angles, False)
        yield f"rotary_{way}", (k.bfloat16(), mask.new_zeros(2, 23, 5).float(), mask.new_ones(2, 23, 5).float(), True)
    half = x.bfloat16()
    for name, statistics, parameters in (("layer", (mean, rstd), (w, b)), ("rms", (rstd,), (w,))):
        needs = (True,) * len(parameters)
        yield f"add_{name}_norm_forward", (half, x, *parameters, 1e-5)
        yield f"add_{name}_norm_backward", (half, x, x, w, *statistics, *needs, True)
        yield f"add_{name}_norm_backward", (x, None, x, w, *statistics, *needs, True)
    yield "rms_norm_forward", (half, None, 1e-5)
    yield "rms_norm_backward", (x, x, w, rstd, True)
    for dtype in (torch.float32, torch.bfloat16):
        few, many, matrix = (
            torch.randn(*shape, device=device, dtype=dtype) for shape in ((2, 3, 33), (20, 33), (7, 33))
        )
        yield "linear_forward", (few, matrix, matrix[:, 0])
        yield "linear_forward", (many, matrix, None)
        yield "linear_backward", (torch.randn(20, 7, device=device, dtype=dtype), many, matrix, True, True, True)
        yield "linear_backward", (torch.randn(20, 7, device=device, dtype=dtype), many, matrix, False, True, False)
    yield "gelu_forward", (half, b, True)
    yield "gelu_backward", (x, x, b, True, True)
    yield "gelu_backward", (x, x, None, False, False)
    yield "swiglu_forward", (x, x)
    yield "swiglu_backward", (x, x, x)
    target = torch.tensor([3, 0, -100, 32, 5], device=device)
    yield "cross_entropy_forward", (x, target, -100)
    yield "cross_entropy_backward", (x, target, rstd, -100)
    classes = torch.randn(40, 33, device=device)
    yield "linear_cross_entropy_forward", (x, classes, None, target, -100)
    yield "linear_cross_entropy_backward", (x, classes, classes[:, 0], target, rstd, -100, True, True, True)
    yield "linear_cross_entropy_backward", (x, classes, None, target, rstd, -100, True, False, False)


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend: str, device: str):
    called = set()
    ops = getattr(torch.ops, f"gptkernels_{backend}")
    gptkernels.softmax(torch.zeros(1, device=device), backend=backend)  # makes the backend ready
    names = torch._C._dispatch_get_all_op_names()
    mine = {n.split("::")[1] for n in names if n.startswith(f"gptkernels_{backend}::")} - {"multiplies"}
    for name, args in _op_calls(device, ops):
        if name in mine:
            torch.library.opcheck(getattr(ops, name), args)
            called.add(name)
    assert called == mine
