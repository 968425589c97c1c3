"""Attention's edge cases: masks, alignment, layouts, infinities, sizes, and every error."""

from __future__ import annotations

import math

import pytest
import torch
from gptkernels import attention, available_backends, causal_attention, softmax
from gptkernels.attention import reference
from gptkernels.attention.spec import SPEC
from gptkernels.testing import Case, assert_within_budget, check_op, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = list(available_backends())
FUSED = [name for name in BACKENDS if name != "reference"]


def qkv(*shape: int, kv: tuple[int, ...] | None = None, seed: int = 0, device: str = "cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(shape, generator=g)
    k, v = torch.randn(2, *(kv or shape), generator=g)
    return tuple(x.to(device, dtype) for x in (q, k, v))


def textbook(q, k, v, visible=None, scale=None):
    """softmax(QK^T) V in float64, step by step."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def test_reference_is_the_textbook_formula():
    q, k, v = qkv(2, 4, 9, 8, kv=(2, 2, 13, 8))
    causal = torch.ones(9, 13, dtype=torch.bool).tril(13 - 9)
    lengths = torch.tensor([13, 5])
    inside = (torch.arange(13) < lengths[:, None])[:, None, None]
    d = [x.double() for x in (q, k, v)]
    exact = {
        "full": (textbook(q, k, v), reference.attention(*d)),
        "causal": (textbook(q, k, v, causal), reference.attention(*d, is_causal=True)),
        "lengths": (
            textbook(q, k, v, causal & inside),
            reference.attention(*d, is_causal=True, key_lengths=lengths),
        ),
        "scale": (textbook(q, k, v, scale=0.7), reference.attention(*d, scale=0.7)),
    }
    for name, (expected, actual) in exact.items():
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_is_aligned_bottom_right(backend: str, device: str):
    """With more keys than queries (a cache), the last query sees every key; the first query keys - queries + 1."""
    q, k, v = qkv(1, 1, 3, 16, kv=(1, 1, 70, 16), device=device)
    out = causal_attention(q, k, v, backend=backend)
    for i in range(3):
        alone = attention(q[:, :, i : i + 1], k[:, :, : 68 + i], v[:, :, : 68 + i], backend=backend)
        torch.testing.assert_close(out[:, :, i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_give_zeros_and_zero_gradients(backend: str, device: str):
    q, k, v = (x.requires_grad_() for x in qkv(2, 1, 40, 16, kv=(2, 1, 33, 16), device=device))
    lengths = torch.tensor([33, 0], device=device)
    with poisoned_memory():
        out = causal_attention(q, k, v, key_lengths=lengths, backend=backend)
        grads = torch.autograd.grad(out.square().sum() + out.sum(), (q, k, v))
    assert (out[0, :, :7] == 0).all()  # 40 - 33 queries stand before the first key
    assert (out[0, :, 7:] != 0).all()
    assert (out[1] == 0).all()
    assert (grads[0][0, :, :7] == 0).all()
    assert all((g[1] == 0).all() and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_read(backend: str, device: str):
    """Whatever is stored beyond key_lengths, even NaN, does not reach outputs or gradients."""
    q, k, v = qkv(2, 2, 20, 16, device=device)
    lengths = torch.tensor([20, 11], device=device)
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    dirty = [x.clone() for x in (q, k, v)]
    if backend != "reference":
        for x in dirty[1:]:
            x[1, :, 11:] = math.nan
    else:  # PyTorch multiplies masked probabilities, which are 0, with whatever is there
        for x in dirty[1:]:
            x[1, :, 11:] = 1e3
    dirty = [x.requires_grad_() for x in dirty]
    outs = [attention(*x, key_lengths=lengths, backend=backend) for x in (clean, dirty)]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    weight = torch.randn_like(outs[0])
    grads = [torch.autograd.grad(o, x, weight) for o, x in zip(outs, (clean, dirty))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_equals_the_unpadded_sequence(backend: str, device: str):
    q, k, v = qkv(1, 2, 21, 16, device=device)
    pad = [torch.cat([torch.full((1, 2, 12, 16), 9.0, device=device), x], dim=2) for x in (q, k, v)]
    mask = torch.arange(33, device=device)[None] >= 12
    out = causal_attention(*pad, key_mask=mask, backend=backend)
    torch.testing.assert_close(out[:, :, 12:], causal_attention(q, k, v, backend=backend), rtol=1e-5, atol=1e-6)
    assert (out[:, :, :12] == 0).all()


def test_slices_of_a_packed_projection_are_not_copied(device: str):
    from gptkernels.attention import triton as launchers

    packed = torch.randn(2, 19, 3 * 4 * 16, device=device)
    q, k, v = packed.view(2, 19, 3, 4, 16).permute(2, 0, 3, 1, 4)
    assert all(launchers._readable(x) is x for x in (q, k, v))
    out = causal_attention(q, k, v, backend="triton")
    merged = out.transpose(1, 2).reshape(2, 19, 64)
    assert merged.data_ptr() == out.data_ptr()
    plain = causal_attention(*(x.contiguous() for x in (q, k, v)), backend="reference")
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_tokens_farther_apart_than_32_bits_reach(device: str, backend: str):
    """A tile's rows times the stride of its tokens exceed 2**31. A few pages of these 10 GB of addresses are accessed."""
    tokens, stride = 12, 2**28
    base = 2**31  # what lies before it is read if an offset wraps around: zeros
    storage = torch.empty(base + (tokens - 1) * stride + 64, dtype=torch.bfloat16, device=device)
    far = [storage.as_strided((1, 1, tokens, 16), (64, 16, stride, 1), base + 16 * i) for i in range(4)]
    near = (*qkv(1, 1, tokens, 16, device=device, dtype=torch.bfloat16), torch.ones_like(far[0]))
    results = []
    for tensors in (near, [x.copy_(y) for x, y in zip(far, near)]):
        *leaves, grad_out = (x.detach().requires_grad_() for x in tensors)
        out = causal_attention(*leaves, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad_out)))
    for actual, expected in zip(*results):
        assert torch.equal(actual, expected)
    exact = textbook(*near[:3], torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril())
    plain = causal_attention(*near[:3], backend="reference")
    assert_within_budget("out", results[1][0], plain, exact)


