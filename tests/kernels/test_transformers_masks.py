"""`Mask`, which accelerated models pass to our attention, behaves in other code like the mask that "sdpa" would get."""

from __future__ import annotations

import copy
import operator
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from gptkernels.integrations.transformers import accelerate_model, attend, make_mask
from gptkernels.integrations.transformers.masks import Mask, Visible
from torch import Tensor, nn
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from tests.kernels.foreign import SIZES

RULES = {
    "causal": (causal_mask_function, {}),
    "window": (
        sliding_window_causal_mask_function(3),
        {"local_size": 3, "config": transformers.MistralConfig(sliding_window=3)},
    ),
    "both": (bidirectional_mask_function, {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}),
}
EXACT_ONLY = {
    "another window than the config's": (
        sliding_window_causal_mask_function(3),
        {"local_size": 3, "config": transformers.MistralConfig(sliding_window=9)},
    ),
    "chunks": (
        chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)),
        {"local_size": 3, "config": transformers.LlamaConfig(attention_chunk_size=3, sliding_window=3)},
    ),
    "a rule that transformers changed": (
        and_masks(causal_mask_function, lambda b, h, q, k: (q + k) % 2 == 0),
        {"allow_is_causal_skip": False},
    ),
    "causal, for a model that works on the mask": (causal_mask_function, {"allow_is_causal_skip": False}),
    "bidirectional, for a model that works on the mask": (
        bidirectional_mask_function,
        {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    ),
}
LEFT = torch.tensor([[1] * 6, [0] * 2 + [1] * 4]).bool()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("tensor_offset", [False, True])
def test_our_mask_equals_transformers(rule, offset: int, slack: int, tensor_offset: bool):
    """Compared with transformers' dense mask, over offsets, unused slots of a cache, and padding of every kind."""
    function, options = RULES[rule]
    for padded in (
        None,
        [[1] * 9, [0] * 3 + [1] * 6],
        [[1] * 9, [1] * 6 + [0] * 3],
        [[1] * 9, [1] * 4 + [0] + [1] * 4],
    ):
        lengths = {"q_length": 5, "kv_length": 5 + offset + slack}
        padding = None if padded is None else torch.tensor(padded).bool()[:, : 5 + offset]
        start = torch.tensor(offset) if tensor_offset else offset
        made = make_mask(2, **lengths, q_offset=start, mask_function=function, attention_mask=padding, **options)
        if rule == "both" and (padding is None or (slack == 0 and bool(padding.all()))):
            assert made is None  # as "sdpa" gets it
            continue
        assert isinstance(made, Mask)
        forced = options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        expected = sdpa_mask(2, **lengths, q_offset=offset, mask_function=function, attention_mask=padding, **forced)
        assert (made.shape, made.dtype, made.device) == (expected.shape, expected.dtype, expected.device)
        assert torch.equal(made, expected)


@pytest.mark.parametrize("rule", EXACT_ONLY)
def test_other_rules_give_dense_masks(rule: str):
    function, options = EXACT_ONLY[rule]
    for mask in (None, LEFT):
        arguments = {"q_length": 6, "kv_length": 6, "mask_function": function, "attention_mask": mask, **options}
        made = make_mask(2, **arguments)
        assert type(made) is Tensor
        assert torch.equal(made, sdpa_mask(2, **arguments))


def a_mask(slack: int = 0) -> tuple[Mask, Tensor]:
    """A causal mask, padded on the left; and the same as a dense mask."""
    made = make_mask(2, 6, 6 + slack, attention_mask=LEFT)
    expected = sdpa_mask(2, 6, 6 + slack, attention_mask=LEFT, allow_is_causal_skip=False)
    assert isinstance(made, Mask)
    assert expected is not None
    return made, expected


@pytest.fixture
def no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Visible, device: torch.device) -> Tensor:
        raise AssertionError("a mask became dense")

    monkeypatch.setattr(Visible, "dense", never)


