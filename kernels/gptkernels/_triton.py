"""What the Triton launchers share: the mended interpreter, the device guard, the device's size, tiles, and column sums.

Beside the operations' own ``triton.py`` this is the only module that imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptkernels.backend import interpreting

# Decided here and not inherited: Triton 3.10 turns the fusion of multiply and add off by default.
FP_FUSION = {"enable_fp_fusion": True}

if interpreting():
    from gptkernels import _interpreter

    _interpreter.mend()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes `x`'s GPU the current one: Triton launches on the current device, whatever its arguments live on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _properties(index: int) -> tuple[int, str]:
    properties = torch.cuda.get_device_properties(index)
    arch = "hip" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return properties.multi_processor_count, arch


# The device that meta tensors stand for, in `compiling_for`.
_compile_target: tuple[int, str] | None = None


@contextmanager
def compiling_for(arch: str, multiprocessors: int = 132) -> Iterator[None]:
    """Launchers given tensors without data configure themselves for `arch` (see compile_report)."""
    global _compile_target
    _compile_target = (multiprocessors, arch)
    try:
        yield
    finally:
        _compile_target = None


def _device(x: Tensor) -> tuple[int, str]:
    if x.is_cuda:
        return _properties(x.device.index)
    if x.is_meta and _compile_target:
        return _compile_target
    return 2, "interpreter"


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of `x`'s GPU; 2 in the interpreter, so that a handful of rows already spans several programs."""
    return _device(x)[0]


def architecture(x: Tensor) -> str:
    """``sm_90``, ``sm_80``, ... or ``hip``; ``interpreter`` on the CPU."""
    return _device(x)[1]


