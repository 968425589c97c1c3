"""Layer normalisation's edge cases: large means, mixed dtypes, gradients that are not needed, layouts, and every error."""

from __future__ import annotations

import pytest
import torch
from gptkernels import available_backends, layer_norm
from gptkernels.layer_norm import reference
from gptkernels.layer_norm.spec import SPEC
from gptkernels.rms_norm import spec as rms_norm_spec
from gptkernels.testing import Case, OpSpec, check_op, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = list(available_backends())
FUSED = [name for name in BACKENDS if name != "reference"]


def test_reference_is_the_formula():
    x, w, b = torch.randn(5, 9, dtype=torch.float64), *torch.randn(2, 9, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * w + b
    torch.testing.assert_close(reference.layer_norm(x, w, b, 0.1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", [100, 20_000], ids=["block", "loop"])
def test_a_mean_far_above_the_spread(columns: int, device: str, backend: str):
    """E[x^2] - E[x]^2 would lose every digit here: a mean of 10,000 and a spread of 0.1."""
    x = 10_000 + 0.1 * torch.randn(4, columns, generator=torch.Generator().manual_seed(1)).to(device)
    exact = torch.nn.functional.layer_norm(x.double(), (columns,))
    out = layer_norm(x, backend=backend)
    # What remains is the rounding of the mean itself: at most one float32 unit of 10,000 (9.8e-4), against a spread of 0.1.
    assert float((out - exact).abs().max()) < 1e-2
    assert float(out.std()) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_decides_on_constant_rows(backend: str, device: str):
    x = torch.full((3, 33), 2.5, device=device, requires_grad=True)
    with poisoned_memory():
        out = layer_norm(x, backend=backend)
        (grad,) = torch.autograd.grad(out, x, torch.randn(3, 33, device=device))
    assert (out == 0).all()
    assert grad.isfinite().all()
    wide = layer_norm(torch.tensor([[1.0, -1.0]], device=device), eps=3.0, backend=backend)
    torch.testing.assert_close(wide, torch.tensor([[0.5, -0.5]], device=device))  # 1 / sqrt(1 + 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_weights_beside_bf16_activations(backend: str, device: str):
    """Autocast's normal case: the output is x's dtype, each gradient its parameter's."""
    x = torch.randn(40, 65, device=device).bfloat16().requires_grad_()
    w = torch.randn(65, device=device, requires_grad=True)
    b = torch.randn(65, device=device, dtype=torch.float16, requires_grad=True)
    out = layer_norm(x, w, b, backend=backend)
    grads = torch.autograd.grad(out.float().square().sum(), (x, w, b))
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype_of_x(backend: str, device: str):
    x = torch.randn(4, 33, device=device).bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer_norm(x, torch.ones(33, device=device), backend=backend).dtype == torch.bfloat16
        assert layer_norm(x.float(), torch.ones(33, device=device), backend=backend).dtype == torch.float32


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("columns", [65, 20_000], ids=["block", "loop"])
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_only_the_gradients_that_are_needed(columns: int, wanted: tuple[bool, ...], device: str, backend: str):
    tensors = [torch.randn(7, columns, device=device), *torch.randn(2, columns, device=device)]
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, wanted)]
    everything = [t.clone().requires_grad_() for t in tensors]
    grad_out = torch.randn(7, columns, device=device)
    layer_norm(*leaves, backend=backend).backward(grad_out)
    layer_norm(*everything, backend=backend).backward(grad_out)
    for leaf, full, need in zip(leaves, everything, wanted):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, full.grad, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_weight_gradient_of_many_rows_is_summed_in_float32(device: str, backend: str):
    """4,000 equal bf16 contributions: a bf16 accumulator would stop growing at 256."""
    x = torch.tensor([[1.0, -1.0]], device=device).bfloat16().repeat(4000, 1)
    weight = torch.ones(2, device=device, requires_grad=True)
    bias = torch.zeros(2, device=device, requires_grad=True)
    layer_norm(x, weight, bias, backend=backend).backward(torch.ones_like(x))
    torch.testing.assert_close(bias.grad, torch.full((2,), 4000.0, device=device), rtol=0, atol=0)
    torch.testing.assert_close(weight.grad, torch.tensor([4000.0, -4000.0], device=device), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
def test_empty(shape: tuple[int, ...], device: str, backend: str):
    x = torch.empty(shape, device=device, requires_grad=True)
    w = torch.ones(shape[-1], device=device, requires_grad=True)
    out = layer_norm(x, w, w.detach(), backend=backend)
    out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None
    assert w.grad is not None
    assert (w.grad == 0).all()


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weight=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(["contiguous", "slice"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_shape_within_the_error_budget(shape, weight, bias, layout, dtype, seed, device, backend: str):
    parameters = {"shape": shape, "weight": weight, "bias": bias, "parameter_dtype": torch.float32, "layout": layout}
    check_op(SPEC, Case("drawn", parameters), dtype, backend, device, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [SPEC, rms_norm_spec.ADD_SPEC], ids=lambda spec: spec.name)
def test_several_teams_share_long_rows(spec: OpSpec, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """A GPU has room for several teams of programs, each with a part of the column sums; the interpreter has room for one."""
    triton = pytest.importorskip("gptkernels._triton")
    larger = triton.Hardware(19, "interpreter")  # a team has 9 programs
    monkeypatch.setattr(triton, "_INTERPRETER", larger)
    case = next(case for case in spec.cases if "x8193" in case.name)
    x = torch.empty(case.parameters["shape"], dtype=dtype, device=device)
    grid, _ = triton.team_rows(larger, *case.parameters["shape"], x.itemsize, [x.stride(0)] * 2)
    assert grid == (9, 2)
    check_op(spec, case, dtype, "triton", device)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"x: got dtype torch\.int32", lambda: layer_norm(torch.ones(3, dtype=torch.int32))),
        (ValueError, r"x: got a tensor without dimensions", lambda: layer_norm(torch.tensor(1.0))),
        (ValueError, r"weight: got shape \(4,\); accepted here is \(3,\)", lambda: layer_norm(torch.ones(2, 3), torch.ones(4))),
        (ValueError, r"bias: got shape \(1, 3\)", lambda: layer_norm(torch.ones(2, 3), None, torch.ones(1, 3))),
        (TypeError, r"bias: got dtype torch\.int64", lambda: layer_norm(torch.ones(2, 3), None, torch.ones(3).long())),
        (ValueError, r"weight: is on meta", lambda: layer_norm(torch.ones(2, 3), torch.ones(3, device="meta"))),
        (ValueError, r"backend: got 'fast'; accepted are 'auto', 'reference', 'triton', 'native'",
         lambda: layer_norm(torch.ones(2, 3), backend="fast")),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, call):
    with pytest.raises(error, match=match):
        call()