@pytest.mark.usefixtures("no_dense_mask")
def test_reading_a_masks_properties_does_not_make_it_dense():
    mask, expected = a_mask(slack=3)
    assert isinstance(mask, Tensor)
    assert torch.is_tensor(mask)
    for ask in (
        lambda m: (m.shape, m.size(), m.size(-1), len(m), m.ndim, m.dim(), m.numel(), m.dtype, m.device, m.layout),
        lambda m: (
            m.is_floating_point(),
            torch.is_floating_point(m),
            m.is_cuda,
            m.requires_grad,
            m.is_leaf,
            m.get_device(),
        ),
    ):
        assert ask(mask) == ask(expected)
    for same in (
        lambda m: m.contiguous(),
        lambda m: m.to("cpu"),
        lambda m: m.to(m.device, non_blocking=True),
        lambda m: m.to(torch.bool),
        lambda m: m.to(expected),
        lambda m: m.cpu(),
        lambda m: m.detach(),
    ):
        assert same(mask) is mask
    moved = mask.to("meta")
    assert isinstance(moved, Mask)
    assert moved.device.type == moved.visible.key_mask.device.type == "meta"
    few = mask[:, :, -2:, :8]  # models drop earlier queries and unused slots
    assert isinstance(few, Mask)
    assert few.visible == mask.visible._replace(queries=2, slots=8)
    assert mask[:, :, 4:, :].shape == (2, 1, 2, 9)


OPERATIONS = {
    "index": lambda m: m[:, 0],
    "ellipsis": lambda m: m[..., :3],
    "first queries": lambda m: m[:, :, :2, :],
    "last queries": lambda m: m[:, :, -2:, :],
    "more last queries than there are": lambda m: m[:, :, -20:, :],
    "queries from one on": lambda m: m[:, :, 4:, :],
    "no queries": lambda m: m[:, :, 6:, :],
    "places that hold something": lambda m: m[:, :, :, :6],
    "fewer places": lambda m: m[:, :, :, :4],
    "all but the last place": lambda m: m[:, :, :, :-1],
    "one sequence": lambda m: m[1:, :, :, :],
    "not": lambda m: ~m,
    "and": lambda m: m & torch.eye(6, 9, dtype=torch.bool),
    "added": lambda m: torch.ones(2, 4, 6, 9) + m,
    "where": lambda m: torch.where(m, 0.0, -1.0),
    "cat": lambda m: torch.cat([m, m], dim=-1),
    "masked_fill": lambda m: torch.zeros(2, 4, 6, 9).masked_fill(m, 1.0),
    "all": lambda m: m.all(dim=-1),
    "to float": lambda m: m.to(torch.float32),
    "expand": lambda m: m.expand(2, 4, 6, 9),
    "clone": lambda m: m.clone(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "numpy": lambda m: torch.from_numpy(m.numpy()),
    "iterate": lambda m: torch.stack(list(m)),
    "in place": lambda m: m.logical_not_(),
    "in place by operator": lambda m: operator.iand(m, torch.eye(6, 9, dtype=torch.bool)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_a_mask_give_the_dense_masks_results(operation: str):
    mask, expected = a_mask(slack=3)
    expected = expected.clone()
    done = OPERATIONS[operation](mask)
    assert torch.equal(done, OPERATIONS[operation](expected))
    assert torch.equal(mask, expected)


def heads(queries: int, keys: int, batch: int = 2, head_dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, n, head_dim, generator=generator) for n in (queries, keys, keys)]


def test_writes_into_a_mask_take_effect():
    """In our attention too, and also if a view of the mask was written to."""
    for write in (
        lambda m: operator.setitem(m, (..., 1), False),
        lambda m: m[:, :, 3:].logical_and_(torch.eye(3, 6).bool()),
        lambda m: m.fill_(True),
    ):
        mask, dense = a_mask()
        dense = dense.clone()
        (q, k, v) = heads(6, 6)
        write(mask)
        write(dense)
        out, _ = attend(nn.Identity(), q, k, v, mask)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)
        torch.testing.assert_close(out.nan_to_num(), expected.nan_to_num())


def test_a_mask_for_other_sizes_behaves_as_with_sdpa():
    (q, k, v), layer = heads(6, 7), nn.Identity()
    mask, _ = a_mask()
    with pytest.raises(RuntimeError, match="size"):  # PyTorch's own error
        attend(layer, q, k, v, mask)
    plain = make_mask(2, 6, 6, attention_mask=torch.ones(2, 6))  # hides no key beyond the causal rule
    out, _ = attend(layer, q, k, v, plain, is_causal=False)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    one = make_mask(1, 6, 6, attention_mask=LEFT[1:])
    (q, k, v) = heads(6, 6)
    out, _ = attend(layer, q, k, v, one)
    dense = sdpa_mask(1, 6, 6, attention_mask=LEFT[1:], allow_is_causal_skip=False)
    torch.testing.assert_close(
        out[:, 2:], F.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)[:, 2:]
    )


