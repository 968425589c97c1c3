"""Fills Triton's cache with the kernels that tests and benches launch on this GPU, many at a time: ``python -m bench.prewarm``.

A process that launches a kernel for the first time compiles it, one after the other; on a machine that is rented by the
minute that is most of the time. Here every core compiles, from launches recorded on tensors without data, and each
kernel is loaded once, with the C code that launches it: one that does not fit the GPU is known before anything is timed.
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
    """What these operations launch, each kernel once: by dtype, the first in the order of `ops`, the others in reverse."""
    found: list[compile_report.Launch] = []
    for dtype in dtypes:
        found += compile_report.launches((target,), ops if dtype == dtypes[0] else ops[::-1], (dtype,))
    return found


def warm(launch: compile_report.Launch, load: bool) -> str:
    """Compiles one; why it failed, or nothing."""
    import triton

    try:
        kernel: Any = triton.compile(launch.source, target=launch.gpu, options=launch.options)
        if load:
            kernel._init_handles()  # builds and caches the launcher, then asks the GPU for the kernel's resources
    except Exception as error:  # that one fails where it is launched
        what = f"{launch.op} {launch.case} {launch.dtype} {launch.source.fn.fn.__name__}"
        return f"{what}: {type(error).__name__}: {error}".strip()[:300]
    return ""


def _work(ops: Sequence[str], dtypes: Sequence[str], target: str, load: bool, last: int, taken: Any, done: Any) -> None:
    """One of the processes: records for itself, then takes the next launch until none is left."""
    found = recorded(ops, dtypes, target)[-last:]
    while True:
        with taken:
            index = taken.value
            taken.value += 1
        if index >= len(found):
            return
        done.put(warm(found[index], load))


def warm_all(ops: Sequence[str], dtypes: Sequence[str], target: str, jobs: int, load: bool, last: int = 0) -> list[str]:
    """What became of each launch, `last` of them (0: all), compiled `jobs` at a time: why it failed, or nothing.

    What is recorded cannot be sent to another process, and one forked after recording could not use the GPU.
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
    ops.sort(key=lambda name: not name.startswith("attention"))  # most wanted, and longest to compile
    parser.add_argument("ops", nargs="*", help=f"operations (default: all): {', '.join(ops)}")
    parser.add_argument("--dtype", action="append", choices=compile_report.DTYPES, help="default: bf16, then fp32")
    parser.add_argument("--target", choices=compile_report.TARGETS, default="sm_90", help="default: sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--dry-run", action="store_true", help="compile a few, and load none: where there is no GPU")
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
