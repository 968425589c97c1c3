"""Attention's options: dropout, sliding window, log-sum-exp, packed batches, and the kernel for few queries."""

from __future__ import annotations

import math

import pytest
import torch
from gptkernels import attention, attention_dropout_mask, attention_varlen, available_backends
from gptkernels.attention import dropout
from gptkernels.attention.options import Options
from gptkernels.testing import assert_within_budget, poisoned_memory
from torch._subclasses import FakeTensorMode

BACKENDS = list(available_backends())
FUSED = [name for name in BACKENDS if name != "reference"]


def draw(*shape: int, count: int = 3, seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(count)]


# ---- dropout: the mask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (2**32 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_gives_its_authors_known_answers(number: int, words: tuple[int, ...]):
    """The test vectors of Random123 for seven rounds of Philox4x32; all bits of counter and key are 0, or all are 1."""
    counter = torch.tensor(number)
    key = torch.tensor(-1 if number else 0)
    assert tuple(int(word) for word in dropout._philox(key, (counter,) * 4)) == words


def test_the_mask_keeps_the_right_share_and_no_two_rows_alike():
    seed = torch.tensor([3, 4])
    for p in (0.1, 0.5, 0.9):
        mask = attention_dropout_mask(seed, heads=3, queries=64, keys=200, dropout_p=p)
        share, deviation = mask.float().mean().item(), math.sqrt(p * (1 - p) / mask.numel())
        assert abs(share - (1 - p)) < 5 * deviation
        # As often as independent rows would: by sequence, by head, by query, by key, and by neighbour within eight keys.
        agree = 1 - 2 * p * (1 - p)
        pairs = [
            (mask[0], mask[1]),
            (mask[:, 0], mask[:, 1]),
            (mask[:, :, 1:], mask[:, :, :-1]),
            (mask[..., 1:], mask[..., :-1]),
            (mask[..., 8:], mask[..., :-8]),
            (mask[..., :64], mask[..., :64].transpose(-2, -1)),
        ]
        for index, (one, other) in enumerate(pairs):
            observed = (one == other).float().mean().item()
            assert abs(observed - agree) < 6 * math.sqrt(agree * (1 - agree) / one.numel()), index


