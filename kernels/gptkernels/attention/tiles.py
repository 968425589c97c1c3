"""The shipped launch configurations of the attention kernels: one tile per direction, architecture, dtype and head_dim.

Chosen so that under Triton 3.6, 3.7.1, 3.8 and 3.9 no kernel spills registers or waits for each of its products, and each
fits its target's shared memory (`tests/kernels/test_compile.py` holds the main configurations). Nothing is tuned at first
use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Tile:
    """`block_m` queries by `block_n` keys, computed by `num_warps` warps, `num_stages` loads deep.

    `maxnreg` bounds a thread's registers where that lets one more program run on a multiprocessor. CUDA alone knows it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @cached_property
    def options(self) -> dict[str, int]:
        """The launch's options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}

    def at_most(self, queries: int) -> Tile:
        """With fewer queries where there are no more than `queries`, a power of 2."""
        return replace(self, block_m=min(self.block_m, max(16, queries)))


# Columns: the forward, dK/dV, dQ, the forward of few queries. Rows: padded head_dim up to 64, 128, 256.
_Row = tuple[Tile, Tile, Tile, Tile]
_Table = dict[int, _Row]
_HOPPER: _Table = {  # 227 kB of shared memory
    64: (Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(16, 128, 4, 3)),
    128: (Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(16, 64, 4, 3)),
    256: (Tile(128, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 64, 8, 2), Tile(16, 32, 4, 3)),
}
_BLACKWELL: _Table = {  # 227 kB too; accumulators wait in tensor memory, and their way through registers costs
    64: (Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(16, 128, 4, 3)),
    128: (Tile(128, 64, 8, 3), Tile(32, 128, 8, 1), Tile(128, 64, 8, 2), Tile(16, 64, 4, 3)),
    256: (Tile(128, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 2), Tile(16, 32, 4, 3)),
}
_AMPERE: _Table = {  # 163 kB
    64: (Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(16, 128, 4, 3)),
    128: (Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 4, 3)),
    256: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 32, 4, 3)),
}
_CONSUMER: _Table = {  # 99 kB: sm_86, sm_89, sm_120
    64: (Tile(128, 64, 8, 3), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(16, 64, 4, 3)),
    128: (Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 4, 2), Tile(16, 32, 4, 3)),
    256: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
}
_HIP: _Table = {  # 64 kB of local data share, 64-thread waves
    64: (Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(16, 64, 4, 1)),
    128: (Tile(128, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(16, 64, 4, 1)),
    256: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)),
}
_FLOAT32: _Table = {  # IEEE products, on the general units and within 99 kB: small tiles everywhere
    64: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 4, 2)),
    128: (Tile(32, 16, 8, 2), Tile(16, 32, 8, 1), Tile(32, 16, 8, 2), Tile(16, 16, 4, 2)),
    256: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 4, 2)),
}
# Beside those, by table, direction and row: where queries see all keys, or all up to their own, of one length and without
# dropout. What else a kernel may have to do takes registers that these do not have; bench/tune.py finds them.
_PLAIN = {
    ("sm_90", "forward", 64): Tile(128, 64, 8, 3, 128),
    ("sm_90", "dq", 64): Tile(128, 64, 8, 3, 128),
    ("sm_90", "forward", 128): Tile(128, 128, 8, 2),
    ("float32", "dq", 128): Tile(16, 32, 8, 2),
}
# And with dropout, whose random numbers take registers of their own.
_DROPOUT = {
    ("sm_80", "forward", 128): Tile(128, 32, 8, 3),
    ("sm_90", "dkdv", 128): Tile(16, 128, 8, 2),
    ("float32", "dq", 128): Tile(16, 32, 8, 2),
}
_DIRECTIONS = ("forward", "dkdv", "dq", "decode")
_TABLES = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL,
    "hip": _HIP,
    "float32": _FLOAT32,
}
# In the interpreter a tile costs the same whatever its size; small ones bring several into short test sequences.
_INTERPRETER = Tile(32, 16, 1, 1)


def tile(
    direction: str, arch: str, itemsize: int, block_d: int, has_dropout: bool = False, is_plain: bool = False
) -> Tile:
    """The launch configuration of a direction on `arch` for elements of `itemsize` bytes.

    `is_plain`: there is no dropout, window, mask or length of keys, and the batch is not packed.
    """
    if arch == "interpreter":
        return _INTERPRETER
    name, row = "float32" if itemsize == 4 else arch, max(64, block_d)
    for wanted, table in ((has_dropout, _DROPOUT), (is_plain, _PLAIN)):
        if wanted and (name, direction, row) in table:
            return table[name, direction, row]
    return _TABLES.get(name, _CONSUMER)[row][_DIRECTIONS.index(direction)]


def whole_rows(keys: int, block_d: int) -> tuple[Tile, Tile] | None:
    """Tiles of dK with dV and of dQ that hold all `keys` (a power of 2) of float32 inputs; None for more than fit.

    Weights and what softmax's backward subtracts are then made within the tile, as the textbook makes them: a lone key's
    gradient is exactly 0, where sums that were rounded apart would leave their difference.
    """
    block_n = max(16, keys)
    if block_n > min(64, 4096 // block_d):
        return None
    dkdv = Tile(16, block_n, 16, 2) if block_d == 128 else Tile(16, block_n, 8, 1)
    return dkdv, Tile(16, block_n, 8, 2)
