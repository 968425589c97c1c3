"""Softmax's edge cases: rows without a finite score, infinities, causal alignment, dimensions, layouts, and every error."""

from __future__ import annotations

import math

import pytest
import torch
from gptkernels import available_backends, softmax
from gptkernels.softmax import reference
from gptkernels.softmax.spec import SPEC
from gptkernels.testing import Case, assert_within_budget, check_op, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = list(available_backends())
FUSED = [name for name in BACKENDS if name != "reference"]


def test_reference_is_the_formula():
    x = torch.randn(3, 4, 9, dtype=torch.float64)
    for dim in (0, 1, 2, -2):
        e = (0.7 * x).exp()
        torch.testing.assert_close(
            reference.softmax(x, dim, scale=0.7), e / e.sum(dim, keepdim=True), rtol=1e-13, atol=0
        )
    kept = torch.ones(4, 9, dtype=torch.bool).tril(5)  # bottom-right aligned
    e = x.exp() * kept
    torch.testing.assert_close(reference.softmax(x, causal=True), e / e.sum(-1, keepdim=True), rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [9, 40_000], ids=["block", "loop"])
def test_rows_without_a_finite_score_give_zeros_and_no_gradient(backend: str, columns: int, device: str):
    x = torch.randn(3, columns, device=device)
    x[1] = -math.inf
    x[2, 1:] = -math.inf
    x.requires_grad_()
    with poisoned_memory():
        y = softmax(x, backend=backend)
        (grad,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert (y[1] == 0).all()
    assert y[2, 0] == 1.0
    assert (y[2, 1:] == 0).all()
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("columns", "dim"), [(9, -1), (40_000, -1), (70, 0)], ids=["block", "loop", "strided"])
def test_nan_and_plus_infinity_spoil_their_row_only(backend: str, columns: int, dim: int, device: str):
    x = torch.randn(3, columns, device=device)
    x[0, 4] = math.nan
    x[1, 5] = math.inf
    y = softmax(x if dim == -1 else x.T.contiguous(), dim, backend=backend)
    y = y if dim == -1 else y.T
    assert y[0].isnan().all()
    assert y[1, 5].isnan()
    assert abs(float(y[2].sum()) - 1) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str, device: str):
    x = torch.tensor([[60_000.0, 59_999.0, -60_000.0]], device=device)
    expected = torch.tensor([[1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1)), 0.0]], device=device)
    torch.testing.assert_close(softmax(x, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_does_not_overflow_float16(backend: str, device: str):
    x = torch.tensor([[6e4, 5.9999e4, -6e4]], device=device, dtype=torch.float16, requires_grad=True)
    grad_out = torch.randn(1, 3, device=device, dtype=torch.float16)
    wide = x.detach().double().requires_grad_()
    y, expected = softmax(x, scale=2.0, backend=backend), (2.0 * wide).softmax(-1)
    torch.testing.assert_close(y, expected.half())
    (grad,), (expected,) = torch.autograd.grad(y, x, grad_out), torch.autograd.grad(expected, wide, grad_out.double())
    torch.testing.assert_close(grad, expected.half())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, -1])
def test_a_tensor_without_dimensions(dim: int, backend: str, device: str):
    x = torch.tensor(3.0, device=device, requires_grad=True)
    y = softmax(x, dim, scale=2.0, backend=backend)
    y.backward()
    assert (y.shape, y.item(), float(x.grad)) == ((), 1.0, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 5, 5), (2, 3, 8), (2, 8, 3)])
def test_causal_keeps_each_querys_keys(backend: str, shape: tuple[int, int, int], device: str):
    x = torch.randn(shape, device=device)
    y = softmax(x, causal=True, backend=backend)
    queries, keys = shape[-2:]
    for i in range(queries):
        kept = max(i + 1 + keys - queries, 0)
        assert (y[:, i, kept:] == 0).all()
        if kept:
            torch.testing.assert_close(y[:, i, :kept], x[:, i, :kept].softmax(-1))


