"""Rotary embedding's properties: the rotation, layouts, partial and per-sequence tables, errors."""

from __future__ import annotations

import gptkernels
import pytest
import torch
from gptkernels import available_backends, rotary
from gptkernels.rotary import reference
from gptkernels.testing import assert_within_budget, poisoned_memory

BACKENDS = list(available_backends())
FUSED = [name for name in BACKENDS if name != "reference"]
PAIRING = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(
    positions: torch.Tensor, rotated: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions (..., T): (..., T, rotated / 2)."""
    frequencies = 10_000.0 ** -(torch.arange(0, rotated, 2, device=positions.device).double() / rotated)
    angles = positions.double()[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def as_complex(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.complex(a.contiguous(), b.contiguous())


@PAIRING
def test_reference_is_multiplication_by_a_complex_exponential(interleaved: bool):
    x = torch.randn(2, 3, 9, 16, dtype=torch.float64)
    angles = torch.rand(9, 8, dtype=torch.float64) * 100
    out = reference.rotary(x, angles.cos(), angles.sin(), interleaved)
    expected = as_complex(x, interleaved) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(as_complex(out, interleaved), expected, rtol=1e-12, atol=1e-12)


@PAIRING
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_turn_back_gives_x_again(backend: str, interleaved: bool, dtype: torch.dtype, device: str):
    x = torch.randn(2, 4, 13, 32, device=device).to(dtype)
    cos, sin = tables(torch.arange(13, device=device), 32)

    def there_and_back(name: str) -> torch.Tensor:
        return rotary(rotary(x, cos, sin, interleaved, backend=name), cos, -sin, interleaved, backend=name)

    assert_within_budget("x", there_and_back(backend), there_and_back("reference"), x.double())


@PAIRING
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_the_distance_alone(backend: str, interleaved: bool, device: str):
    """The same query and key at every position: every diagonal of their scores is constant, and no two are alike."""
    query, key = torch.randn(2, 1, 1, 1, 64, device=device).expand(2, 1, 1, 12, 64)
    cos, sin = tables(torch.arange(12, device=device), 64)
    q, k = (rotary(t, cos, sin, interleaved, backend=backend) for t in (query, key))
    scores = (q.double() @ k.double().transpose(-1, -2))[0, 0]
    diagonals = [scores.diagonal(distance) for distance in range(-11, 12)]
    for diagonal in diagonals:
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5)
    firsts = torch.stack([diagonal[0] for diagonal in diagonals]).sort().values
    assert float(firsts.diff().min()) > 1e-4


@PAIRING
@pytest.mark.parametrize("backend", FUSED)
def test_dimensions_beyond_the_rotated_are_the_same_bits(backend: str, interleaved: bool, device: str):
    x = torch.randn(2, 3, 7, 40, device=device, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = tables(torch.arange(7, device=device), 24, torch.bfloat16)
    with poisoned_memory():
        out = rotary(x, cos, sin, interleaved, backend=backend)
    assert torch.equal(out[..., 24:], x[..., 24:])
    alone = rotary(x[..., :24], cos, sin, interleaved, backend=backend)
    assert torch.equal(out[..., :24], alone)
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, grad_out)
    assert torch.equal(grad[..., 24:], grad_out[..., 24:])


@PAIRING
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_has_its_own_positions(backend: str, interleaved: bool, device: str):
    """In a left-padded batch, a sequence's result is the same as without padding."""
    x = torch.randn(3, 2, 9, 16, device=device, requires_grad=True)
    padding = torch.tensor([0, 4, 8], device=device)
    positions = (torch.arange(9, device=device) - padding[:, None]).clamp(min=0)
    out = rotary(x, *tables(positions, 16), interleaved, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    for b, pad in enumerate(padding.tolist()):
        alone = x[b : b + 1, :, pad:].detach().requires_grad_()
        expected = rotary(alone, *tables(torch.arange(9 - pad, device=device), 16), interleaved, backend=backend)
        torch.testing.assert_close(out[b : b + 1, :, pad:], expected, rtol=0, atol=0)
        (expected_grad,) = torch.autograd.grad(expected.sum(), alone)
        torch.testing.assert_close(grad[b : b + 1, :, pad:], expected_grad, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_of_one_sequence_serves_all(backend: str, device: str):
    x = torch.randn(3, 2, 5, 8, device=device)
    cos, sin = tables(torch.arange(5, device=device), 8)
    expected = rotary(x, cos, sin, backend=backend)
    assert torch.equal(rotary(x, cos[None], sin[None], backend=backend), expected)
    own = rotary(x, cos.expand(3, 5, 4), sin.expand(3, 5, 4), backend=backend)
    assert torch.equal(own, expected)


@PAIRING
@pytest.mark.parametrize("backend", FUSED)
def test_any_layout_gives_the_same_bits(backend: str, interleaved: bool, device: str):
    packed = torch.randn(2, 11, 3, 4, 24, device=device)
    x = packed[:, :, 1].transpose(1, 2)  # (B, H, T, D)
    wide = torch.randn(11, 40, device=device)
    cos, sin = wide[:, 3:15], wide[:, 20:32]
    expected = rotary(x.contiguous(), cos.contiguous(), sin.contiguous(), interleaved, backend=backend)
    layouts = {
        "slice of a packed projection": (x, cos, sin),
        "head_dim not adjacent": (x.mT.contiguous().mT, cos, sin),
        "tokens reversed in memory order": (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), cos, sin),
        "angles not adjacent": (x, cos.T.contiguous().T, sin),
    }
    for name, arguments in layouts.items():
        with poisoned_memory():
            out = rotary(*arguments, interleaved, backend=backend)
        assert torch.equal(out, expected), name
        assert out.transpose(1, 2).is_contiguous(), name
    one_head = x[:, :1].expand(2, 4, 11, 24)  # stride 0
    assert torch.equal(
        rotary(one_head, cos, sin, interleaved, backend=backend),
        rotary(x[:, :1], cos, sin, interleaved, backend=backend).expand(2, 4, 11, 24),
    )


@pytest.mark.parametrize("backend", FUSED)
def test_query_and_key_side_by_side_are_turned_by_one_call(backend: str, device: str):
    heads, kv_heads = 6, 2
    packed = torch.randn(2, 9, heads + 2 * kv_heads, 16, device=device, requires_grad=True)
    cos, sin = tables(torch.arange(9, device=device), 16)
    both = rotary(packed[:, :, : heads + kv_heads].transpose(1, 2), cos, sin, backend=backend)
    query, key, _ = packed.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    apart = torch.cat([rotary(t, cos, sin, backend=backend) for t in (query, key)], dim=1)
    assert torch.equal(both, apart)
    weights = torch.randn_like(both)
    grads = [torch.autograd.grad((out * weights).sum(), packed)[0] for out in (both, apart)]
    assert torch.equal(*grads)


@PAIRING
@pytest.mark.parametrize("backend", FUSED)
def test_an_expanded_gradient(backend: str, interleaved: bool, device: str):
    """The gradient of a sum has stride 0."""
    x = torch.randn(2, 3, 5, 8, device=device, requires_grad=True)
    cos, sin = tables(torch.arange(5, device=device), 8)
    grads = [
        torch.autograd.grad(rotary(x, cos, sin, interleaved, backend=name).sum(), x)[0]
        for name in (backend, "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_the_backward_keeps_the_tables_alone(backend: str, device: str):
    x = torch.randn(2, 3, 5, 8, device=device, requires_grad=True)
    cos, sin = tables(torch.arange(5, device=device), 8)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(x, cos, sin, backend=backend)
    assert [t.data_ptr() for t in saved] == [cos.data_ptr(), sin.data_ptr()]


@PAIRING
@pytest.mark.parametrize("backend", FUSED)
def test_infinities_and_nan_stay_in_their_pair(backend: str, interleaved: bool, device: str):
    x = torch.randn(1, 2, 3, 16, device=device)
    x[0, 0, 1, 2], x[0, 1, 2, 5] = torch.inf, torch.nan
    cos, sin = tables(torch.arange(3, device=device), 16)
    out = rotary(x, cos, sin, interleaved, backend=backend)
    plain = rotary(x, cos, sin, interleaved, backend="reference")
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert int((~out.isfinite()).sum()) == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype(backend: str, dtype: torch.dtype, device: str):
    x = torch.randn(2, 3, 5, 8, device=device).to(dtype)
    cos, sin = tables(torch.arange(5, device=device), 8)
    expected = rotary(x, cos, sin, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        out = rotary(x, cos, sin, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", FUSED)
def test_compiled_once_for_changing_lengths(backend: str, device: str):
    """As in decoding and in batches of varying shape: only the second length is compiled again, as a symbol."""

    from torch._dynamo.testing import CompileCounterWithBackend

    def function(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotary(x.transpose(1, 2), cos, sin, backend=backend).transpose(1, 2).flatten(2) * 2.0

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch, tokens in ((2, 5), (3, 7), (4, 11), (5, 6)):
        x = torch.randn(batch, tokens, 4, 16, device=device, requires_grad=True)
        angles = tables(torch.arange(tokens, device=device), 16)
        outs = [f(x, *angles) for f in (function, compiled)]
        assert torch.equal(*outs)
        weights = torch.randn_like(outs[0])
        assert torch.equal(*(torch.autograd.grad(out, x, weights)[0] for out in outs))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_hugging_faces_llama(backend: str, device: str):
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    query, key = torch.randn(2, 7, 4, 32, device=device).transpose(1, 2), torch.randn(2, 2, 7, 32, device=device)
    config = LlamaConfig(hidden_size=128, num_attention_heads=4)
    cos, sin = LlamaRotaryEmbedding(config).to(device)(query, torch.arange(7, device=device)[None] + 3)
    for theirs, x in zip(apply_rotary_pos_emb(query, key, cos, sin), (query, key)):
        ours = rotary(x, cos[..., :16], sin[..., :16], backend=backend)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_hugging_faces_gptj(backend: str, device: str):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x = torch.randn(2, 7, 4, 16, device=device)  # GPT-J rotates before it transposes
    cos, sin = tables(torch.arange(7, device=device).expand(2, 7), 16)
    theirs = apply_rotary_pos_emb(x, sin, cos).transpose(1, 2)
    torch.testing.assert_close(rotary(x.transpose(1, 2), cos, sin, True, backend=backend), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_more_than_2_to_the_31_elements(interleaved: bool):
    x = torch.randn(2, 70_000, 128, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    cos, sin = tables(torch.arange(70_000, device="cuda"), 128)
    out = rotary(x, cos, sin, interleaved, backend="triton")
    last = x[-1:, -2:, -5:], cos[-5:], sin[-5:], interleaved
    exact = reference.rotary(last[0].double(), *last[1:])
    assert_within_budget("last tokens", out[-1:, -2:, -5:], reference.rotary(*last), exact)


X, TABLE = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
LEARNT = torch.randn(5, 4, requires_grad=True)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"x: got dtype torch\.int64", lambda: rotary(X.long(), TABLE, TABLE)),
        (ValueError, r"x: got shape \(3, 5, 8\); accepted is \(batch, heads, ", lambda: rotary(X[0], TABLE, TABLE)),
        (TypeError, r"cos: got NoneType; accepted is a floating", lambda: rotary(X, None, TABLE)),  # type: ignore[arg-type]
        (ValueError, r"cos: got shape \(4, 4\); accepted is \(5, R/2\) or \(2, 5, R/2\)", lambda: rotary(X, TABLE[:4], TABLE)),
        (ValueError, r"cos: got shape \(3, 5, 4\); accepted is", lambda: rotary(X, TABLE.expand(3, 5, 4), TABLE)),
        (ValueError, r"cos: got shape \(4,\); accepted is", lambda: rotary(X, TABLE[0], TABLE[0])),
        (ValueError, r"cos: got 8 angles .* are 1 to 4.*pass its first half", lambda: rotary(X, TABLE.repeat(1, 2), TABLE)),
        (ValueError, r"cos: got 4 angles .* are 1 to 3, .* of x's 7", lambda: rotary(X[..., :7], TABLE, TABLE)),
        (ValueError, r"cos: got 0 angles a token", lambda: rotary(X, TABLE[:, :0], TABLE[:, :0])),
        (ValueError, r"sin: got shape \(5, 3\); accepted here is \(5, 4\)", lambda: rotary(X, TABLE, TABLE[:, :3])),
        (TypeError, r"sin: got dtype torch\.float64; accepted are x's dtype", lambda: rotary(X, TABLE, TABLE.double())),
        (TypeError, r"cos: got dtype torch\.bfloat16; accepted are x's", lambda: rotary(X, TABLE.bfloat16(), TABLE)),
        (TypeError, r"sin: got dtype torch\.float32; accepted is cos's", lambda: rotary(X.half(), TABLE.half(), TABLE)),
        (ValueError, r"cos: is on meta; accepted is x's device, cpu", lambda: rotary(X, TABLE.to("meta"), TABLE)),
        (ValueError, r"sin: requires a gradient, .*sin\.detach\(\)", lambda: rotary(X, TABLE, LEARNT)),
        (ValueError, r"backend: got 'cuda'", lambda: rotary(X, TABLE, TABLE, backend="cuda")),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, call):
    with pytest.raises(error, match=match):
        call()


def test_tables_that_are_learnt_serve_where_nothing_is_recorded():
    with torch.no_grad():
        assert torch.equal(gptkernels.rotary(X, LEARNT, LEARNT), gptkernels.rotary(X, LEARNT.detach(), LEARNT.detach()))
