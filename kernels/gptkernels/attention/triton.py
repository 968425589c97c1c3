"""Attention in Triton: the launchers. The kernels are in `triton_forward` and `triton_backward`.

The forward computes an online softmax over tiles of keys; the backward has two deterministic loops. The tiles that need no
mask have a loop of their own, apart from those on the causal diagonal, a window's edge and the ragged end: most of the work
is done without comparisons. Scores are kept unscaled, so that ``qk * scale - max`` is one fused multiply-add; exponentials
and the saved log-sum-exp are base 2. The derivation is in MATH.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptkernels._layout import empty_like_heads
from gptkernels._triton import Hardware, Launch, cdiv, hardware, next_power_of_2, on_device, planned
from gptkernels.attention import dropout
from gptkernels.attention.options import Options
from gptkernels.attention.tiles import Tile, tile, whole_rows
from gptkernels.attention.triton_backward import _delta_kernel, _dkdv_kernel, _dq_kernel
from gptkernels.attention.triton_forward import _combine_kernel, _decode_kernel, _forward_kernel

LOG2_E = math.log2(math.e)
DELTA_BLOCK = 32
# The most queries, and rows (queries times heads of a group), for which the keys are split over programs.
DECODE_QUERIES = 8
DECODE_ROWS = 64
# Offsets within a tile of at most 128 tokens are 32-bit: with wider ones the kernels would spill registers.
MAX_TOKEN_STRIDE = 2**24
# The fewest tiles of keys in a split.
DECODE_TILES = 4


def _readable(x: Tensor) -> Tensor:
    """Returns `x` itself if the kernels can read it, as they can a slice of a packed projection; else a contiguous copy.

    They need head_dim to have stride 1, and a stride of tokens below `MAX_TOKEN_STRIDE`.
    """
    *_, token, last = x.stride()
    return x if token < MAX_TOKEN_STRIDE and (last == 1 or x.shape[-1] == 1) else x.contiguous()


def _block_d(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))  # 16 is the matrix units' smallest inner dimension


_Strides = tuple[int, ...]


class _Problem(NamedTuple):
    """What a launch depends on beside strides and dtypes. The properties are in the form that the kernels take."""

    hardware: Hardware
    itemsize: int
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    has_lengths: bool
    has_mask: bool
    packed_sequences: int | None
    scalars: tuple[Any, ...]  # of the options

    @property
    def options(self) -> Options:
        """Without their tensors."""
        return Options(None, None, None, None, None, *self.scalars)

    @property
    def packed(self) -> bool:
        return self.packed_sequences is not None

    @property
    def sequences(self) -> int:
        return self.query_shape[0] if self.packed_sequences is None else self.packed_sequences

    @property
    def heads(self) -> int:
        return self.query_shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key_shape[1]

    @property
    def queries(self) -> int:
        return self.query_shape[2]

    @property
    def keys(self) -> int:
        return self.key_shape[2]

    @property
    def head_dim(self) -> int:
        return self.query_shape[3]

    @property
    def max_queries(self) -> int:
        return self.options.max_queries if self.packed else self.queries

    @property
    def max_keys(self) -> int:
        return self.options.max_keys if self.packed else self.keys

    @property
    def block_d(self) -> int:
        return _block_d(self.head_dim)

    @property
    def scale(self) -> float:
        assert self.options.scale is not None
        return self.options.scale

    @property
    def has_dropout(self) -> bool:
        return dropout.threshold(self.options.dropout_p) > 0

    @property
    def is_plain(self) -> bool:
        """The `is_plain` of `tiles.tile`."""
        others = self.has_dropout or self.has_lengths or self.has_mask or self.packed
        return self.options.window is None and not others

    @property
    def window(self) -> int:
        """As the kernels take it: 0 for none."""
        return self.options.window or 0

    @property
    def dropout_numbers(self) -> tuple[float, int]:
        """The kernels' `rescale` and `threshold`."""
        return dropout.rescale(self.options.dropout_p), dropout.threshold(self.options.dropout_p)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.heads, self.heads // max(self.kv_heads, 1), self.queries, self.keys

    @property
    def statistics_strides(self) -> tuple[int, int]:
        # All sequences of a packed batch are in its one batch entry.
        return 0 if self.packed else self.heads * self.queries, self.queries

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "IS_CAUSAL": self.options.is_causal,
            "HAS_LENGTHS": self.has_lengths,
            "HAS_MASK": self.has_mask,
            "HAS_WINDOW": self.options.window is not None,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
        }

    @property
    def empty(self) -> bool:
        return 0 in (self.sequences, self.heads, self.head_dim, self.max_queries, self.max_keys)

    def strides(self, *given: _Strides) -> _Strides:
        """The (batch, head, token) strides of each of the tensors whose strides are `given`."""
        return tuple(size for batch, head, token, _ in given for size in (0 if self.packed else batch, head, token))

    def even(self, block_m: int) -> bool:
        return not self.packed and self.queries % block_m == 0


