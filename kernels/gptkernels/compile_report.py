"""Compiles every Triton kernel for given GPUs, without having one, and reads the machine code.

``python -m gptkernels.compile_report --target sm_90`` runs each operation's launchers, forward and backward, over the cases
of its spec, with tensors that have no data. Triton specialises every launch as it would on that GPU; the kernel is then
compiled and not run. For each kernel in its shipped configuration the report prints registers, spills, shared memory, the
programs that a multiprocessor runs at a time, and the matrix instructions. It exits with 1 if a kernel does not fit its
target, or if ptxas makes each wgmma wait for the one before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from gptkernels import _sass
from gptkernels._spec import Case, OpSpec
from gptkernels.backend import interpreting


@dataclass(frozen=True)
class Target:
    """An architecture, and the card that launches are configured for."""

    name: str
    card: str
    multiprocessors: int
    shared_bytes: int  # that one program may use
    resident_threads: int = 2048  # of one multiprocessor
    resident_blocks: int = 32
    backend: str = "cuda"
    warp_size: int = 32
    max_threads: int = 1024  # of one program

    @property
    def launcher_arch(self) -> str:
        """The name of the architecture in `_triton.Hardware`."""
        return self.name if self.backend == "cuda" else self.backend

    def blocks(self, num_warps: int, registers: int, shared_bytes: int) -> int:
        """How many programs of a kernel an NVIDIA multiprocessor runs at a time; 0 if one does not fit.

        A multiprocessor has 65,536 registers, in equal quarters; a warp gets them in units of 256. Its shared memory is
        1 KiB more than one program may use, in units of 128 bytes; a program takes 1 KiB more than it asks for.
        """
        warps = 4 * (65536 // 4 // max(-(-registers * 32 // 256) * 256, 256))
        shared = -(-(shared_bytes + 1024) // 128) * 128
        return min(
            warps // num_warps,
            (self.shared_bytes + 1024) // shared,
            self.resident_threads // (num_warps * 32),
            self.resident_blocks,
        )


# From the CUDA programming guide, table of technical specifications per compute capability, and from AMD's instruction set
# manuals, local data share.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", 108, 163 * 1024),
        Target("sm_86", "A10, RTX 3090", 84, 99 * 1024, 1536, 16),
        Target("sm_89", "L40S, RTX 4090", 142, 99 * 1024, 1536, 24),
        Target("sm_90", "H100", 132, 227 * 1024),
        Target("sm_100", "B200", 148, 227 * 1024),
        Target("sm_120", "RTX 5090", 170, 99 * 1024, 1536, 24),
        Target("gfx90a", "MI250X", 110, 64 * 1024, backend="hip", warp_size=64),
        Target("gfx942", "MI300X", 304, 64 * 1024, backend="hip", warp_size=64),
    )
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Matrix instructions in PTX and in AMD's assembly.
_MATRIX = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "mma": r"\bmma\.sync",
    "mfma": r"\bv_mfma_",
}
_DOT = re.compile(r"= tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)>")


@dataclass(frozen=True)
class Compiled:
    """The figures of one kernel's machine code in one configuration."""

    op: str
    case: str
    dtype: str
    folder: str  # where the kernel is defined
    kernel: str
    target: str
    num_warps: int
    registers: int = 0
    spills: int = 0  # NVIDIA: instructions on local memory; AMD: vector registers kept in scratch memory
    shared_bytes: int = 0
    blocks: int = 0  # programs that a multiprocessor runs at a time; 0 on AMD, where it is not computed
    maxnreg: int | None = None  # the launch's bound of registers a thread
    wgmma_serialised: bool = False  # whether each waits for the one before it
    matrix: dict[str, int] = field(default_factory=dict)  # instructions by kind
    dots: int = 0  # matrix products of 16-bit operands in the kernel's source
    dot_rows: int = 0  # the fewest rows of one of these products: fewer than 64 do not fill a warp group's instruction
    error: str = ""  # why it does not compile

    def faults(self) -> list[str]:
        """Why the kernel cannot run, or not well, on its target; empty if it can."""
        target = TARGETS[self.target]
        faults = [self.error] if self.error else []
        if self.spills:
            faults.append(f"{self.spills} spills")
        if self.shared_bytes > target.shared_bytes:
            faults.append(f"more than {target.shared_bytes} bytes of shared memory")
        if (threads := self.num_warps * target.warp_size) > target.max_threads:
            faults.append(f"{threads} threads, more than {target.max_threads}")
        if self.wgmma_serialised:
            faults.append("wgmma serialised")
        if self.maxnreg and self.blocks < (meant := target.blocks(self.num_warps, self.maxnreg, 0)):
            faults.append(f"{self.blocks} of the {meant} blocks a multiprocessor that maxnreg={self.maxnreg} is for")
        if self.dots and not self.matrix:
            faults.append("16-bit products without matrix instructions")
        return faults

    def row(self) -> str:
        case = f"{self.op} {self.case} {self.dtype}"
        matrix = ", ".join(f"{count} {kind}" for kind, count in self.matrix.items())
        row = f"{self.target:<7} {case:<56} {self.kernel:<26} {self.num_warps:>5} {self.registers:>9} {self.spills:>6} "
        row += f"{self.shared_bytes:>9} {self.blocks or '':>6}  {matrix}"
        return f"{row}  <- {'; '.join(faults)}" if (faults := self.faults()) else row