@pytest.mark.parametrize("backend", FUSED)
def test_large_scores_neither_overflow_nor_lose_the_row(device: str, backend: str):
    q, k, v = qkv(1, 1, 40, 16, device=device)
    out = attention(q * 1e4, k * 1e4, v, backend=backend)
    winner = (q.double() @ k.double().transpose(-2, -1)).argmax(-1)[0, 0]
    torch.testing.assert_close(out[0, 0], v[0, 0, winner])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_a_common_shift_of_the_scores_cancels(shift: float, device: str, backend: str):
    """Scores far from zero on both sides: the online maximum keeps every exponent small."""
    q = torch.zeros(1, 1, 40, 16, device=device)
    q[..., 0] = 1.0
    k, v = torch.randn(2, 1, 1, 40, 16, device=device)
    k[..., 0] = shift
    out = attention(q, k, v, backend=backend, scale=1.0)
    torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand_as(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("bad", ["query", "key"])
def test_nan_reaches_what_it_should(bad: str, device: str, backend: str):
    tensors = dict(zip(("query", "key", "value"), qkv(1, 1, 40, 16, device=device)))
    tensors[bad][0, 0, 30, 3] = math.nan
    out = causal_attention(**tensors, backend=backend)
    assert out[0, 0, :30].isfinite().all()  # earlier queries do not see token 30
    assert out[0, 0, 30].isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16), (2, 2, 5, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(shape: tuple[int, ...], backend: str, device: str):
    q, k, v = (x.requires_grad_() for x in qkv(*shape, device=device))
    out = attention(q, k, v, backend=backend)
    out.sum().backward()
    assert out.shape == shape
    assert all(x.grad is not None and x.grad.shape == shape for x in (q, k, v))


@pytest.mark.parametrize("backend", FUSED)
def test_no_keys_at_all_give_zeros(device: str, backend: str):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 5, 16, kv=(1, 2, 0, 16), device=device))
    with poisoned_memory():
        out = attention(q, k, v, backend=backend)
        out.sum().backward()
    assert (out == 0).all()
    assert (q.grad == 0).all()


