"""The mask of attention's dropout in plain PyTorch.

It depends only on seed, head and position, and is the same in every kernel, pass and sharding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptkernels import _check

ROUNDS = 7  # the fewest with which Philox4x32 passes all tests of randomness that its authors ran
LEVELS = 1 << 16  # dropout_p is rounded to a multiple of 1 / LEVELS


def threshold(dropout_p: float) -> int:
    """A weight is dropped when its 16-bit number is below this."""
    return round(dropout_p * LEVELS)


def rescale(dropout_p: float) -> float:
    """The factor of kept weights, which preserves their expectation; 0 when all are dropped."""
    kept = LEVELS - threshold(dropout_p)
    return LEVELS / kept if kept else 0.0


def draw_seeds(sequences: int, device: torch.device) -> Tensor:
    """Draws a seed for each sequence, int64 (sequences,), from PyTorch's generator of `device`, without waiting for a GPU."""
    return torch.randint(2**63 - 1, (sequences,), device=device)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """``(high, low)`` 32 bits of the product of a 32-bit constant and 32-bit numbers (held in int64)."""
    # The product itself can overflow an int64: compute it from 16-bit parts.
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def _philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), its 32-bit numbers in int64."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(ROUNDS):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9 & 0xFFFFFFFF, key1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def kept(seed: Tensor, head: Tensor, query: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """Which weights are kept, bool, of the shape that the four int64 tensors broadcast to.

    `query` and `key` are positions within a sequence.

    One evaluation of Philox, at the counter ``(key // 8, query, head, 0)``, gives 16 bits to each of eight keys.
    """
    words = _philox(seed, (key // 8, query, head, torch.zeros_like(query)))
    words = torch.stack(torch.broadcast_tensors(*words))  # (4, ...)
    which = (key % 8 // 2).expand(words.shape[1:])
    word = words.gather(0, which[None])[0]
    number = torch.where(key % 2 == 0, word & 0xFFFF, word >> 16)
    return number >= threshold(dropout_p)


def attention_dropout_mask(seed: Tensor, heads: int, queries: int, keys: int, dropout_p: float) -> Tensor:
    """Returns which weights `attention` keeps with ``dropout_seed=seed`` and this `dropout_p`.

    This depends only on the sequence's seed, the head and the two positions; it does not depend on tile sizes, backend,
    batch size or the sequence's place in the batch.

    Args:
        seed: ``(B,)`` int64, one for each sequence.
        heads: query heads H.
        queries, keys: tokens Tq and Tk; in a packed batch, those of one sequence.
        dropout_p: probability of dropping, from 0 to 1, rounded to a multiple of 2^-16.

    Returns:
        ``(B, H, Tq, Tk)`` bool, True where the weight is kept (and divided by the probability of keeping).

    Raises:
        TypeError: seeds that are not int64.
        ValueError: seeds of another rank than 1, or a probability outside [0, 1].
    """
    check_seed(seed, seed.shape[0] if seed.dim() else 1)
    check_probability(dropout_p)
    device = seed.device
    return kept(
        seed[:, None, None, None],
        torch.arange(heads, device=device)[:, None, None],
        torch.arange(queries, device=device)[:, None],
        torch.arange(keys, device=device),
        dropout_p,
    )


def check_probability(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; accepted are probabilities, from 0.0 to 1.0")


def check_seed(seed: Tensor, sequences: int) -> None:
    if seed.dtype != torch.int64:
        raise TypeError(f"dropout_seed: got dtype {seed.dtype}; accepted is int64")
    _check.shape("dropout_seed", seed, (sequences,))