HEADER = (
    f"{'target':<7} {'case':<56} {'kernel':<26} {'warps':>5} {'registers':>9} {'spills':>6} {'shared B':>9} "
    f"{'blocks':>6}  matrix"
)


@dataclass(frozen=True)
class Launch:
    """A launch that Triton would compile when `case` runs; the last three fields are ``triton.compile``'s arguments."""

    op: str
    case: str
    dtype: str
    target: Target
    source: Any
    gpu: Any
    options: dict[str, Any]


class _Driver:
    """Stands in for the driver of a GPU; Triton asks it what to specialise a launch for."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def get_current_target(self) -> Any:
        return self.gpu

    def get_current_device(self) -> Any:
        return self  # Triton keys its compiled kernels by this: each driver starts with none

    def get_current_stream(self, device: Any) -> int:
        return 0


class _NotRun:
    """Stands in for a compiled kernel; launching it does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, x: int, y: int, z: int, *args: Any) -> None:
        if max(y, z) > 65535:  # CUDA programming guide, table of technical specifications
            raise ValueError(f"a launch's grid is {(x, y, z)}; the second and third dimension may be 65535 at most")

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: None  # a launch like one that was recorded


@contextmanager
def _recorded(target: Target) -> Iterator[list[tuple[Any, ...]]]:
    """Within it, launches on tensors without data are configured for `target` and recorded.

    The list receives ``triton.compile``'s arguments for each distinct launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from gptkernels import _library, _triton, backend

    arch = int(target.name.removeprefix("sm_")) if target.backend == "cuda" else target.name
    driver = _Driver(GPUTarget(target.backend, arch, target.warp_size))

    recorded: list[tuple[Any, ...]] = []

    def compile_later(source: Any, target: Any, options: dict[str, Any], **_: Any) -> _NotRun:
        recorded.append((source, target, options))
        return _NotRun()

    # Call the launchers themselves: with tensors without data, the ops would run their fake implementations.
    direct = SimpleNamespace(**{name: load() for name, load in _library.launchers.items()})
    with (
        mock.patch.object(_library, "ops", return_value=direct),
        mock.patch.object(backend, "_why_not", return_value=None),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(triton.compiler, "compile", compile_later),
        _triton.compiling_for(target.launcher_arch, target.multiprocessors),
    ):
        yield recorded


class _Literals(TorchFunctionMode):
    """Makes tensors of given numbers on the CPU, with their data: specs read lengths back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu"} | kwargs if func is torch.tensor else kwargs))