def test_the_mask_is_a_function_of_seed_head_and_position_alone():
    seed = torch.tensor([11, 22, 33])
    whole = attention_dropout_mask(seed, 4, 20, 37, 0.3)
    assert torch.equal(attention_dropout_mask(seed[1:], 4, 20, 37, 0.3), whole[1:])
    assert torch.equal(attention_dropout_mask(seed, 2, 9, 21, 0.3), whole[:, :2, :9, :21])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_weights_are_dropped_where_the_public_mask_says(backend: str, kv_heads: int, device: str):
    """With unit vectors as values, the output is the weights."""
    queries, keys, p = 45, 40, 0.4
    q, k = draw(2, 4, queries, 64, count=1, device=device)[0], draw(2, kv_heads, keys, 64, count=1, device=device)[0]
    v = torch.eye(keys, 64, device=device).expand(2, kv_heads, keys, 64)
    seed = torch.tensor([5, 2**62], device=device)
    out = attention(q, k, v, dropout_p=p, dropout_seed=seed, backend=backend)[..., :keys]
    kept = attention_dropout_mask(seed, 4, queries, keys, p)
    weights = attention(q.double(), k.double(), v.double(), backend="reference")[..., :keys]
    assert torch.equal(out != 0, kept)
    expected = torch.where(kept, weights * dropout.rescale(p), 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", FUSED)
def test_dropout_does_not_depend_on_the_batch(backend: str, device: str):
    """A sequence has the same bits alone as in a batch: data-parallel training changes nothing."""
    q, k, v = draw(3, 2, 40, 16, device=device)
    seed = torch.tensor([1, 2, 3], device=device)
    options = {"is_causal": True, "dropout_p": 0.5, "backend": backend}
    whole = attention(q, k, v, dropout_seed=seed, **options)
    alone = attention(q[1:2], k[1:2], v[1:2], dropout_seed=seed[1:2], **options)
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_are_drawn_from_the_generator(backend: str, device: str):
    q, k, v = draw(2, 2, 20, 16, device=device)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(attention(q, k, v, dropout_p=0.5, backend=backend))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    attention(q, k, v, backend=backend)
    assert torch.equal(before, torch.get_rng_state())  # without dropout nothing is drawn


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropping_everything_gives_zeros(backend: str, device: str):
    leaves = [x.requires_grad_() for x in draw(1, 2, 20, 16, device=device)]
    out = attention(*leaves, is_causal=True, dropout_p=1.0, backend=backend)
    out.sum().backward()
    assert (out == 0).all()
    assert all((x.grad == 0).all() for x in leaves)


@pytest.mark.parametrize("backend", FUSED)
def test_a_probability_below_the_resolution_drops_nothing(backend: str, device: str):
    q, k, v = draw(1, 2, 20, 16, device=device)
    assert torch.equal(attention(q, k, v, dropout_p=1e-6, backend=backend), attention(q, k, v, backend=backend))


# ---- window -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 5, 60])
def test_a_window_is_the_last_keys_up_to_the_query(backend: str, queries: int, device: str):
    keys, window = 60, 7
    q, k, v = draw(1, 2, keys, 16, device=device)
    out = attention(q[:, :, -queries:], k, v, is_causal=True, window=window, backend=backend)
    for i in (0, queries // 2, queries - 1):
        at = keys - queries + i
        seen = slice(max(at - window + 1, 0), at + 1)
        alone = attention(q[:, :, at : at + 1], k[:, :, seen], v[:, :, seen], backend="reference")
        torch.testing.assert_close(out[:, :, i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_a_wide_window_is_none(backend: str, device: str):
    q, k, v = draw(1, 2, 50, 16, device=device)
    options = {"is_causal": True, "backend": backend}
    torch.testing.assert_close(attention(q, k, v, window=50, **options), attention(q, k, v, **options))


@pytest.mark.parametrize("backend", FUSED)
def test_keys_outside_every_window_are_not_even_read(backend: str, device: str):
    """They are skipped: NaN there would otherwise spread (0 * NaN)."""
    q, k, v = draw(1, 1, 200, 16, device=device)
    query, grad_out = q[:, :, -12:].clone().requires_grad_(), torch.ones_like(q[:, :, -12:])
    for poisoned in (k, v):
        poisoned[:, :, :100] = math.nan
    leaves = [query, k.requires_grad_(), v.requires_grad_()]
    out = attention(*leaves, is_causal=True, window=5, backend=backend)
    grads = torch.autograd.grad(out, leaves, grad_out)
    assert out.isfinite().all()
    assert grads[0].isfinite().all()
    assert all((grad[:, :, :100] == 0).all() and (grad[:, :, -5:] != 0).any() for grad in grads[1:])


# ---- log-sum-exp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_the_keys_are_joined_by_their_log_sum_exp(backend: str, device: str):
    """The log-sum-exp joins attention over parts of the keys, on several devices for example."""
    leaves = [x.requires_grad_() for x in draw(2, 2, 21, 16, device=device)]
    q, k, v = leaves
    grad_out = draw(2, 2, 21, 16, count=1, seed=9, device=device)[0]
    parts = [attention(q, k[:, :, s], v[:, :, s], return_lse=True, backend=backend) for s in (slice(9), slice(9, 21))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    joined = sum(out * (lse - total).exp()[..., None] for out, lse in parts)
    whole = attention(q, k, v, backend=backend)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(joined, leaves, grad_out), torch.autograd.grad(whole, leaves, grad_out)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_sum_exp_of_nothing_is_minus_infinity(backend: str, device: str):
    leaves = [x.requires_grad_() for x in draw(2, 2, 12, 16, device=device)]
    lengths = torch.tensor([12, 0], device=device)
    _, lse = attention(*leaves, key_lengths=lengths, return_lse=True, backend=backend)
    assert (lse[1] == -math.inf).all()
    grads = torch.autograd.grad(lse[0].sum(), leaves, materialize_grads=True)  # of the log-sum-exp alone
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][0].abs().sum() > 0
    assert (grads[2] == 0).all()  # it does not depend on the values


# ---- packed batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_packed_batch_is_each_sequence_alone(backend: str, is_causal: bool, device: str):
    lengths_q, lengths_k = (40, 0, 1, 23), (40, 5, 30, 9)
    cu_q, cu_k = (torch.tensor((0, *lengths)).cumsum(0).int().to(device) for lengths in (lengths_q, lengths_k))
    query = draw(sum(lengths_q), 4, 16, count=1, device=device)[0]
    key, value = draw(sum(lengths_k), 2, 16, count=2, seed=1, device=device)
    seed = torch.tensor([7, 8, 9, 10], device=device)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    grad_out = draw(sum(lengths_q), 4, 16, count=1, seed=2, device=device)[0]
    options = {"is_causal": is_causal, "dropout_p": 0.25, "window": 20 if is_causal else None, "backend": backend}
    with poisoned_memory():
        packed, lse = attention_varlen(*leaves, cu_q, cu_k, 40, 40, dropout_seed=seed, return_lse=True, **options)
        grads = torch.autograd.grad(packed, leaves, grad_out)
    for s in range(4):
        rows, columns = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
        alone = [x.detach()[r].transpose(0, 1)[None].requires_grad_() for x, r in zip(leaves, (rows, columns, columns))]
        out, own_lse = attention(*alone, dropout_seed=seed[s : s + 1], return_lse=True, **options)
        torch.testing.assert_close(packed[rows], out[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[:, rows], own_lse[0], rtol=1e-5, atol=1e-6)
        own = torch.autograd.grad(out, alone, grad_out[rows].transpose(0, 1)[None])
        for grad, expected, r in zip(grads, own, (rows, columns, columns)):
            torch.testing.assert_close(grad[r], expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


class Packed(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: torch.Tensor, cumulative: torch.Tensor) -> torch.Tensor:
        return attention_varlen(x, x, x, cumulative, cumulative, 6, 6, is_causal=True, backend=self.backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_batch_of_tensors_without_data(backend: str, dtype: torch.dtype):
    """torch.export and tools that plan memory ask only for shapes and dtypes: no length is read."""
    with FakeTensorMode():
        query, key, value = (torch.zeros(10, 2, 16, dtype=dtype).requires_grad_() for _ in range(3))
        cumulative = torch.zeros(3, dtype=torch.int32)
        arguments = (query, key, value, cumulative, cumulative, 6, 6)
        out, lse = attention_varlen(*arguments, dropout_p=0.1, return_lse=True, backend=backend)
        grads = torch.autograd.grad((out, lse), (query, key, value), (out, lse))
    assert (out.shape, out.dtype) == (query.shape, dtype)
    assert (lse.shape, lse.dtype) == ((2, 10), torch.float32)
    assert all((grad.shape, grad.dtype) == (query.shape, dtype) for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_batch_exported_and_compiled(backend: str):
    x, cumulative = draw(10, 2, 16, count=1)[0], torch.tensor([0, 4, 10])
    module = Packed(backend)
    exported = torch.export.export(module, (x, cumulative)).module()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in (cumulative, torch.tensor([0, 6, 10])):
        assert torch.equal(exported(x, lengths), module(x, lengths))
        assert torch.equal(compiled(x, lengths), module(x, lengths))


X = torch.zeros(10, 2, 16)
CU = torch.tensor([0, 4, 10], dtype=torch.int32)
PACKED = {
    "query": X,
    "key": X,
    "value": X,
    "cu_seqlens_q": CU,
    "cu_seqlens_k": CU,
    "max_seqlen_q": 6,
    "max_seqlen_k": 6,
}
PACKED_REFUSALS = {
    "start": (ValueError, r"cu_seqlens_q: got \[1, 4, 10\]; accepted are lengths added up from 0 to the 10 tokens", {"cu_seqlens_q": CU.clamp(min=1)}),  # noqa: E501
    "end": (ValueError, r"cu_seqlens_k: got \[0, 4, 9\]; accepted are lengths added up from 0 to the 10", {"cu_seqlens_k": CU.clamp(max=9)}),  # noqa: E501
    "order": (ValueError, r"cu_seqlens_q: got \[0, 11, 10\]", {"cu_seqlens_q": torch.tensor([0, 11, 10])}),
    "counts": (ValueError, "cu_seqlens_k: got 2 numbers; accepted are as many as cu_seqlens_q has, 3", {"cu_seqlens_k": CU[[0, 2]], "max_seqlen_k": 10}),  # noqa: E501
    "longest": (ValueError, "max_seqlen_q: got 5; accepted is at least the longest sequence, 6", {"max_seqlen_q": 5}),
    "dtype": (TypeError, r"cu_seqlens_q: got torch\.float32; accepted are int32 and int64", {"cu_seqlens_q": CU.float()}),
    "rank": (ValueError, r"cu_seqlens_k: got shape \(1, 3\); accepted is \(sequences \+ 1,\)", {"cu_seqlens_k": CU[None]}),
    "padded": (ValueError, r"query: got shape \(1, 10, 2, 16\); accepted is \(tokens, heads, head_dim\)", {"query": X[None]}),
    "seeds": (ValueError, r"dropout_seed: got shape \(10,\); accepted here is \(2,\)", {"dropout_seed": torch.zeros(10, dtype=torch.long)}),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments"), PACKED_REFUSALS.values(), ids=PACKED_REFUSALS.keys())
def test_refusals_of_a_packed_batch(error: type[Exception], message: str, arguments: dict):
    with pytest.raises(error, match=message):
        attention_varlen(**PACKED | arguments)


# ---- few queries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_give_what_many_do(backend: str, dtype: torch.dtype, device: str):
    """The kernel for few queries splits the keys over programs. It is compared with the last rows of the other kernel."""
    q, k, v = (x.to(dtype) for x in draw(2, 4, 150, 16, device=device))
    k, v = k[:, :2], v[:, :2]
    options = {"is_causal": True, "key_lengths": torch.tensor([150, 140], device=device), "return_lse": True}
    exact = attention(q.double(), k.double(), v.double(), **options)
    many = attention(q, k, v, backend=backend, **options)
    for queries in (1, 3):
        few = attention(q[:, :, -queries:], k, v, backend=backend, **options)
        for name, ours, theirs, truth in zip(("out", "lse"), few, many, exact):
            assert_within_budget(name, ours, theirs[:, :, -queries:], truth[:, :, -queries:].double())


# ---- from the public function to a kernel -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_options_are_the_last_arguments_of_the_ops(backend: str, direction: str):
    schema = getattr(getattr(torch.ops, f"gptkernels_{backend}"), f"attention_{direction}").default._schema
    assert tuple(argument.name for argument in schema.arguments)[-len(Options._fields) :] == Options._fields


def test_an_architecture_with_kernels_of_its_own_takes_those(device: str, monkeypatch: pytest.MonkeyPatch):
    from gptkernels._triton import hardware
    from gptkernels.attention import triton as launchers

    seen = []

    def watched(launcher):
        def run(*arguments):
            seen.append(arguments[-1])
            return launcher(*arguments)

        return run

    own = launchers.Launchers(*map(watched, launchers.LAUNCHERS["any"]))
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 9, 16, device=device))
    for arch, calls in ((hardware(q).arch, 2), ("another", 0)):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setitem(launchers.LAUNCHERS, arch, own)
            attention(q, k, v, is_causal=True, window=3, backend="triton").sum().backward()
        assert [(options.is_causal, options.window, options.scale) for options in seen] == [(True, 3, 0.25)] * calls
