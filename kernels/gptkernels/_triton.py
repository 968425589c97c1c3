"""What the Triton launchers share: fast launches, the device guard, hardware properties, launch configurations, column sums.

It also mends Triton's interpreter when kernels run in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

from gptkernels.backend import interpreting

# Decided here and not inherited: Triton 3.10 turns the fusion of multiply and add off by default.
FP_FUSION = {"enable_fp_fusion": True}

if interpreting():
    from gptkernels import _interpreter

    _interpreter.mend()


planned = lru_cache(maxsize=1024)
"""Caches a function that builds launches from sizes, strides, dtypes and options: it runs once for each combination."""

# The releases of Triton whose compiled kernels can be launched directly, as `Launch` does.
_DIRECT = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"], ["3", "8"], ["3", "9"])
_run = JITFunction.run  # profilers, and tools that compile differently, replace it
_ROCM = torch.version.hip is not None


class Launch:
    """A kernel with its grid and all its arguments but the tensors. Call it with the tensors, None for each unused one.

    Triton binds and inspects every argument, some forty here, at every launch. The numbers and constants of one `Launch`
    never change, so that Triton's specialisation depends only on the device, the tensors' dtypes, and whether their
    addresses are multiples of 16. The first launch with each combination goes through Triton. If all addresses are
    multiples of 16, later launches call the compiled kernel directly, with profilers' hooks. In the interpreter and in
    unknown releases of Triton every launch goes through Triton.

    Args:
        kernel: takes tensors, then `numbers`, then constants.
        grid: one to three sizes.
        numbers: integers and floats; Triton specialises the kernel for some of their values.
        constants: the kernel's constants, by name, and Triton's options (``num_warps``).
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...] = (), **constants: Any) -> None:
        self._kernel, self._grid, self._numbers = kernel, (*grid, 1, 1)[:3], numbers
        self._constants = constants | FP_FUSION
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._direct = _DIRECT and isinstance(kernel, JITFunction)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        key = None
        if self._direct and JITFunction.run is _run and not self._kernel.pre_run_hooks:
            active: Any = driver.active
            addresses, seen = 0, [active.get_current_device(), knobs.compilation.instrumentation_mode]
            for x in tensors:
                if x is None:
                    seen.append(None)
                    continue
                addresses |= x.data_ptr()
                seen.append(x.dtype)
                if _ROCM:  # Triton's AMD compiler also specialises for tensors that 32-bit offsets reach
                    seen.append(x.untyped_storage().nbytes() < 2**31)
            if addresses % 16 == 0:
                key = tuple(seen)
                if (compiled := self._compiled.get(key)) is not None:
                    compiled[self._grid](*tensors, *self._rest)
                    return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if key is not None:
            self._compiled[key] = compiled


_NO_SWITCH = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes `x`'s GPU the current one: Triton launches on the current device, wherever the arguments are."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NO_SWITCH
    return torch.cuda.device(x.device)


class Hardware(NamedTuple):
    """The hardware that a launch is configured for."""

    multiprocessors: int
    arch: str  # sm_90, sm_80, ...; hip; interpreter

    @property
    def warp_size(self) -> int:
        return 64 if self.arch == "hip" else 32