def cdiv(n: int, by: int) -> int:
    """``ceil(n / by)``; triton.cdiv is for constants of kernels too, and typed so."""
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rows_and_stride(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` as rows of its last dimension: ``(tensor, rows, columns, stride between rows)``.

    Read in place where one stride describes all rows and columns are adjacent (a slice of a wider tensor, say),
    copied otherwise. `x` is not empty.
    """
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)  # a view wherever one stride describes the rows
    if columns > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.shape[0], columns, flat.stride(0)


def warp_size(x: Tensor) -> int:
    """Threads of a warp on `x`'s device."""
    return 64 if architecture(x) == "hip" else 32


def whole_rows(x: Tensor, columns: int, per_thread: int, warps: int = 4) -> dict[str, int]:
    """ROWS, BLOCK and num_warps of a kernel that holds rows of `columns` whole, `per_thread` elements a thread, on `x`'s device.

    Short rows share a program, so that it has `warps` warps.
    """
    block = next_power_of_2(columns)
    rows = max(1, min(32, 32 * warps * per_thread // block))
    # A program has at most 1,024 threads, and AMD's warps have 64. More than 16 warps leave a thread 64 registers.
    most = 32 if block > 16384 and architecture(x) != "hip" else 16
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(most, rows * block // (32 * per_thread)))}


# A row that is read twice is in cache the second time. Two rows a multiprocessor overlap one's reads with the other's
# writes; rows of more bytes than this come one at a time, or those in flight outgrow the second-level cache.
_SHARED_BYTES = 131072


def rereading_threads(row_bytes: int) -> int:
    """Threads of a program that reads a row of so many bytes twice."""
    return 512 if row_bytes <= _SHARED_BYTES else 1024


def long_rows(read: list[Tensor], sizes: Sequence[int], threads: int) -> dict[str, int]:
    """DEPTH, LANES and num_warps of a kernel that takes a row too long for registers in tiles of (DEPTH, LANES).

    `sizes`: how many columns of the tensors are read, and how far their rows are apart. LANES is such that a column of
    the tile belongs to one thread, whatever the loads.
    """
    # Per thread 16 elements in loads of 16 bytes; of rows that allow no wide loads 8, whose addresses fill the registers.
    aligned = all(size % 16 == 0 for size in sizes)
    lanes, elements = (16 // max(t.element_size() for t in read), 16) if aligned else (2, 8)
    return {"DEPTH": elements // lanes, "LANES": threads * lanes, "num_warps": threads // warp_size(read[0])}


def row_tile(rows: int, columns: int) -> dict[str, int]:
    """ROWS, BLOCK and num_warps of a kernel that adds columns up: tall, so that few programs share a column."""
    tall = min(16, next_power_of_2(rows))
    block = min(4096 // tall, next_power_of_2(columns))
    return {"ROWS": tall, "BLOCK": block, "num_warps": max(1, tall * block // 512)}


def registers(x: Tensor, threads: int) -> dict[str, int]:
    """The registers of a thread where `threads` have a multiprocessor of NVIDIA's: left to itself, ptxas may spill a few to
    need fewer."""
    return {"maxnreg": 65536 // threads} if architecture(x).startswith("sm_") else {}


# Shared memory that a program may fill, KiB, less a little for reductions; of other architectures the least.
_SHARED_KIB = {"sm_80": 160, "sm_90": 224, "sm_100": 224, "hip": 60}


def share_rows(
    tile: dict[str, int], rows: int, columns: int, read: list[Tensor]
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel that walks a share of `rows`, adding columns up: ``(shares, blocks of columns)``.

    16 warps a multiprocessor: few enough that their partial sums cost little to write and add. Memory is kept busy by
    loading two steps of `read` ahead (STAGES), where shared memory has the room.
    """
    blocks, steps = cdiv(columns, tile["BLOCK"]), cdiv(rows, tile["ROWS"])
    programs = max(1, 16 * multiprocessors(read[0]) // (tile["num_warps"] * blocks))
    shares = cdiv(steps, cdiv(steps, programs))  # even ones
    ahead = 2 * tile["ROWS"] * tile["BLOCK"] * sum(t.element_size() for t in read)
    room = _SHARED_KIB.get(architecture(read[0]), 96) * 1024
    return (shares, blocks), {**tile, "STAGES": 3 if ahead <= room else 1} | registers(read[0], 512)


# Of a program of a team: its threads, and the columns of its block.
_TEAM_THREADS = 512
_TEAM_BLOCK = 1024


def team_rows(
    rows: int, columns: int, read: list[Tensor], strides: list[int]
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel whose programs take long rows in teams: ``(members of a team, teams)``.

    A team has a member for every block of columns, and takes as many rows at a time. One program a multiprocessor: the
    rows that are being worked on shall stay in the second-level cache.
    """
    members = cdiv(columns, _TEAM_BLOCK)
    teams = max(1, min(multiprocessors(read[0]) // members, cdiv(rows, members)))
    # Rows of a block: two loads of 16 bytes a thread.
    tall = _TEAM_THREADS * 32 // max(t.element_size() for t in read) // _TEAM_BLOCK
    constants = long_rows(read, (columns, *strides), _TEAM_THREADS)
    return (members, teams), {**constants, "ROWS": tall, "BLOCK": _TEAM_BLOCK} | registers(read[0], 512)


@triton.jit
def _sum_partials_kernel(PARTIAL, FIRST, SECOND, P, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Column sums of PARTIAL (parts, P, N), each part in a fixed order: of the first to FIRST, of another to SECOND."""
    part = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < N
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < P)[:, None] & inside[None, :]
        offsets = (part * P + rows).to(tl.int64)[:, None] * N + cols[None, :]
        total += tl.load(PARTIAL + offsets, mask=mask, other=0.0)
    if part == 0:
        tl.store(FIRST + cols, tl.sum(total, axis=0), mask=inside)
    else:
        tl.store(SECOND + cols, tl.sum(total, axis=0), mask=inside)


def sum_partials(partial: Tensor, totals: list[Tensor]) -> None:
    """``totals[i] = partial[i].sum(0)`` for one or two totals: partial float32 ``(len(totals), P, N)``, fixed order."""
    if not totals:
        return
    parts, count, columns = partial.shape
    tall = min(128, next_power_of_2(count))
    constants: dict[str, Any] = {"ROWS": tall, "BLOCK": 4096 // tall, "num_warps": 8} | FP_FUSION
    grid = cdiv(columns, constants["BLOCK"]), parts
    _sum_partials_kernel[grid](partial, totals[0], totals[-1], count, columns, **constants)
