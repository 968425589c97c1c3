"""The shipped launch configurations of the attention kernels: one tile for each direction, architecture, dtype and head_dim.

They are chosen so that under Triton 3.6, 3.7.1, 3.8 and 3.9 no kernel spills registers or waits for each of its products,
and each fits its target's shared memory (`tests/kernels/test_compile.py` checks the main ones). Nothing is tuned at first
use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Tile:
    """`block_m` queries by `block_n` keys, computed by `num_warps` warps, with `num_stages` loads in flight.

    `maxnreg` bounds a thread's registers where that lets a multiprocessor run one more program. CUDA only.
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
        """Returns the tile with at most `queries` queries, a power of 2; but at least 16."""
        return replace(self, block_m=min(self.block_m, max(16, queries)))


# Columns: the forward, dK with dV, dQ, the forward of few queries. Rows: padded head_dim up to 64, 128, 256.
_Row = tuple[Tile, Tile, Tile, Tile]
_Table = dict[int, _Row]
_HOPPER: _Table = {  # 227 kB of shared memory
    64: (Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(16, 128, 4, 3)),
    128: (Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(16, 64, 4, 3)),
    256: (Tile(128, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 64, 8, 2), Tile(16, 32, 4, 3)),
}
_BLACKWELL: _Table = {  # 227 kB; accumulators are in tensor memory, and moving them through registers costs
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
_FLOAT32: _Table = {  # any architecture, within 99 kB: IEEE products, which the matrix units do not compute
    64: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 4, 2)),
    128: (Tile(32, 16, 8, 2), Tile(16, 32, 8, 1), Tile(32, 16, 8, 2), Tile(16, 16, 4, 2)),
    256: (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 4, 2)),
}
# By table, direction and row, tiles for plain attention: full or causal, without dropout, window, masks or packing. They
# leave no registers for more. bench/tune.py finds them.
_PLAIN = {
    ("sm_90", "forward", 64): Tile(128, 64, 8, 3, 128),
    ("sm_90", "dq", 64): Tile(128, 64, 8, 3, 128),
    ("sm_90", "forward", 128): Tile(128, 128, 8, 2),
    ("float32", "dq", 128): Tile(16, 32, 8, 2),
}
# Tiles for attention with dropout, whose random numbers take registers.
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
# In the interpreter a tile's cost does not depend on its size; with small tiles, short test sequences have several.
_INTERPRETER = Tile(32, 16, 1, 1)


def tile(
    direction: str, arch: str, itemsize: int, block_d: int, has_dropout: bool = False, is_plain: bool = False
) -> Tile:
    """Returns the launch configuration of a direction on `arch` for elements of `itemsize` bytes.

    `is_plain` says that there is no dropout, window, key mask or key lengths, and that the batch is not packed.
    """
    if arch == "interpreter":
        return _INTERPRETER
    name, row = "float32" if itemsize == 4 else arch, max(64, block_d)
    for wanted, table in ((has_dropout, _DROPOUT), (is_plain, _PLAIN)):
        if wanted and (name, direction, row) in table:
            return table[name, direction, row]
    return _TABLES.get(name, _CONSUMER)[row][_DIRECTIONS.index(direction)]


def whole_rows(keys: int, block_d: int) -> tuple[Tile, Tile] | None:
    """Returns tiles of dK with dV, and of dQ, that hold all `keys` (a power of 2) of float32 inputs; None if they do not fit.

    The weights and the row sums of softmax's backward are then computed within the tile, from the same rounded numbers: the
    gradient of a lone key's score is exactly 0, and not the difference of two sums that were rounded separately.
    """
    block_n = max(16, keys)
    if block_n > min(64, 4096 // block_d):
        return None
    dkdv = Tile(16, block_n, 16, 2) if block_d == 128 else Tile(16, block_n, 8, 1)
    return dkdv, Tile(16, block_n, 8, 2)