@pytest.mark.parametrize("backend", FUSED)
def test_expanded_gradient_and_single_leaf(device: str, backend: str):
    """The gradient of .sum() has stride 0 everywhere; and only one of the leaves may need a gradient."""
    q, k, v = qkv(1, 2, 33, 16, device=device)
    for index in range(3):
        leaves = [x.clone() for x in (q, k, v)]
        leaves[index].requires_grad_()
        causal_attention(*leaves, backend=backend).sum().backward()
        expected = [x.double() for x in (q, k, v)]
        expected[index].requires_grad_()
        causal_attention(*expected, backend="reference").sum().backward()
        torch.testing.assert_close(leaves[index].grad.double(), expected[index].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_equals_softmax_of_scores(device: str, backend: str):
    """Fused attention, and products around softmax(causal=True), give the same result."""
    q, k, v = qkv(1, 2, 37, 16, device=device)
    explicit = softmax(q @ k.transpose(-2, -1), scale=0.25, causal=True, backend=backend) @ v
    fused = causal_attention(q, k, v, backend=backend)
    exact = textbook(q, k, v, torch.ones(37, 37, dtype=torch.bool).tril())
    assert_within_budget("out", fused, explicit, exact)


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_casts_like_pytorch(device: str, backend: str):
    q, k, v = qkv(1, 2, 9, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = causal_attention(q, k.bfloat16(), v, backend=backend)
        plain = torch.nn.functional.scaled_dot_product_attention(q, k.bfloat16(), v, is_causal=True)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    queries=st.integers(1, 50),
    keys=st.integers(2, 50),  # of one key alone plain PyTorch's gradient is exactly 0: a budget of nothing
    head_dim=st.integers(1, 40),
    is_causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(2, 60)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_odd_shapes(
    heads, queries: int, keys: int, head_dim: int, is_causal: bool, window: int | None, dtype: torch.dtype, backend: str
):
    batch, kv_heads, group = heads
    parameters = {
        "batch": batch,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "queries": queries,
        "keys": keys,
        "head_dim": head_dim,
        "is_causal": is_causal,
        "scale": None,
        "lengths": tuple(range(keys, keys - batch, -1)),
        "left_padding": None,
        "window": window if is_causal else None,
        "dropout_p": 0.0,
        "return_lse": False,
        "layout": "contiguous",
    }
    check_op(SPEC, Case("drawn", parameters), dtype, backend, "cuda" if torch.cuda.is_available() else "cpu")


Q = torch.zeros(2, 4, 8, 16)
REFUSALS = {
    "rank": (ValueError, r"query: got shape \(8, 16\); accepted is \(batch, heads, tokens, head_dim\)", {"query": Q[0, 0]}),
    "head_dim": (ValueError, "head_dim 257; accepted is at most 256", {n: torch.zeros(1, 1, 2, 257) for n in ("query", "key", "value")}),  # noqa: E501
    "heads": (ValueError, "key: got 3 heads; accepted are counts that divide query's 4", {"key": Q[:, :3], "value": Q[:, :3]}),
    "no kv heads": (ValueError, "key: got 0 heads", {"key": Q[:, :0], "value": Q[:, :0]}),
    "batch": (ValueError, r"key: got shape \(1, 4, 8, 16\); accepted is \(batch 2,", {"key": Q[:1]}),
    "value": (ValueError, r"value: got shape \(2, 4, 8, 8\)", {"value": Q[..., :8]}),
    "dtype": (TypeError, r"key: got dtype torch\.float16; accepted is query's dtype, torch\.float32", {"key": Q.half()}),
    "integers": (TypeError, r"query: got dtype torch\.int64; accepted are floating-point", {"query": Q.long()}),
    "not a tensor": (TypeError, "value: got list", {"value": [1.0]}),
    "device": (ValueError, "key: is on meta; accepted is query's device, cpu", {"key": Q.to("meta")}),
    "negative dropout": (ValueError, r"dropout_p: got -0\.1; accepted are probabilities", {"dropout_p": -0.1}),
    "dropout over 1": (ValueError, r"dropout_p: got 1\.5; accepted are probabilities", {"dropout_p": 1.5}),
    "seed's dtype": (TypeError, r"dropout_seed: got dtype torch\.int32; accepted is int64", {"dropout_p": 0.1, "dropout_seed": torch.ones(2, dtype=torch.int32)}),  # noqa: E501
    "seed's shape": (ValueError, r"dropout_seed: got shape \(4,\); accepted here is \(2,\)", {"dropout_seed": torch.ones(4, dtype=torch.long)}),  # noqa: E501
    "window without causality": (ValueError, "window: got 4 with is_causal=False; accepted is a window of causal", {"window": 4}),
    "empty window": (ValueError, "window: got 0; accepted are counts of keys from 1 on", {"window": 0, "is_causal": True}),
    "negative scale": (ValueError, r"scale: got -1\.0; accepted are positive", {"scale": -1.0}),
    "nan scale": (ValueError, "scale: got nan", {"scale": math.nan}),
    "lengths' shape": (ValueError, r"key_lengths: got shape \(3,\); accepted here is \(2,\)", {"key_lengths": torch.tensor([1, 2, 3])}),  # noqa: E501
    "lengths' dtype": (TypeError, r"key_lengths: got dtype torch\.float32", {"key_lengths": torch.ones(2)}),
    "mask's dtype": (TypeError, r"key_mask: got dtype torch\.int64; accepted is bool", {"key_mask": torch.ones(2, 8, dtype=torch.long)}),  # noqa: E501
    "mask's shape": (ValueError, r"key_mask: got shape \(2, 4\); accepted here is \(2, 8\)", {"key_mask": torch.ones(2, 4, dtype=torch.bool)}),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(("error", "message", "arguments"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(error: type[Exception], message: str, arguments: dict, backend: str | None):
    with pytest.raises(error, match=message):
        attention(**{"query": Q, "key": Q, "value": Q, "backend": backend} | arguments)
