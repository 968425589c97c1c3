"""The activations' edge cases: very large and small numbers, layouts read in place, and the sums of the bias's gradient."""

from __future__ import annotations

import pytest
import torch
from gptkernels import available_backends, gelu, swiglu
from gptkernels.testing import poisoned_memory
from torch.nn import functional as F

FUSED = [name for name in available_backends() if name != "reference"]
FORMS = pytest.mark.parametrize("approximate", ["tanh", "none"])


@FORMS
@pytest.mark.parametrize("backend", FUSED)
def test_gelu_far_out(approximate: str, backend: str, device: str):
    """Where exponentials overflow the function is z or 0, and its slope 1 or 0; NaN stays NaN."""
    far = torch.tensor([11.0, 30.0, 100.0, 1e4, 1e9, 1e15, 3e38], device=device)
    x = torch.cat([far, -far, torch.tensor([float("nan"), float("inf")], device=device)]).requires_grad_()
    out = gelu(x, approximate=approximate, backend=backend)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(out[:14], torch.cat([far, 0 * far]), rtol=0, atol=1e-20)
    torch.testing.assert_close(grad[:14], torch.tensor([1.0] * 7 + [0.0] * 7, device=device), rtol=0, atol=1e-6)
    assert out[14].isnan()
    assert grad[14].isnan()
    assert out[15] == float("inf")


@pytest.mark.parametrize("backend", FUSED)
def test_swiglu_far_out(backend: str, device: str):
    far = torch.tensor([100.0, 1e4, 1e9, 3e38], device=device)
    gate = torch.cat([far, -far, torch.tensor([float("nan")], device=device)]).requires_grad_()
    up = torch.full((9,), 0.5, device=device, requires_grad=True)
    out = swiglu(gate, up, backend=backend)
    grad_gate, grad_up = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
    torch.testing.assert_close(out[:8], torch.cat([0.5 * far, 0 * far]), rtol=1e-6, atol=1e-20)
    torch.testing.assert_close(grad_gate[:8], torch.tensor([0.5] * 4 + [0.0] * 4, device=device), rtol=0, atol=1e-20)
    torch.testing.assert_close(grad_up[:8], torch.cat([far, 0 * far]), rtol=1e-6, atol=1e-20)
    assert out[8].isnan()
    assert grad_gate[8].isnan()


@FORMS
@pytest.mark.parametrize("backend", FUSED)
def test_bias_gradient_of_many_rows_is_summed_in_float32(approximate: str, backend: str, device: str):
    """600 rows of slope 1: a bf16 accumulator would stop growing at 256, and a row counted twice would show."""
    x = torch.full((600, 3), 50.0, device=device).bfloat16().requires_grad_()
    bias = torch.zeros(3, device=device, requires_grad=True)
    out = gelu(x, bias, approximate, backend=backend)
    torch.testing.assert_close(out, x, rtol=0, atol=0)
    _, grad = torch.autograd.grad(out, (x, bias), torch.ones_like(out))
    assert torch.equal(grad, torch.full((3,), 600.0, device=device))


@pytest.mark.parametrize("backend", FUSED)
def test_halves_of_a_projection_are_read_in_place(backend: str, device: str, monkeypatch: pytest.MonkeyPatch):
    def copied(self: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        assert self.is_contiguous(), "a strided input was copied"
        return self

    both = torch.randn(9, 2 * 48, device=device)
    gate, up = both.chunk(2, dim=-1)
    expected = F.silu(gate) * up, F.gelu(gate, approximate="tanh")
    with monkeypatch.context() as patch, poisoned_memory():
        patch.setattr(torch.Tensor, "contiguous", copied)
        ours = swiglu(gate, up, backend=backend), gelu(gate, backend=backend)
    for out, want in zip(ours, expected):
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize("backend", FUSED)
def test_gelu_with_a_bias_that_needs_no_gradient(backend: str, device: str):
    x = torch.randn(9, 65, device=device, requires_grad=True)
    bias = torch.randn(65, device=device)
    (grad,) = torch.autograd.grad(gelu(x, bias, backend=backend).square().sum(), x)
    z = (x + bias).detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(z, approximate="tanh").square().sum(), z)
    torch.testing.assert_close(grad, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", available_backends())
def test_tensors_without_dimensions(backend: str, device: str):
    x, up = (torch.tensor(value, device=device, requires_grad=True) for value in (0.7, -1.3))
    results = [
        (out, *torch.autograd.grad(out, (x, up), allow_unused=True))
        for out in (
            gelu(x, approximate="none", backend=backend),
            F.gelu(x),
            swiglu(x, up, backend=backend),
            F.silu(x) * up,
        )
    ]
    for ours, theirs in (results[:2], results[2:]):
        torch.testing.assert_close(ours, theirs)