def _problem(query: Tensor, key: Tensor, options: Options) -> _Problem:
    sequences = None if options.cu_queries is None else options.cu_queries.shape[0] - 1
    return _Problem(
        hardware(query), query.dtype.itemsize, query.shape, key.shape,
        options.key_lengths is not None, options.key_mask is not None, sequences, options.scalars(),
    )  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


class _Split(NamedTuple):
    """The forward of few queries: one launch over splits of the keys, one that joins their results."""

    splits: Launch
    union: Launch
    partial: tuple[int, ...]  # the shape of the splits' outputs, float32


@planned
def _forward_launch(p: _Problem, choose: Callable[..., Tile], *strides: _Strides) -> Launch | _Split | None:
    """Returns None if there is nothing to compute. `strides` are those of query, key, value and out.

    `choose` is `tile`. It is an argument so that other choices, as bench.tune makes, do not get this one's cached launches.
    """
    if p.empty:
        return None
    few = p.queries <= DECODE_QUERIES and p.queries * p.heads // p.kv_heads <= DECODE_ROWS
    if few and not p.packed and not p.has_dropout:
        return _split(p, choose("decode", p.hardware.arch, p.itemsize, p.block_d), *strides)
    t = choose("forward", p.hardware.arch, p.itemsize, p.block_d, p.has_dropout, p.is_plain)
    return Launch(
        _forward_kernel, (cdiv(p.max_queries, t.block_m) * p.sequences * p.heads,),
        (p.scale * LOG2_E, *p.dropout_numbers, p.window, *p.sizes, p.max_queries, *p.strides(*strides), *p.statistics_strides),
        **p.constants, HAS_DROPOUT=p.has_dropout, PACKED=p.packed, EVEN_Q=p.even(t.block_m),
        BLOCK_M=t.block_m, BLOCK_N=t.block_n, **t.options,
    )  # fmt: skip


def _split(p: _Problem, t: Tile, *strides: _Strides) -> _Split:
    rows = p.queries * p.heads // p.kv_heads
    kv_heads = p.sequences * p.kv_heads
    wanted = cdiv(2 * p.hardware.multiprocessors, kv_heads)  # splits that fill the GPU twice
    tiles = cdiv(p.keys, t.block_n)
    chunk = max(DECODE_TILES, cdiv(tiles, wanted)) * t.block_n
    splits = cdiv(p.keys, chunk)
    return _Split(
        Launch(
            _decode_kernel, (splits, kv_heads),
            (p.scale * LOG2_E, p.window, *p.sizes, chunk, *p.strides(*strides[:3])),
            **p.constants, BLOCK_M=max(t.block_m, next_power_of_2(rows)), BLOCK_N=t.block_n,
            **t.options,
        ),
        Launch(
            _combine_kernel, (p.sequences * p.heads * p.queries,), (*p.sizes[:3], splits, *strides[3][:3]),
            HEAD_DIM=p.head_dim, BLOCK_D=p.block_d, BLOCK_S=next_power_of_2(splits), num_warps=4,
        ),
        (kv_heads, splits, rows, p.head_dim),
    )  # fmt: skip


