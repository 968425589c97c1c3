"""The Triton kernels on a GPU: real sizes, more than 2^31 elements, twenty runs, the compiler, CUDA graphs. ``pytest -m gpu``."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import gptkernels
import pytest
import torch
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, Case, Inputs, OpSpec, assert_within_budget, check_op, outputs, random_grads, run
from torch import Tensor

from bench.measure import CapturedGraph

pytestmark = pytest.mark.gpu

TRITON = [spec for spec in SPECS if "triton" in FUSED[spec.name]]
# Of a case's float32 inputs and outputs: the float64 result and its gradients take many times as much.
MOST_BYTES = 1.2e9
INT32 = 2**31


@pytest.fixture(autouse=True)
def _room() -> None:
    """Each test starts with the GPU's memory to itself."""
    gc.collect()
    torch.cuda.empty_cache()


def affordable(spec: OpSpec) -> list[Case]:
    return [case for case in spec.bench_cases if spec.cost(case, torch.float32).forward_bytes <= MOST_BYTES]


def smallest(spec: OpSpec) -> Case:
    return min(spec.bench_cases, key=lambda case: spec.cost(case, torch.float32).forward_bytes)


REAL_SIZES = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for spec in TRITON
    for case in affordable(spec)
    for dtype in (torch.bfloat16, torch.float32, torch.float16)
    if dtype != torch.float16 or case is smallest(spec)
]
each_op = pytest.mark.parametrize("spec", TRITON, ids=lambda spec: spec.name)


@pytest.mark.parametrize(("spec", "case", "dtype"), REAL_SIZES)
def test_real_sizes_within_the_error_budget(spec: OpSpec, case: Case, dtype: torch.dtype):
    check_op(spec, case, dtype, "triton", "cuda")


def prepared(spec: OpSpec, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Inputs, tuple[Tensor, ...]]:
    inputs = spec.make_inputs(smallest(spec), dtype, torch.device("cuda"), seed)
    return inputs, random_grads(spec.reference(**inputs.tensors, **inputs.options), seed)


@each_op
def test_same_bits_in_twenty_runs(spec: OpSpec):
    inputs, grads = prepared(spec)
    first = run(partial(spec.function, backend="triton"), inputs, grads)
    for _ in range(19):
        again = run(partial(spec.function, backend="triton"), inputs, grads)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


@each_op
def test_inductor_equals_eager(spec: OpSpec):
    torch._dynamo.reset()
    inputs, grads = prepared(spec)
    function = partial(spec.function, backend="triton")
    compiled = run(torch.compile(lambda **kwargs: function(**kwargs), fullgraph=True), inputs, grads)
    for name, value in run(function, inputs, grads).items():
        assert torch.equal(compiled[name], value), name


@each_op
def test_cuda_graph_replays_forward_and_backward(spec: OpSpec):
    """A graph captured with one set of inputs gives, after others are copied into the same memory, the results of those."""
    function = partial(spec.function, backend="triton")
    inputs, grads = prepared(spec)
    leaves = inputs.mapped(lambda t: t.detach().clone().requires_grad_())
    tensors = list(leaves.differentiable().values())

    def step() -> tuple[Tensor, ...]:
        outs = outputs(function(**leaves.tensors, **leaves.options))
        return *outs, *torch.autograd.grad(outs, tensors, [g.to(o.dtype) for g, o in zip(grads, outs)])

    replay = CapturedGraph(step)
    other, _ = prepared(spec, seed=1)
    with torch.no_grad():
        for leaf, new in zip(tensors, other.differentiable().values()):
            leaf.copy_(new)
    actuals = replay()
    torch.cuda.synchronize()
    for actual, expected in zip(actuals, step()):
        assert torch.equal(actual, expected)


