"""linear: which product runs when, and the native product in every case."""

from __future__ import annotations

import gptkernels
import pytest
import torch
import torch.nn.functional as F
from gptkernels import _native
from gptkernels.linear.api import FEW_ROWS
from gptkernels.testing import SPECS, Case, assert_within_budget, check_op

SPEC = next(spec for spec in SPECS if spec.name == "linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_our_products_are_within_the_budget(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The native product is tested also where PyTorch's would be chosen, since other CPUs choose differently."""
    monkeypatch.setattr(_native, "multiplies", lambda dtype: False)
    check_op(SPEC, case, dtype, "native")


def test_many_float32_rows_are_pytorchs_own_product():
    x, weight, bias = torch.randn(FEW_ROWS + 1, 40), torch.randn(24, 40), torch.randn(24)
    assert torch.equal(gptkernels.linear(x, weight, bias), F.linear(x, weight, bias))
    weight.requires_grad_()
    assert "Linear" not in str(gptkernels.linear(x, weight, bias).grad_fn)
    few = gptkernels.linear(x[:FEW_ROWS], weight, bias, backend="native")
    assert "LinearFunction" in str(few.grad_fn)


def test_few_rows_give_the_same_bits_whatever_the_thread_count():
    """Large enough for several threads, and with an odd row where rows of the weight go in pairs."""
    x = torch.randn(4, 3072, dtype=torch.bfloat16)
    weight = torch.randn(101, 3072, dtype=torch.bfloat16)
    whole = gptkernels.linear(x, weight, backend="native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(gptkernels.linear(x, weight, backend="native"), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [3, 50])
def test_autocast_multiplies_in_its_dtype_and_keeps_the_weights_gradient_in_float32(
    rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_native, "multiplies", lambda dtype: dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(48, 64, generator=generator, requires_grad=True)
    bias = torch.randn(48, generator=generator, requires_grad=True)
    grad_out = torch.randn(rows, 48, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = gptkernels.linear(x, weight, bias, backend="native")
        plain = F.linear(x, weight, bias)
    assert ours.dtype == torch.bfloat16
    exact_x, exact_weight = x.bfloat16().double(), weight.detach().bfloat16().double()
    exact = exact_x @ exact_weight.T + bias.detach().bfloat16().double()
    assert_within_budget("out", ours, plain, exact)
    grads = torch.autograd.grad(ours, (weight, bias), grad_out)
    plains = torch.autograd.grad(plain, (weight, bias), grad_out)
    exacts = (grad_out.double().T @ exact_x, grad_out.double().sum(0))
    for name, grad, plain_grad, exact_grad in zip(("weight", "bias"), grads, plains, exacts):
        assert_within_budget(name, grad, plain_grad, exact_grad)
    # A product rounded to bfloat16 errs by 2e-3; ours was float32 all the way.
    torch.testing.assert_close(grads[0].double(), exacts[0], rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"weight: got shape \(3, 4\); accepted is \(N, 5\)"):
        gptkernels.linear(x, weight[:, :4])
    with pytest.raises(ValueError, match=r"bias: got shape \(2,\); accepted here is \(3,\)"):
        gptkernels.linear(x, weight, torch.zeros(2))
    with pytest.raises(TypeError, match=r"weight: got dtype torch.bfloat16; accepted is x's dtype, torch.float32"):
        gptkernels.linear(x, weight.bfloat16())
    with pytest.raises(TypeError, match=r"x: got dtype torch\.int64"):
        gptkernels.linear(x.long(), weight)
