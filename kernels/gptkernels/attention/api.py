"""Attention of padded and packed batches: the public functions, their checks and their autograd.Function."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from gptkernels import _check, _library
from gptkernels import backend as _backend
from gptkernels._layout import empty_like_heads
from gptkernels.attention import dropout, reference
from gptkernels.attention.options import SCHEMA, Options

MAX_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """``dropout(softmax(query @ key^T * scale)) @ value`` over the keys that each query may see.

    Memory is linear in the tokens. Slices of a packed projection are read in place; the output is laid out ``(B, Tq, H,
    D)`` in memory, so that ``out.transpose(1, 2).reshape(B, Tq, H * D)`` costs nothing. Softmax runs in float32; the
    backward is deterministic. Autocast casts the inputs as it does for PyTorch's own attention. Gradients that will be
    differentiated again (``create_graph=True``) are computed from the plain formula, in memory quadratic in the tokens.

    Args:
        query: ``(B, H, Tq, D)``, D at most 256.
        key, value: ``(B, Hkv, Tk, D)``; Hkv divides H. Fewer heads than H mean grouped-query attention: query head h reads
            key/value head ``h // (H / Hkv)``.
        is_causal: query i sees keys up to ``i + Tk - Tq`` (aligned bottom-right: the last query sees every key).
        scale: positive; None for ``1 / sqrt(D)``.
        dropout_p: probability that a weight is dropped, from 0 to 1, rounded to a multiple of 2^-16. It is always applied:
            pass 0 outside training.
        dropout_seed: ``(B,)`` int64, a seed for each sequence; None draws them from PyTorch's generator. Whether a weight
            is dropped depends only on its sequence's seed, its head and its two positions (`attention_dropout_mask`).
        key_lengths: ``(B,)`` integers: sequence b sees only its first ``key_lengths[b]`` keys (right padding), and
            the work on the others is skipped. Causal alignment stays that of the padded tensors.
        key_mask: ``(B, Tk)`` bool, True = attend; for left padding.
        window: with `is_causal`, a query sees at most the `window` keys that end with its own; work on others is skipped.
        return_lse: also return the logarithm of each query's sum of exponentials; it has a gradient.
        backend: overrides `use_backend` for this call.

    Returns:
        ``(B, H, Tq, D)`` in query's dtype. A query that sees no key gets zeros. With `return_lse` a pair, the second
        ``(B, H, Tq)`` float32 (float64 for float64 inputs), natural logarithm, -inf where no key is seen.

    Raises:
        ValueError: a shape, head count, scale, probability or option that is not accepted, or tensors on different devices.
        TypeError: tensors that are not floating point or of different dtypes.
        BackendUnavailableError: an explicit backend that cannot run here.

    Source: Dao, "FlashAttention-2", arXiv 2307.08691; Milakov and Gimelshein, "Online normalizer calculation for
    softmax", arXiv 1805.02867. The derivation is in ``MATH.md``.
    """
    _validate(query, key, value, ("batch", "heads", "tokens", "head_dim"))
    _validate_masks(query, key, key_lengths, key_mask)
    scale = _validate_numbers(query.shape[-1], is_causal, scale, window)
    query, key, value = _cast(query, key, value)
    options = Options(
        key_lengths=key_lengths, key_mask=key_mask, dropout_seed=_seeds(dropout_p, dropout_seed, query.shape[0], query),
        is_causal=is_causal, window=window, scale=scale, dropout_p=dropout_p,
    )  # fmt: skip
    name = _backend.choose("attention", query, backend)
    return _attend(query, key, value, options, return_lse, name)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    """`attention` with ``is_causal=True``: a GPT's self-attention."""
    return attention(query, key, value, is_causal=True, **kwargs)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` of sequences of different lengths that are packed one after another, without padding.

    The arguments are those of FlashAttention's function for packed batches. Sequence s owns the tokens
    ``cu_seqlens[s]`` to ``cu_seqlens[s + 1] - 1`` and attends only to itself.

    Args:
        query: ``(total_q, H, D)``, D at most 256.
        key, value: ``(total_k, Hkv, D)``; Hkv divides H.
        cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)`` int32 or int64 on query's device: cumulative lengths, from 0 to
            total_q and total_k, never decreasing. They are checked on the CPU. On a GPU they are not, since that would
            wait for the device at every call: wrong lengths there read and write memory out of bounds.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length; checked on the CPU too.
        dropout_seed: ``(sequences,)`` int64; positions in `attention_dropout_mask` count within the sequence.
        is_causal, scale, dropout_p, window, return_lse, backend: as in `attention`, for each sequence.

    Returns:
        ``(total_q, H, D)`` in query's dtype; with `return_lse` also ``(H, total_q)`` float32.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as `attention`; ValueError for cumulative lengths that do not add up.
    """
    _validate(query, key, value, ("tokens", "heads", "head_dim"))
    sequences = _validate_lengths(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scale = _validate_numbers(query.shape[-1], is_causal, scale, window)
    query, key, value = _cast(query, key, value)
    options = Options(
        cu_queries=cu_seqlens_q, cu_keys=cu_seqlens_k, dropout_seed=_seeds(dropout_p, dropout_seed, sequences, query),
        max_queries=max_seqlen_q, max_keys=max_seqlen_k,
        is_causal=is_causal, window=window, scale=scale, dropout_p=dropout_p,
    )  # fmt: skip
    name = _backend.choose("attention_varlen", query, backend)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, H, total, D)
    attended = _attend(query, key, value, options, return_lse, name)
    if return_lse:
        return attended[0][0].transpose(0, 1), attended[1][0]
    return attended[0].transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, options: Options, return_lse: bool, backend: str) -> Any:
    if backend == "reference":
        return reference.attend(query, key, value, options, return_lse)
    return _library.apply(AttentionFunction, query, key, value, options, return_lse, backend)


def _validate(query: Tensor, key: Tensor, value: Tensor, dimensions: tuple[str, ...]) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check.floating(name, x)
        if x.dim() != len(dimensions):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; accepted is ({', '.join(dimensions)})")
        if x is not query:
            _check.same_device(name, x, "query", query)
    query_shape, key_shape = query.shape, key.shape
    head_dim, at = query_shape[-1], dimensions.index("heads")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"query: got head_dim {head_dim}; accepted is at most {MAX_HEAD_DIM}")
    if key_shape[-1] != head_dim:
        raise ValueError(f"key: got head_dim {key_shape[-1]}; accepted is query's, {head_dim}")
    if dimensions[0] == "batch" and key_shape[0] != query_shape[0]:
        raise ValueError(
            f"key: got shape {tuple(key_shape)}; accepted is (batch {query_shape[0]}, heads, tokens, head_dim)"
        )
    _check.shape("value", value, key_shape)
    heads, kv_heads = query_shape[at], key_shape[at]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: got {kv_heads} heads; accepted are counts that divide query's {heads}")


def _validate_masks(query: Tensor, key: Tensor, key_lengths: Tensor | None, key_mask: Tensor | None) -> None:
    if key_lengths is not None:
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths: got dtype {key_lengths.dtype}; accepted are int32 and int64")
        _check.shape("key_lengths", key_lengths, (query.shape[0],))
        _check.same_device("key_lengths", key_lengths, "query", query)
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: got dtype {key_mask.dtype}; accepted is bool (True = attend)")
        _check.shape("key_mask", key_mask, (query.shape[0], key.shape[2]))
        _check.same_device("key_mask", key_mask, "query", query)


def _validate_numbers(head_dim: int, is_causal: bool, scale: float | None, window: int | None) -> float:
    """Checks window and scale; returns the scale."""
    if window is not None and not is_causal:
        raise ValueError(
            f"window: got {window} with is_causal=False; accepted is a window of causal attention, or None"
        )
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}; accepted are counts of keys from 1 on, or None")
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}; accepted are positive finite numbers, or None for 1 / sqrt(head_dim)")
    return scale


def _seeds(dropout_p: float, dropout_seed: Tensor | None, sequences: int, query: Tensor) -> Tensor | None:
    """Checks dropout's options; returns the seeds, drawn if there is dropout and none are given."""
    dropout.check_probability(dropout_p)
    if dropout_seed is not None:
        dropout.check_seed(dropout_seed, sequences)
        _check.same_device("dropout_seed", dropout_seed, "query", query)
    elif dropout_p > 0.0:
        return dropout.draw_seeds(sequences, query.device)
    return dropout_seed


def _validate_lengths(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> int:
    """Checks a packed batch's cumulative lengths; returns how many sequences there are."""
    for name, cumulative, most, total in (("q", cu_q, max_q, query.shape[0]), ("k", cu_k, max_k, key.shape[0])):
        name = f"cu_seqlens_{name}"
        if not isinstance(cumulative, Tensor) or cumulative.dtype not in (torch.int32, torch.int64):
            found = getattr(cumulative, "dtype", type(cumulative).__name__)
            raise TypeError(f"{name}: got {found}; accepted are int32 and int64 tensors")
        if cumulative.dim() != 1 or len(cumulative) == 0:
            raise ValueError(f"{name}: got shape {tuple(cumulative.shape)}; accepted is (sequences + 1,)")
        _check.same_device(name, cumulative, "query", query)
        # Fake tensors, which torch.compile and torch.export trace with, have no numbers to check.
        if cumulative.device.type == "cpu" and type(cumulative) is Tensor and not torch.compiler.is_compiling():
            ends = cumulative.tolist()
            lengths = [after - before for before, after in itertools.pairwise(ends)]
            if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
                raise ValueError(f"{name}: got {ends}; accepted are lengths added up from 0 to the {total} tokens")
            if max(lengths, default=0) > most:
                longest = name.replace("cu_seqlens", "max_seqlen")
                raise ValueError(f"{longest}: got {most}; accepted is at least the longest sequence, {max(lengths)}")
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"cu_seqlens_k: got {len(cu_k)} numbers; accepted are as many as cu_seqlens_q has, {len(cu_q)}"
        )
    return len(cu_q) - 1


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if (dtype := _check.autocast_dtype(query)) is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check.same_dtype("key", key, "query", query)
    _check.same_dtype("value", value, "query", query)
    return query, key, value


# What converts the kernels' maxima and log-sum-exps to natural logarithms: Triton's are in base 2.
_NATURAL = {"triton": math.log(2.0), "native": 1.0}


def _log_sum_exp(statistics: Tensor, unit: float) -> Tensor:
    """Returns the public log-sum-exp: natural logarithm, -inf where no key is seen."""
    if len(statistics) == 1:  # the kernels' log-sum-exp is +inf where no key is seen, so that recomputed weights are 0
        return (statistics[0] * unit).masked_fill_(statistics[0] == math.inf, -math.inf)
    maximum, total = statistics.double()
    return (maximum * unit + total.log()).float()


class AttentionFunction(torch.autograd.Function):
    """Autograd around the fused kernels: saves inputs, output and each row's float32 statistics.

    The statistics are one log-sum-exp a row for 16-bit inputs. For float32 inputs they are the row's maximum and its sum
    of exponentials relative to that, kept apart because a rounded log-sum-exp would cost more than all other rounding
    (MATH.md).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Options, return_lse: bool, backend: str
    ) -> Any:
        out, statistics = _library.ops(backend).attention_forward(query, key, value, *options)
        ctx.save_for_backward(query, key, value, out, statistics, *options.tensors())
        ctx.scalars, ctx.backend = options.scalars(), backend
        ctx.set_materialize_grads(False)
        if not return_lse:
            return out
        return out, _log_sum_exp(statistics, _NATURAL[backend])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        query, key, value, out, statistics, *tensors = ctx.saved_tensors
        options = Options(*tensors, *ctx.scalars)
        if _library.graph_wanted():

            def formula(query: Tensor, key: Tensor, value: Tensor) -> reference.Attended:
                return reference.attend(query, key, value, options, return_lse=True)

            grads = _library.differentiable_gradients(formula, (query, key, value), grad_out, grad_lse)
        else:
            if grad_out is None:
                grad_out = torch.zeros_like(out)
            grads = _library.ops(ctx.backend).attention_backward(
                grad_out, grad_lse, query, key, value, out, statistics, *options
            )
        return *grads, None, None, None


def _fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = (2 if query.dtype == torch.float32 else 1, *query.shape[:3])
    return empty_like_heads(query), query.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_heads(query), empty_like_heads(key), empty_like_heads(value)


def _product_flops(query: Tensor, key: Tensor, options: Options) -> int:
    """Counts the operations of one of attention's products: every query with every key of its sequence."""
    batch, heads, queries, head_dim = query.shape
    pairs = batch * queries * key.shape[2]
    cu_queries, cu_keys = options.cu_queries, options.cu_keys
    if cu_queries is not None and cu_keys is not None:
        if type(cu_queries) is Tensor and cu_queries.device.type != "meta":
            pairs = int((cu_queries.diff() * cu_keys.diff()).sum())
        else:  # a fake tensor has no values: count every sequence as the longest
            pairs = (len(cu_queries) - 1) * options.max_queries * options.max_keys
    return 2 * heads * head_dim * pairs


_library.register(
    "attention_forward",
    f"(Tensor query, Tensor key, Tensor value, {SCHEMA}) -> (Tensor out, Tensor statistics)",
    fake=_fake_forward,
    functions=("attention", "attention_varlen"),
    flops=lambda query, key, value, *arguments: 2 * _product_flops(query, key, Options(*arguments)),
)
_library.register(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics,"
    f" {SCHEMA}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    fake=_fake_backward,
    functions=("attention", "attention_varlen"),
    # The scores are recomputed, and there are four products of gradients.
    flops=lambda grad_out, grad_lse, query, key, value, out, statistics, *arguments: (
        5 * _product_flops(query, key, Options(*arguments))
    ),
)