def _run_without_data(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    """Runs the operation without gradients, then forward and backward, on meta tensors."""
    from gptkernels.testing import outputs

    with torch.device("meta"), _Literals():  # the spec's random tensors have no data either, and cost no time or memory
        inputs = spec.make_inputs(case, dtype, torch.device("meta"), 0)
        with torch.no_grad():
            spec.function(**inputs.tensors, **inputs.options, backend="triton")
        leaves = inputs.mapped(lambda t: t.detach().requires_grad_(True))
        result = outputs(spec.function(**leaves.tensors, **leaves.options, backend="triton"))
        outs = [out for out in result if out.requires_grad]
        grads = [torch.empty_like(out) for out in outs]
        torch.autograd.grad(outs, list(leaves.differentiable().values()), grads, allow_unused=True)


def _amd_metadata(name: str, assembly: str) -> int:
    value = re.search(rf"\.{name}:\s*(\d+)", assembly)
    assert value is not None, name
    return int(value.group(1))


def _compile(launch: Launch) -> Compiled:
    import triton

    function = launch.source.fn.fn
    folder = function.__module__.split(".")[-2]
    num_warps = launch.options["num_warps"]
    names = (launch.op, launch.case, launch.dtype, folder, function.__name__, launch.target.name, num_warps)
    try:
        kernel = triton.compile(launch.source, target=launch.gpu, options=launch.options)
    except Exception as error:  # a kernel that does not compile becomes a line of the report
        message = str(error).strip().splitlines() or [""]
        return Compiled(*names, error=f"{type(error).__name__}: {message[-1]}"[:200])
    dot_rows = [int(rows) for rows in _DOT.findall(kernel.asm["ttir"])]
    shared_bytes, cuda = kernel.metadata.shared, launch.target.backend == "cuda"
    assembly = kernel.asm["ptx" if cuda else "amdgcn"]
    matrix = {kind: count for kind, name in _MATRIX.items() if (count := len(re.findall(name, assembly)))}
    blocks, serialised = 0, False
    if cuda:
        registers, stack = _sass.resources(kernel.asm["cubin"])
        spills = 0
        if stack or "wgmma" in matrix:  # disassembling takes as long as compiling
            code = _sass.disassemble(kernel.asm["cubin"])
            spills, serialised = code.spills, code.wgmma_serialised
        blocks = launch.target.blocks(num_warps, registers, shared_bytes)
    else:
        registers, spills = _amd_metadata("vgpr_count", assembly), _amd_metadata("vgpr_spill_count", assembly)
    return Compiled(
        *names,
        registers=registers,
        spills=spills,
        shared_bytes=shared_bytes,
        blocks=blocks,
        maxnreg=launch.options.get("maxnreg"),
        wgmma_serialised=serialised,
        matrix=matrix,
        dots=len(dot_rows),
        dot_rows=min(dot_rows, default=0),
    )


def launches(
    targets: Sequence[str] = ("sm_90",),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = ("bf16", "fp32"),
    *,
    main: bool = False,
    every_case: bool = False,
    cases: Sequence[Case] = (),
) -> list[Launch]:
    """Returns each distinct launch that the specs' bench and compile cases make on each target.

    Args:
        targets: names in `TARGETS`.
        ops: operations that have Triton kernels; empty for all.
        dtypes: "bf16", "fp16", "fp32".
        main: only the compile cases, of a spec that has some.
        every_case: also the small shapes that the tests run.
        cases: cases of one operation, in place of the specs'.

    Raises:
        ValueError: an unknown target, operation or dtype.
        RuntimeError: ``TRITON_INTERPRET=1`` is set (interpreted kernels have no machine code).
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is 1: unset it, interpreted kernels have no machine code")
    from gptkernels.backend import FUSED
    from gptkernels.testing import SPECS

    specs = {spec.name: spec for spec in SPECS if "triton" in FUSED[spec.name]}
    for name, values, accepted in (("targets", targets, TARGETS), ("ops", ops, specs), ("dtypes", dtypes, DTYPES)):
        if unknown := set(values) - set(accepted):
            raise ValueError(f"{name}: got {sorted(unknown)}; accepted are {', '.join(accepted)}")
    found: list[Launch] = []
    for target in map(TARGETS.__getitem__, targets):
        with _recorded(target) as recorded:
            for op in ops or specs:
                own = () if main and specs[op].compile_cases else specs[op].bench_cases
                own += specs[op].compile_cases + (specs[op].cases if every_case else ())
                for dtype, case in itertools.product(dtypes, cases or own):
                    _run_without_data(specs[op], case, DTYPES[dtype])
                    found += [Launch(op, case.name, dtype, target, *arguments) for arguments in recorded]
                    recorded.clear()
    return found


def compile_launches(found: Sequence[Launch], jobs: int | None = None) -> Iterator[Compiled]:
    """Compiles the launches, `jobs` at a time (None: one a core), and yields each one's figures in order.

    Threads suffice: MLIR, LLVM and the assembler release Python's lock.
    """
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        yield from pool.map(_compile, found)


def summary(target: str, results: Sequence[Compiled]) -> str:
    """Returns a line about one target's kernels, and a line for each kernel that does not fit it."""
    limit, card = TARGETS[target].shared_bytes, TARGETS[target].card
    faulty = [result for result in results if result.faults()]
    line = f"{target} ({card}): {len(results)} kernels, {len(faulty)} do not fit"
    if results:
        line += f"; at most {max(r.registers for r in results)} registers a thread and "
        line += f"{max(r.shared_bytes for r in results)} of {limit} bytes of shared memory"
    return "\n".join([line, *(f"  {r.op} {r.case} {r.dtype} {r.kernel}: {'; '.join(r.faults())}" for r in faulty)])


EXAMPLES = """examples:
  python -m gptkernels.compile_report                                   every shipped configuration, for an H100
  python -m gptkernels.compile_report --target all --main --dtype bf16  the main ones, for every target
  python -m gptkernels.compile_report --target gfx942 --op attention --json report.json
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gptkernels.compile_report",
        description="Compile every Triton kernel in its shipped configurations, without a GPU, and report its machine code.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target",
        action="append",
        choices=[*TARGETS, "all"],
        help="architecture; may be repeated (default: sm_90)",
    )
    parser.add_argument("--op", action="append", default=[], help="an operation; may be repeated (default: all)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated (default: bf16 and fp32)")
    parser.add_argument("--main", action="store_true", help="only each operation's main configurations")
    parser.add_argument("--every-case", action="store_true", help="also the small shapes that the tests run")
    parser.add_argument("--jobs", type=int, help="kernels compiled at a time (default: one a core)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    start = time.perf_counter()
    chosen = options.target or ["sm_90"]
    targets = list(TARGETS) if "all" in chosen else list(dict.fromkeys(chosen))
    found = launches(
        targets, options.op, options.dtype or ("bf16", "fp32"), main=options.main, every_case=options.every_case
    )
    print(f"{'':>11} {HEADER}", file=sys.stderr)
    results: list[Compiled] = []
    for result in compile_launches(found, options.jobs):
        results.append(result)
        print(f"{f'[{len(results)}/{len(found)}]':>11} {result.row()}", file=sys.stderr, flush=True)
    if options.json:
        rows = [asdict(result) | {"faults": result.faults()} for result in results]
        options.json.write_text(json.dumps(rows, indent=1))
    for target in targets:
        print(summary(target, [result for result in results if result.target == target]))
    print(f"{len(results)} kernels compiled in {time.perf_counter() - start:.0f} s")
    return 1 if any(result.faults() for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
