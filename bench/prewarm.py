"""Compiles all Triton kernels that tests and benches launch, on every core, into Triton's cache: ``python -m bench.prewarm``.

Otherwise a process compiles each kernel when it first launches it, one after another, which on a machine rented by the
minute takes most of the time. The launches are recorded on tensors without data. Each kernel is also loaded once on the
GPU, with the C code that launches it, so that one that does not fit is known before anything is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from gptkernels import compile_report
from gptkernels.backend import FUSED


def recorded(ops: Sequence[str], dtypes: Sequence[str], target: str) -> list[compile_report.Launch]:
    """What these operations launch, each kernel once: dtype by dtype, the first in the order of `ops`, the others in reverse."""
    found: list[compile_report.Launch] = []
    for dtype in dtypes:
        found += compile_report.launches((target,), ops if dtype == dtypes[0] else ops[::-1], (dtype,))
    return found


def warm(launch: compile_report.Launch, load: bool) -> str:
    """Compiles one kernel; returns why it failed, or an empty text."""
    import triton

    try:
        kernel: Any = triton.compile(launch.source, target=launch.gpu, options=launch.options)
        if load:
            kernel._init_handles()  # builds and caches the launcher, and loads the kernel on the GPU
    except Exception as error:  # reported; the launch will raise it again
        what = f"{launch.op} {launch.case} {launch.dtype} {launch.source.fn.fn.__name__}"
        return f"{what}: {type(error).__name__}: {error}".strip()[:300]
    return ""


def _work(ops: Sequence[str], dtypes: Sequence[str], target: str, load: bool, last: int, taken: Any, done: Any) -> None:
    """A worker: records all launches, then takes the next index from `taken` until no launch is left."""
    found = recorded(ops, dtypes, target)[-last:]
    while True:
        with taken:
            index = taken.value
            taken.value += 1
        if index >= len(found):
            return
        done.put(warm(found[index], load))


def warm_all(ops: Sequence[str], dtypes: Sequence[str], target: str, jobs: int, load: bool, last: int = 0) -> list[str]:
    """Compiles the `last` launches (0: all) in `jobs` processes; returns for each why it failed, or an empty text.

    Each process records the launches by itself, because they cannot be pickled, and a fork could not use the GPU.
    """
    context = multiprocessing.get_context("spawn")
    taken, done = context.Value("i", 0), context.SimpleQueue()
    workers = [context.Process(target=_work, args=(ops, dtypes, target, load, last, taken, done)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    results: list[str] = []
    while any(worker.is_alive() for worker in workers) or not done.empty():
        while not done.empty():
            results.append(done.get())
        time.sleep(0.05)
    return results + [f"a process ended with {worker.exitcode}" for worker in workers if worker.exitcode]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prewarm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m bench.prewarm\n  python -m bench.prewarm attention --dtype bf16",
    )
    ops = [name for name, backends in FUSED.items() if "triton" in backends]
    ops.sort(key=lambda name: not name.startswith("attention"))  # needed first, and slowest to compile
    parser.add_argument("ops", nargs="*", help=f"operations (default: all): {', '.join(ops)}")
    parser.add_argument("--dtype", action="append", choices=compile_report.DTYPES, help="default: bf16, then fp32")
    parser.add_argument("--target", choices=compile_report.TARGETS, default="sm_90", help="default: sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--dry-run", action="store_true", help="compile three and load none; needs no GPU")
    options = parser.parse_args(arguments)
    start, dtypes = time.monotonic(), options.dtype or ("bf16", "fp32")
    jobs, last = options.jobs or 1, 3 if options.dry_run else 0
    results = warm_all(options.ops or ops, dtypes, options.target, jobs, not options.dry_run, last)
    failed = [why for why in results if why]
    for why in failed:
        print(why)
    print(f"{len(results) - len(failed)} of {len(results)} kernels compiled in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