def _forward(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    out = empty_like_heads(query)
    numbers = 2 if query.dtype == torch.float32 else 1
    statistics = query.new_empty((numbers, *query.shape[:3]), dtype=torch.float32)
    query, key, value = _readable(query), _readable(key), _readable(value)
    p = _problem(query, key, options)
    launch = _forward_launch(p, tile, query.stride(), key.stride(), value.stride(), out.stride())
    if launch is None:
        return out.zero_(), statistics.fill_(math.inf if numbers == 1 else 0.0)
    sums = statistics[1] if numbers == 2 else None
    masks = _contiguous(options.key_lengths, options.key_mask)
    with on_device(query):
        if isinstance(launch, _Split):
            partial = query.new_empty(launch.partial, dtype=torch.float32)
            partial_maxima = query.new_empty(launch.partial[:3], dtype=torch.float32)
            partial_sums = torch.empty_like(partial_maxima)
            launch.splits(query, key, value, partial, partial_maxima, partial_sums, *masks)
            launch.union(partial, partial_maxima, partial_sums, out, statistics, sums)
        else:
            sequences = _contiguous(options.cu_queries, options.cu_keys)
            seed = options.dropout_seed if dropout.threshold(options.dropout_p) else None
            launch(query, key, value, out, statistics, sums, *masks, *sequences, seed)
    return out, statistics


class _BackwardLaunches(NamedTuple):
    """The launches of the three kernels. `whole_rows`: they compute the weights within a tile, without the saved sums."""

    delta: Launch
    dkdv: Launch
    dq: Launch
    whole_rows: bool


@planned
def _backward_launches(
    p: _Problem, choose: Callable[..., Tile], has_grad_lse: bool, *strides: _Strides
) -> _BackwardLaunches | None:
    """As `_forward_launch`. `strides` are those of query, key, value, grad_out, out and the three gradients."""
    if p.empty:
        return None
    arch, inputs, (out, grad_query, *grads_key_value) = p.hardware.arch, strides[:4], strides[4:]
    dkdv = choose("dkdv", arch, p.itemsize, p.block_d, p.has_dropout, p.is_plain).at_most(
        next_power_of_2(p.max_queries)
    )
    dq = choose("dq", arch, p.itemsize, p.block_d, p.has_dropout, p.is_plain)
    whole = whole_rows(next_power_of_2(p.max_keys), p.block_d) if p.itemsize == 4 else None
    if whole:
        dkdv, dq = whole
    numbers = (p.scale, p.scale * LOG2_E, *p.dropout_numbers, p.window, *p.sizes)
    given = (*p.strides(*inputs), *p.statistics_strides)
    constants = {**p.constants, "HAS_DROPOUT": p.has_dropout, "PACKED": p.packed, "WHOLE_ROWS": bool(whole)}
    return _BackwardLaunches(
        Launch(
            _delta_kernel, (cdiv(p.max_queries, DELTA_BLOCK) * p.sequences * p.heads,),
            (p.heads, p.queries, p.max_queries, *p.strides(out, inputs[3]), *p.statistics_strides),
            PACKED=p.packed, HAS_DLSE=has_grad_lse, WHOLE_ROWS=bool(whole),
            HEAD_DIM=p.head_dim, BLOCK_D=p.block_d, BLOCK_M=DELTA_BLOCK, num_warps=4,
        ),
        Launch(
            _dkdv_kernel, (cdiv(p.max_keys, dkdv.block_n) * p.sequences * p.kv_heads,),
            (*numbers, p.max_keys, *given, *p.strides(*grads_key_value)),
            **constants, EVEN_Q=p.even(dkdv.block_m), EVEN_K=not p.packed and p.keys % dkdv.block_n == 0,
            BLOCK_M=dkdv.block_m, BLOCK_N=dkdv.block_n, **dkdv.options,
        ),
        Launch(
            _dq_kernel, (cdiv(p.max_queries, dq.block_m) * p.sequences * p.heads,),
            (*numbers, p.max_queries, *given, *p.strides(grad_query)),
            **constants, EVEN_Q=p.even(dq.block_m),
            BLOCK_M=dq.block_m, BLOCK_N=dq.block_n, **dq.options,
        ),
        bool(whole),
    )  # fmt: skip


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_query, grad_key, grad_value = empty_like_heads(query), empty_like_heads(key), empty_like_heads(value)
    query, key, value, grad_out = _readable(query), _readable(key), _readable(value), _readable(grad_out)
    p = _problem(query, key, options)
    launches = _backward_launches(
        p, tile, grad_lse is not None, query.stride(), key.stride(), value.stride(), grad_out.stride(), out.stride(),
        grad_query.stride(), grad_key.stride(), grad_value.stride(),
    )  # fmt: skip
    if launches is None:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    sums = statistics[1] if len(statistics) == 2 and not launches.whole_rows else None
    masks = _contiguous(options.key_lengths, options.key_mask)
    cu_queries, cu_keys, grad_lse = _contiguous(options.cu_queries, options.cu_keys, grad_lse)
    seed = options.dropout_seed if dropout.threshold(options.dropout_p) else None
    delta = torch.empty_like(statistics[0] if len(statistics) == 2 else statistics)
    inputs = (query, key, value, grad_out, statistics, sums, delta, grad_lse)
    rest = (*masks, cu_queries, cu_keys, seed)
    with on_device(query):
        launches.delta(out, grad_out, sums, grad_lse, delta, cu_queries, cu_keys)
        launches.dkdv(*inputs, grad_key, grad_value, *rest)
        launches.dq(*inputs, grad_query, *rest)
    return grad_query, grad_key, grad_value


class Launchers(NamedTuple):
    """What computes attention's two ops on one architecture, from their tensors and the `Options`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


LAUNCHERS = {"any": Launchers(_forward, _backward)}
"""By architecture, as `Hardware.arch` names it; "any" serves those that have no kernels of their own."""


def attention_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """``(out, statistics)``: out (B, H, Tq, D) laid out (B, Tq, H, D), statistics float32 (1, B, H, Tq) or (2, B, H, Tq).

    For 16-bit inputs the statistics are each row's log-sum-exp in base 2, +inf where it sees no key. For float32 inputs
    they are the row's maximum in base-2 units and its sum of exponentials relative to that, both 0 where it sees no key.
    """
    return LAUNCHERS.get(hardware(query).arch, LAUNCHERS["any"]).forward(query, key, value, Options(*arguments))


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(grad_query, grad_key, grad_value)``, each laid out as the forward's output. Every run gives the same bits."""
    return LAUNCHERS.get(hardware(query).arch, LAUNCHERS["any"]).backward(
        grad_out, grad_lse, query, key, value, out, statistics, Options(*arguments)
    )