def drawn(*shape: int) -> Tensor:
    """Random bfloat16 numbers, drawn on the GPU: billions of numbers from the CPU would take minutes."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def check_last(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: dict[str, Tensor],
    rows: tuple[slice, ...],
    shared: tuple[str, ...] = (),
) -> None:
    """Runs `function` on all of `tensors` and compares its results for the last `rows` with `reference` on those rows alone.

    The gradient of the output is zero in all other rows. Parameters (`shared`) then have the gradient of the last rows, and
    the input gradients of all other rows must be zero.
    """
    leaves = {name: t.requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    out = function(**leaves)
    if out.dim():
        grad_out = torch.zeros_like(out)
        last = drawn(*out[rows].shape).to(out.dtype)
        grad_out[rows] = last
    else:
        grad_out = last = torch.ones_like(out)
    names = [name for name, t in leaves.items() if t.requires_grad]
    grads = dict(zip(names, torch.autograd.grad(out, [leaves[name] for name in names], grad_out)))
    small = {name: t.detach() if name in shared else t.detach()[rows] for name, t in leaves.items()}

    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        copies = {n: t.to(dtype).requires_grad_() if t.is_floating_point() else t for n, t in small.items()}
        result = reference(**copies)
        found = torch.autograd.grad(result, [copies[name] for name in names], last.to(result.dtype))
        return {"out": result.detach(), **dict(zip(names, found))}

    plain, exact = alone(torch.bfloat16), alone(torch.float64)
    actual = {name: grad if name in shared else grad[rows] for name, grad in grads.items()}
    if out.dim():
        actual["out"] = out.detach()[rows]
        for name in set(names) - set(shared):
            assert int(torch.count_nonzero(grads[name])) == int(torch.count_nonzero(actual[name])), name
    for name, value in actual.items():
        assert_within_budget(name, value, plain[name], exact[name])


LAST_ROWS = (slice(-1, None), slice(-40, None))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "gelu", "swiglu"])
def test_rows_past_2_to_the_31(name: str):
    spec = next(spec for spec in SPECS if spec.name == name)
    shape = (16, 33_000, 4096)
    assert torch.Size(shape).numel() > INT32
    parameters = {"layer_norm": ("weight", "bias"), "rms_norm": ("weight",), "gelu": ("bias",)}.get(name, ())
    tensors = {"swiglu": ("gate", "up")}.get(name, ("x",))
    given = {n: drawn(*shape) for n in tensors} | {n: drawn(shape[-1]) for n in parameters}
    check_last(partial(spec.function, backend="triton"), spec.reference, given, LAST_ROWS, shared=parameters)


def test_long_rows_past_2_to_the_31():
    """Three rows of 700 million columns: the last one starts before and ends after 2^31 elements."""
    x = drawn(3, INT32 // 3 + 1_000)
    spec = next(spec for spec in SPECS if spec.name == "softmax")
    out = spec.function(x, backend="triton")
    for row in range(3):
        total = out[row].sum(dtype=torch.float64)
        assert abs(float(total) - 1) < 2**-8
        expected = torch.softmax(x[row].double(), -1)
        assert_within_budget("last columns", out[row, -999:], expected[-999:].bfloat16(), expected[-999:])


def test_cross_entropy_past_2_to_the_31():
    classes, tokens = 50_257, 2_800
    logits = drawn(16, tokens, classes)
    assert logits.numel() > INT32
    target = torch.randint(0, classes, (16, tokens), device="cuda")
    spec = next(spec for spec in SPECS if spec.name == "cross_entropy")
    tensors = {"logits": logits, "target": target}
    check_last(
        partial(spec.function, reduction="none", backend="triton"), partial(spec.reference, reduction="none"), tensors, LAST_ROWS
    )  # fmt: skip
    counted = torch.full_like(target, -100)
    counted[LAST_ROWS] = target[LAST_ROWS]
    (grad,) = torch.autograd.grad(spec.function(logits, counted, backend="triton"), logits)
    assert int(torch.count_nonzero(grad)) == int(torch.count_nonzero(grad[LAST_ROWS]))
    rows = logits.detach()[LAST_ROWS].flatten(0, 1)
    plain, exact = (rows.to(dtype, copy=True).requires_grad_() for dtype in (torch.bfloat16, torch.float64))
    for leaf in (plain, exact):
        torch.nn.functional.cross_entropy(leaf.double(), counted[LAST_ROWS].flatten()).backward()
    assert plain.grad is not None
    assert exact.grad is not None
    assert_within_budget("grad", grad[LAST_ROWS].flatten(0, 1), plain.grad, exact.grad)


@pytest.mark.parametrize("layout", ["heads", "packed"])
def test_attention_past_2_to_the_31(layout: str):
    """Sixteen sequences. "packed": strided slices of one projection, whose addresses reach three times as far."""
    batch, heads, tokens, head_dim = (16, 64, 16_500, 128) if layout == "heads" else (16, 32, 11_000, 128)
    if layout == "heads":
        query, key, value = (drawn(batch, heads, tokens, head_dim) for _ in range(3))
        assert query.numel() > INT32
    else:
        projection = drawn(batch, tokens, 3, heads, head_dim)
        assert projection.numel() > INT32
        query, key, value = projection.permute(2, 0, 3, 1, 4)
    last = (slice(-1, None), slice(-1, None))
    query, key, value = (t.detach().requires_grad_() for t in (query, key, value))
    out = gptkernels.attention(query, key, value, is_causal=True, backend="triton")
    grad_out = drawn(1, 1, tokens, head_dim)
    whole = torch.zeros_like(out)
    whole[last] = grad_out
    grads = torch.autograd.grad(out, (query, key, value), whole)
    del whole
    # The same kernels on the last head alone: heads and sequences are independent, so the bits are equal.
    small = [t.detach()[last].contiguous().requires_grad_() for t in (query, key, value)]
    alone = gptkernels.attention(*small, is_causal=True, backend="triton")
    assert torch.equal(out[last], alone)
    for name, grad, expected in zip(("query", "key", "value"), grads, torch.autograd.grad(alone, small, grad_out)):
        assert torch.equal(grad[last], expected), name
        assert int(torch.count_nonzero(grad)) == int(torch.count_nonzero(expected)), name


def test_rotary_past_2_to_the_31():
    spec = next(spec for spec in SPECS if spec.name == "rotary")
    batch, heads, tokens, head_dim = 16, 64, 16_500, 128
    angles = torch.arange(tokens, device="cuda")[:, None] * 10_000.0 ** -torch.arange(0, 1, 2 / head_dim, device="cuda")
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    last = (slice(-1, None), slice(-2, None))
    x = drawn(batch, heads, tokens, head_dim)
    assert x.numel() > INT32
    check_last(partial(spec.function, **tables, backend="triton"), partial(spec.reference, **tables), {"x": x}, last)