@cache
def _properties(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    arch = "hip" if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Hardware(properties.multi_processor_count, arch)


# So few multiprocessors that in the interpreter a handful of rows already spans several programs.
_INTERPRETER = Hardware(2, "interpreter")
# The hardware that tensors without data are taken to be on, set by `compiling_for`.
_compile_target: Hardware | None = None


@contextmanager
def compiling_for(arch: str, multiprocessors: int = 132) -> Iterator[None]:
    """Within it, launches on tensors that are on no GPU are configured for `arch` (see compile_report)."""
    global _compile_target
    _compile_target = Hardware(multiprocessors, arch)
    try:
        yield
    finally:
        _compile_target = None


def hardware(x: Tensor) -> Hardware:
    """Returns the GPU that `x` is on, or the interpreter."""
    if x.is_cuda:
        return _properties(x.device.index)
    return _compile_target or _INTERPRETER


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and contiguous, of `x`'s shape and device."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)  # a third of torch.empty's host time


def cdiv(n: int, by: int) -> int:
    """``ceil(n / by)``; triton.cdiv is for constants of kernels too, and typed so."""
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@planned
def _rows(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    """``(rows, columns, stride between rows)``; None where rows are not evenly spaced or columns are not adjacent."""
    *leading, columns = shape
    if columns > 1 and strides[-1] != 1:
        return None
    rows, stride = 1, strides[-2] if leading else columns
    for size, step in zip(reversed(leading), reversed(strides[:-1])):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        elif step != rows * stride:
            return None
        rows *= size
    return rows, columns, stride


def rows_and_stride(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` as rows of its last dimension: ``(tensor, rows, columns, stride between rows)``.

    Where rows are evenly spaced and columns adjacent (as in a slice of a wider tensor), the tensor is `x` itself, whatever
    its dimensions; else it is a contiguous copy. `x` must not be empty.
    """
    found = _rows(x.shape, x.stride())
    if found is None:
        x = x.contiguous()
        found = x.numel() // x.shape[-1], x.shape[-1], x.shape[-1]
    return x, *found


def whole_rows(device: Hardware, columns: int, per_thread: int, warps: int = 4) -> dict[str, int]:
    """ROWS, BLOCK and num_warps of a kernel that holds whole rows of `columns`, with `per_thread` elements a thread.

    Short rows share a program, to fill its `warps` warps.
    """
    block = next_power_of_2(columns)
    rows = max(1, min(32, 32 * warps * per_thread // block))
    # A program has at most 1,024 threads, and AMD's warps have 64. More than 16 warps leave a thread 64 registers.
    most = 32 if block > 16384 and device.arch != "hip" else 16
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(most, rows * block // (32 * per_thread)))}


# The longest row, in bytes, of which a multiprocessor works on two at a time, one's reads overlapping the other's writes.
# Two longer rows on each would outgrow the second-level cache, from which the second read of a row is to come.
_PAIRED_ROW_BYTES = 131072


def rereading_threads(row_bytes: int) -> int:
    """The number of threads of a program that reads a row of `row_bytes` twice."""
    return 512 if row_bytes <= _PAIRED_ROW_BYTES else 1024


def long_rows(device: Hardware, itemsize: int, sizes: Sequence[int], threads: int) -> dict[str, int]:
    """DEPTH, LANES and num_warps of a kernel that walks a row too long for registers in tiles of (DEPTH, LANES).

    `itemsize` is the size of the widest tensor's elements, `sizes` are the tensors' column counts and row strides. LANES
    is chosen so that one thread owns a column of the tile, whatever the loads.
    """
    # A thread takes 16 elements in loads of 16 bytes, or 8 where rows allow no wide loads: more addresses would not fit
    # its registers.
    aligned = all(size % 16 == 0 for size in sizes)
    lanes, elements = (16 // itemsize, 16) if aligned else (2, 8)
    return {"DEPTH": elements // lanes, "LANES": threads * lanes, "num_warps": threads // device.warp_size}


def row_tile(rows: int, columns: int) -> dict[str, int]:
    """ROWS, BLOCK and num_warps of a kernel that sums columns: tall tiles, so that few programs share a column."""
    tall = min(16, next_power_of_2(rows))
    block = min(4096 // tall, next_power_of_2(columns))
    return {"ROWS": tall, "BLOCK": block, "num_warps": max(1, tall * block // 512)}


def registers(device: Hardware, threads: int) -> dict[str, int]:
    """The bound of registers a thread with which `threads` fit one of NVIDIA's multiprocessors.

    Without it, ptxas may spill a few registers to use fewer.
    """
    return {"maxnreg": 65536 // threads} if device.arch.startswith("sm_") else {}


# The shared memory that a program may fill, in KiB, less some for reductions. Other architectures get the least, 96.
_SHARED_KIB = {"sm_80": 160, "sm_90": 224, "sm_100": 224, "hip": 60}


def share_rows(
    device: Hardware, tile: dict[str, int], rows: int, columns: int, read: Sequence[int]
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel whose programs sum columns over a share of `rows`: ``(shares, blocks of columns)``.

    There are 16 warps a multiprocessor, few enough that their partial sums cost little to write and add. To keep memory
    busy, the tensors (`read` bytes an element) are loaded two steps ahead (STAGES) where shared memory has room.
    """
    blocks, steps = cdiv(columns, tile["BLOCK"]), cdiv(rows, tile["ROWS"])
    programs = max(1, 16 * device.multiprocessors // (tile["num_warps"] * blocks))
    shares = cdiv(steps, cdiv(steps, programs))  # of equal size
    ahead = 2 * tile["ROWS"] * tile["BLOCK"] * sum(read)
    room = _SHARED_KIB.get(device.arch, 96) * 1024
    return (shares, blocks), {**tile, "STAGES": 3 if ahead <= room else 1} | registers(device, 512)


# Threads, and columns of the block, of a program that is a member of a team.
_TEAM_THREADS = 512
_TEAM_BLOCK = 1024


def team_rows(
    device: Hardware, rows: int, columns: int, itemsize: int, strides: Sequence[int]
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel whose programs work on long rows in teams: ``(members of a team, teams)``.

    A team has a member for every block of columns, and works on as many rows at a time as it has members. There is one
    program a multiprocessor, so that these rows stay in the second-level cache.
    """
    members = cdiv(columns, _TEAM_BLOCK)
    teams = max(1, min(device.multiprocessors // members, cdiv(rows, members)))
    # Rows of a block: two loads of 16 bytes a thread.
    tall = _TEAM_THREADS * 32 // itemsize // _TEAM_BLOCK
    constants = long_rows(device, itemsize, (columns, *strides), _TEAM_THREADS)
    return (members, teams), {**constants, "ROWS": tall, "BLOCK": _TEAM_BLOCK} | registers(device, 512)


@triton.jit
def _sum_partials_kernel(PARTIAL, FIRST, SECOND, P, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the columns of PARTIAL (parts, P, N) in a fixed order: the first part's to FIRST, the second's to SECOND."""
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


@planned
def _sum_launch(parts: int, count: int, columns: int) -> Launch:
    tall = min(128, next_power_of_2(count))
    block = 4096 // tall
    grid = cdiv(columns, block), parts
    return Launch(_sum_partials_kernel, grid, (count, columns), ROWS=tall, BLOCK=block, num_warps=8)


def sum_partials(partial: Tensor, totals: list[Tensor]) -> None:
    """Computes ``totals[i] = partial[i].sum(0)`` for up to two totals; `partial` is float32 ``(len(totals), P, N)``.

    The order of the sum is fixed.
    """
    if totals:
        _sum_launch(*partial.shape)(partial, totals[0], totals[-1])
