"""A residual sum and its norm in one pass: which sum is normalised, its gradients, and no effect across rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gptkernels import add_layer_norm, add_rms_norm, available_backends, layer_norm, rms_norm
from torch import Tensor

FUSED = [name for name in available_backends() if name != "reference"]
ADD_NORMS = {"layer": (add_layer_norm, layer_norm), "rms": (add_rms_norm, rms_norm)}
# Of the Triton kernels: rows held whole; taken by teams in the backward; in blocks in the forward too.
WHOLE, BLOCKS_BACKWARD, BLOCKS = 65, 9_000, 33_000

pytestmark = pytest.mark.parametrize("backend", FUSED)


def pairs(rows: int, columns: int, stream: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator).to(device, torch.bfloat16)
    return x, (4 * torch.randn(rows, columns, generator=generator)).to(device, stream)


@pytest.mark.parametrize("columns", [WHOLE, BLOCKS])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", ADD_NORMS)
def test_the_norm_is_that_of_the_rounded_sum(norm: str, stream: torch.dtype, columns: int, device: str, backend: str):
    """The sum is PyTorch's, and the returned sum is what is normalised, within half a unit in the last place."""
    both, alone = ADD_NORMS[norm]
    x, residual = pairs(3, columns, stream, device)
    normed, summed = both(x, residual, backend=backend)
    assert torch.equal(summed, (x + residual).to(stream))
    exact = alone(summed.double(), backend="reference")
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(normed.double(), exact, rtol=half_a_unit, atol=1e-5)  # float32's own errors: 1e-5


@pytest.mark.parametrize("columns", [WHOLE, BLOCKS_BACKWARD])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", ADD_NORMS)
def test_gradients_of_either_output_alone(norm: str, stream: torch.dtype, columns: int, device: str, backend: str):
    both, alone = ADD_NORMS[norm]
    x, residual = (t.requires_grad_() for t in pairs(3, columns, stream, device))
    grad = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    normed, summed = both(x, residual, backend=backend)
    of_sum = torch.autograd.grad(summed, (x, residual), grad.to(stream), retain_graph=True)
    assert [g.dtype for g in of_sum] == [torch.bfloat16, stream]
    assert all(torch.equal(g, grad.to(g.dtype)) for g in of_sum)  # a sum passes its gradient on, unchanged
    of_norm = torch.autograd.grad(normed, (x, residual), grad)
    leaf = summed.detach().requires_grad_()
    (expected,) = torch.autograd.grad(alone(leaf, backend=backend), leaf, grad.to(stream))
    torch.testing.assert_close(of_norm[1], expected)
    assert torch.equal(of_norm[0], of_norm[1].bfloat16())  # of one float32 value, rounded once


@pytest.mark.parametrize("norm", ADD_NORMS)
def test_gradients_that_are_not_needed(norm: str, device: str, backend: str):
    both, _ = ADD_NORMS[norm]
    x, residual = pairs(5, 65, torch.float32, device)
    weight = torch.randn(65, device=device, dtype=torch.float32)
    grads = torch.ones(5, 65, device=device).bfloat16(), torch.ones(5, 65, device=device)
    everything = [t.clone().requires_grad_() for t in (x, residual, weight)]
    full = torch.autograd.grad(both(*everything, backend=backend), everything, grads)
    for wanted in range(3):
        some = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, residual, weight))]
        (grad,) = torch.autograd.grad(both(*some, backend=backend), some[wanted], grads)
        torch.testing.assert_close(grad, full[wanted])


@pytest.mark.parametrize("columns", [WHOLE, BLOCKS_BACKWARD])
@pytest.mark.parametrize("norm", ["layer", "rms", "add-layer", "add-rms"])
def test_a_row_with_nan_or_infinity_keeps_it_to_itself(norm: str, columns: int, device: str, backend: str):
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(2)).to(device)
    bad = x.clone()
    bad[1, 3], bad[2, 5] = float("nan"), float("inf")
    both, alone = ADD_NORMS[norm.removeprefix("add-")]

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        function: Callable[..., Tensor] = lambda t: both(t, t, backend=backend)[0]  # noqa: E731
        out = function(leaf) if norm.startswith("add") else alone(leaf, backend=backend)
        return out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

    for good, spoilt in zip(of(x), of(bad)):
        assert torch.equal(good[[0, 3]], spoilt[[0, 3]])
        assert spoilt[1].isnan().all()
        assert not spoilt[2].isfinite().all()