def test_sizes_beyond_the_kernels_go_to_pytorch():
    torch.manual_seed(0)
    layer = nn.Identity()
    visible = Visible(5, 5, 5, True, 2, torch.tensor([[False, True, True, True, True]]))
    mask = Mask.of(visible, 1, torch.device("cpu"))
    for head_dim, value_dim in ((264, 264), (16, 8)):
        q, k, v = torch.randn(1, 2, 5, head_dim), torch.randn(1, 2, 5, head_dim), torch.randn(1, 2, 5, value_dim)
        out, _ = attend(layer, q, k, v, mask)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.dense(q.device)).transpose(1, 2)
        torch.testing.assert_close(out[:, 1:], expected[:, 1:])
        assert mask.tensor is None  # stays small for the next layer, which may use the kernels


def test_more_queries_than_keys_without_a_mask_is_causal_as_in_pytorch():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 3, 16)
    out, _ = attend(nn.Identity(), q, k, k, None, is_causal=True)
    expected = F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def look_and_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Uses the mask as models do: whole, sliced, and in a computation."""
    layer = nn.Identity()
    seen = (~mask[:, 0]).float().sum(-1) if mask.dtype == torch.bool else mask[:, 0]
    last, _ = attend(layer, q[:, :, -2:], k, v, mask[:, :, -2:, :])
    return attend(layer, q, k, v, mask)[0], last, seen


def make_and_attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    mask = make_mask(q.shape[0], q.shape[2], k.shape[2], attention_mask=padding, device=q.device)
    assert mask is not None
    return attend(nn.Identity(), q, k, v, mask)[0], *look_and_attend(q, k, v, mask)


def test_masks_made_inside_or_outside_compile_without_graph_breaks():
    torch._dynamo.reset()
    for length in (5, 7):  # the second one compiles for dynamic lengths
        padding = torch.ones(2, length).bool()
        padding[1, :2] = False
        q, k, v = heads(length, length)
        mask = make_mask(2, length, length, attention_mask=padding)
        compiled = torch.compile(look_and_attend, fullgraph=True, backend="eager")(q, k, v, mask)
        for a, b in zip(compiled, look_and_attend(q, k, v, mask)):
            torch.testing.assert_close(a, b)
    compiled = torch.compile(make_and_attend, fullgraph=True, backend="eager")(q, k, v, padding)
    for a, b in zip(compiled, make_and_attend(q, k, v, padding)):
        torch.testing.assert_close(a, b)


def test_a_mask_is_exported():
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
            return make_and_attend(q, k, v, padding)

    arguments = (*heads(6, 6), LEFT)
    exported = torch.export.export(Model(), arguments, strict=False)
    for a, b in zip(exported.module()(*arguments), make_and_attend(*arguments)):
        torch.testing.assert_close(a, b)
    assert any("gptkernels" in str(node.target) for node in exported.graph.nodes)


OURS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
}


@pytest.mark.parametrize("family", OURS)
@pytest.mark.usefixtures("no_dense_mask")
def test_our_own_path_never_makes_a_dense_mask(family: str):
    """Forward, backward, checkpointing, and generation with a cache of fixed size, over a padded batch."""
    model = accelerate_model(OURS[family]()).train()
    ids, padding = torch.arange(24).view(2, 12) + 3, torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
    for reentrant in (None, True, False):
        if reentrant is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its successor is not in every supported version
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, attention_mask=padding, labels=ids).loss.backward()
    if family != "bert":
        options = {"attention_mask": padding, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        model.eval().generate(ids, cache_implementation="static", disable_compile=True, **options)