def test_causal_does_not_read_the_future(device: str):
    """Whatever is stored above the diagonal, even NaN, has no effect, forward and backward."""
    x = torch.randn(2, 6, 6, device=device)
    future = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)
    spoilt = x.masked_fill(future, math.nan).requires_grad_()
    x.requires_grad_()
    for backend in BACKENDS:
        y, z = (softmax(t, causal=True, backend=backend) for t in (x, spoilt))
        assert torch.equal(y, z)
        grads = [torch.autograd.grad(out.square().sum(), t)[0] for out, t in ((y, x), (z, spoilt))]
        assert torch.equal(*grads)
        assert (grads[0].masked_select(future) == 0).all()


@pytest.mark.parametrize("backend", FUSED)
def test_common_rounding_of_the_output_leaves_the_gradient(device: str, backend: str):
    """In bfloat16 the saved output sums to 1 only within 1e-3; a gradient that is large and equal must still give none."""
    torch.manual_seed(0)
    x = torch.randn(8, 500, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = softmax(x, backend=backend)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 1024.0))
    plain_y = torch.softmax(x, -1)
    (plain,) = torch.autograd.grad(plain_y, x, torch.full_like(y, 1024.0))
    assert float(grad.abs().max()) <= 1e-3 * 1024 / 500
    assert float(plain.abs().max()) > float(grad.abs().max())


@pytest.mark.parametrize("backend", FUSED)
def test_an_expanded_gradient(device: str, backend: str):
    """The gradient of a sum has stride 0."""
    x = torch.randn(4, 50, device=device, requires_grad=True)
    weights = torch.randn(50, device=device)
    (expected,) = torch.autograd.grad(x.softmax(-1), x, weights.expand(4, 50))
    (actual,) = torch.autograd.grad(softmax(x, backend=backend), x, weights.expand(4, 50))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    dim=st.integers(0, 3),
    scale=st.floats(0.01, 5),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_shape_within_the_error_budget(shape, dim, scale, causal, dtype, seed, device, backend: str):
    causal = causal and len(shape) > 1
    dim = -1 if causal else dim % len(shape)
    parameters = {"shape": shape, "dim": dim, "scale": scale, "causal": causal, "layout": "contiguous"}
    check_op(SPEC, Case("drawn", parameters), dtype, backend, device, seed)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    y = softmax(x, backend="triton")
    last = x[-2:].float().softmax(-1)
    assert_within_budget("last rows", y[-2:], x[-2:].softmax(-1), last.double())


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"x: got dtype torch\.int64", lambda: softmax(torch.ones(3, dtype=torch.int64))),
        (TypeError, r"x: got list", lambda: softmax([1.0, 2.0])),  # type: ignore[arg-type]
        (ValueError, r"dim: got 1; accepted here are -1 to 0", lambda: softmax(torch.tensor(1.0), 1)),
        (ValueError, r"x: got shape \(\); with causal=True", lambda: softmax(torch.tensor(1.0), causal=True)),
        (ValueError, r"dim: got 2; accepted here are -2 to 1", lambda: softmax(torch.ones(3, 4), 2)),
        (ValueError, r"dim: got -3; accepted here are -2 to 1", lambda: softmax(torch.ones(3, 4), -3)),
        (ValueError, r"scale: got 0\.0; accepted are positive", lambda: softmax(torch.ones(3), scale=0.0)),
        (ValueError, r"scale: got inf", lambda: softmax(torch.ones(3), scale=math.inf)),
        (ValueError, r"scale: got nan", lambda: softmax(torch.ones(3), scale=math.nan)),
        (ValueError, r"x: got shape \(3,\); with causal=True", lambda: softmax(torch.ones(3), causal=True)),
        (ValueError, r"dim: got 0; with causal=True accepted is the last, 1", lambda: softmax(torch.ones(3, 3), 0, causal=True)),
        (ValueError, r"backend: got 'cuda'", lambda: softmax(torch.ones(3), backend="cuda")),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, call):
    with pytest.raises(error, match=match):
        call()
