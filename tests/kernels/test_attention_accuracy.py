"""Float32 attention errs no more than the textbook's formula, whatever the size of the scores and however few the keys."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from gptkernels import attention, available_backends
from gptkernels.attention import reference
from gptkernels.attention.options import Options
from gptkernels.testing import Inputs, assert_within_budget, poisoned_memory, random_grads, run
from torch import Tensor

FUSED = [name for name in available_backends() if name != "reference"]


Order = tuple[Tensor, Tensor]


def textbook(
    order: Order | None = None, *, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None = None,
    window: int | None = None, key_lengths: Tensor | None = None, key_mask: Tensor | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """Scores, softmax and product in plain PyTorch, with the sums over head_dim and over the keys in this `order`."""
    options = Options(is_causal=is_causal, key_lengths=key_lengths, key_mask=key_mask, window=window)
    visible = reference.visible_keys(query, key, options)
    back = slice(None)
    if order is not None:
        dims, keys = order
        query, key, value, back = (
            query[..., dims],
            key[..., keys, :][..., dims],
            value[..., keys, :][..., dims],
            dims.argsort(),
        )
        visible = visible if visible is None else visible[..., keys]
    out, lse = reference._explicit(query, key, value, visible, scale or query.shape[-1] ** -0.5, None, 1.0)
    return (out[..., back], lse) if return_lse else out[..., back]


def assert_as_good_as_the_textbook(inputs: Inputs, backend: str, what: object = "") -> None:
    """Compares output, log-sum-exp and gradients with float64.

    How far one sum lies off is luck, and a single pair of keys that are nearly level may decide a whole problem: the
    textbook's error is therefore its largest over several orders of its sums.
    """
    key = inputs.tensors["key"]
    assert key is not None
    generator = torch.Generator().manual_seed(0)

    def shuffled(count: int) -> Tensor:
        return torch.randperm(count, generator=generator).to(key.device)

    orders = [None, *((shuffled(key.shape[3]), shuffled(key.shape[2])) for _ in range(8))]
    grads = random_grads(textbook(**inputs.tensors, **inputs.options), seed=1)
    exact = run(textbook, inputs.mapped(lambda x: x.double()), tuple(grad.double() for grad in grads))
    plain = [run(partial(textbook, order), inputs, grads) for order in orders]
    with poisoned_memory():
        actual = run(partial(attention, backend=backend), inputs, grads)
    for name, value in actual.items():
        errors = [(one[name].double() - exact[name]).abs().nan_to_num(0.0).max() for one in plain]
        assert_within_budget(f"{name} of {what}", value, plain[0][name], exact[name], float(max(errors)))


def problem(seed: int, amplitude: float, device: str) -> tuple[Inputs, dict[str, Any]]:
    """A random problem: one to three keys in every other one, else up to a hundred; grouped heads, masks, windows."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    keys = draw.choice([draw.randint(1, 3), draw.randint(4, 100)])
    queries = draw.choice([1, 2, draw.randint(1, 40)])
    batch, kv_heads, head_dim = draw.randint(1, 2), draw.randint(1, 2), draw.choice([3, 8, 16, 40, 64])
    is_causal, mask = draw.random() < 0.5, draw.choice(["none", "none", "lengths", "random"])
    options = {
        "is_causal": is_causal,
        "scale": draw.uniform(0.3, 1.0),
        "window": draw.randint(1, keys + 2) if is_causal and draw.random() < 0.4 else None,
        "return_lse": draw.random() < 0.4,
    }
    query = torch.randn(batch, kv_heads * draw.randint(1, 2), queries, head_dim, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, keys, head_dim, generator=generator)
    tensors = {"query": amplitude * query, "key": draw.choice([1.0, amplitude]) * key, "value": value}
    if mask == "lengths":
        tensors["key_lengths"] = torch.randint(keys + 1, (batch,), generator=generator)
    if mask == "random":
        tensors["key_mask"] = torch.rand(batch, keys, generator=generator) < draw.choice([0.1, 0.6])
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    inputs = Inputs({name: x.to(device) for name, x in tensors.items()}, options)
    return inputs, {"seed": seed, "amplitude": amplitude} | shapes | options


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("amplitude", [1.0, 6.0, 30.0])
def test_random_problems(amplitude: float, backend: str, device: str):
    for seed in range(100, 140 if backend == "native" else 112):
        inputs, what = problem(seed, amplitude, device)
        assert_as_good_as_the_textbook(inputs, backend, what)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("is_causal", [False, True])
def test_pytorchs_sample_inputs(is_causal: bool, backend: str, device: str):
    """Those of `scaled_dot_product_attention` in PyTorch's own tests: numbers from -9 to 9, few queries, few keys."""
    for shape in ((4, 4), (4, 1)):  # batch and heads
        query, key, value = (
            torch.testing.make_tensor(*shape, tokens, 8, device=device, dtype=torch.float32) for tokens in (3, 6, 6)
        )
        if is_causal:  # PyTorch aligns top-left: query i sees keys up to i, and none the last three
            key, value = key[:, :, :3], value[:, :, :3]
        tensors: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
        assert_as_good_as_the_textbook(Inputs(tensors, {"is_causal": is_causal}), backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("amplitude", [1.0, 6.0, 30.0])
@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("keys", [1, 5])
def test_a_lone_key_weighs_one_whatever_its_score(keys: int, queries: int, amplitude: float, backend: str, device: str):
    """A lone key's weight does not depend on query or key, rounded or not: their gradients are exactly 0."""
    generator = torch.Generator().manual_seed(0)
    query = amplitude * torch.randn(1, 4, queries, 40, generator=generator).to(device)
    key, value = (amplitude * torch.randn(1, 2, keys, 40, generator=generator).to(device) for _ in range(2))
    grad_out = torch.randn(1, 4, queries, 40, generator=generator).to(device)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = attention(*leaves, scale=0.7, key_lengths=torch.tensor([1], device=device), backend=backend)
    assert torch.equal(out, value[:, :, :1].repeat_interleave(2, dim=1).expand_as(out))
    grad_query, grad_key, grad_value = torch.autograd.grad(out, leaves, grad_out)
    assert not grad_query.any()
    assert not grad_key.any()
    expected = grad_out.double().sum(2, keepdim=True).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(grad_value[:, :, :1].double(), expected, rtol=1e-5, atol=1e-5)
