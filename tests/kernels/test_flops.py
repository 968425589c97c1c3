"""What PyTorch's FlopCounterMode counts for the fused operations: what it counts for its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import gptkernels
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

FUSED = [name for name in gptkernels.available_backends() if name != "reference"]


def counted(call: Callable[..., Tensor], *leaves: Tensor) -> tuple[int, int]:
    """The operations of a call, and of its backward."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    with FlopCounterMode(display=False) as forward:
        out = call(*leaves)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), leaves)
    return forward.get_total_flops(), backward.get_total_flops()


def test_importing_the_counter_brings_the_formulas():
    """Either may be imported first; gptkernels itself imports neither the counter nor triton."""
    script = """
import sys, torch, gptkernels
assert not {"torch.utils.flop_counter", "triton"} & set(sys.modules)
from torch.utils.flop_counter import flop_registry
assert torch.ops.gptkernels_native.attention_forward in flop_registry
assert torch.ops.gptkernels_triton.linear_cross_entropy_backward in flop_registry
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", FUSED)
def test_attention_counts_as_pytorchs(backend: str, device: str):
    query = torch.randn(2, 4, 5, 16, device=device)
    key, value = torch.randn(2, 2, 2, 9, 16, device=device)
    shapes = query.shape, (2, 4, 9, 16), (2, 4, 9, 16)  # grouped heads save no products
    expected = sdpa_flop_count(*shapes), sdpa_backward_flop_count(query.shape, *shapes)
    attend = lambda q, k, v: gptkernels.attention(q, k, v, is_causal=True, backend=backend)  # noqa: E731
    assert counted(attend, query, key, value) == expected


@pytest.mark.parametrize("backend", FUSED)
def test_packed_attention_counts_each_sequence(backend: str, device: str):
    lengths = (5, 1, 7)
    cumulative = torch.tensor([0, 5, 6, 13], device=device)
    packed = torch.randn(3, 13, 2, 16, device=device)
    shapes = [(1, 2, length, 16) for length in lengths]
    expected = (
        sum(sdpa_flop_count(shape, shape, shape) for shape in shapes),
        sum(sdpa_backward_flop_count(shape, shape, shape, shape) for shape in shapes),
    )
    attend = lambda q, k, v: gptkernels.attention_varlen(q, k, v, cumulative, cumulative, 7, 7, backend=backend)  # noqa: E731
    assert counted(attend, *packed) == expected


@pytest.mark.parametrize("backend", FUSED)
def test_products_count_as_pytorchs(backend: str, device: str):
    x, weight = torch.randn(3, 16, device=device), torch.randn(7, 16, device=device)
    target = torch.tensor([0, 6, 3], device=device)
    linear = counted(lambda x, weight: gptkernels.linear(x, weight, backend=backend), x, weight)
    assert linear == counted(F.linear, x, weight)
    with_the_loss = counted(lambda x, w: gptkernels.linear_cross_entropy(x, w, target, backend=backend), x, weight)
    # All three products are the forward's; with "none" the logits are computed twice.
    assert with_the_loss == (sum(linear), 0)
    separate = counted(
        lambda x, w: gptkernels.linear_cross_entropy(x, w, target, reduction="none", backend=backend), x, weight
    )
    assert separate == (linear[0], sum(linear))
