"""Times the Triton kernels on this machine's GPU against PyTorch and other libraries: ``python -m bench.gpu``.

All contenders of a row are timed in turns in one process, and medians are compared. Each call starts with an empty L2 cache,
and only the GPU's time is measured; training steps are timed by the clock. A kernel whose results are outside the float64
error budget is not timed, a peer whose results differ is left out, and the file says why. Each group of rows runs in a
process of its own, and every row is saved as soon as it is done, so a run that is cut keeps what it has. Peers that take
long to compile (torch.compile, FlexAttention) come last: their rows are then timed again with them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_rows import GROUPS, Plan, measured
from bench.gpu_table import continue_file, section, short_table, take_in
from bench.measure import BF16, FP32, RESULTS, add_saving_options, device, save, short, versions

LEAST = 15.0  # seconds: with less time left, no group is started


def machine(plan: Plan, commit: str | None = None) -> dict[str, Any]:
    """What a result was measured on. `commit`: see `versions`."""
    import triton

    return {
        "gpu": "no GPU (dry run)" if plan.dry else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        **versions(commit),
        "copy_gb_per_s": plan.ceiling(FP32)[0] / 1e9,
        "product_tflop_per_s": {short(BF16): plan.ceiling(BF16)[1] / 1e12},
    }


def passes(groups: Sequence[str], plan: Plan, late: bool) -> list[tuple[str, bool]]:
    """``(group, late)`` in the order to run: every group, then, `late`, those with peers to compile; or only the latter."""
    again = [] if plan.quick else [(group, True) for group in groups if group != "training"]
    return again if late else [*((group, False) for group in groups), *again]


def run_groups(
    groups: Sequence[tuple[str, bool]], plan: Plan, saved: dict[str, Any], file: Path, deadline: float
) -> None:
    """Runs each of `passes` in a process of its own and saves after each row, until `deadline` (of `time.monotonic`)."""
    for group, late in groups:
        name = f"{group}, with compiled peers" if late else group
        left = deadline - time.monotonic()
        if left < LEAST:
            saved["failed"][name] = "the time was up"
            continue
        saved["failed"].pop(name, None)
        print(f"{name}: {left:.0f} s left", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "bench.gpu", "--child", group]
        command += ["--late"] * late + ["--quick"] * plan.quick + ["--dry-run"] * plan.dry
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            stop = threading.Timer(left, child.kill)
            stop.start()
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    take_in(saved, json.loads(line))
                    save(saved, file)
            code = child.wait()
            stop.cancel()
        if code:
            why = "the time was up" if time.monotonic() >= deadline else f"its process ended with {code}"
            saved["failed"][name] = f"not finished: {why}"
        save(saved, file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m bench.gpu\n  python -m bench.gpu attention norms --minutes 5 --out /tmp/results\n"
        "  python -m bench.gpu --show bench/results/nvidia-h100-80gb-hbm3.json",
    )
    parser.add_argument("groups", nargs="*", help=f"what to time (default: all): {', '.join(GROUPS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: 9)")
    add_saving_options(parser, "<gpu>.json", RESULTS)
    parser.add_argument("--quick", action="store_true", help="leave out peers that take long to compile")
    parser.add_argument("--late", action="store_true", help="time only the rows that have such peers")
    parser.add_argument("--ceilings", action="store_true", help="measure only a copy and a matrix product")
    parser.add_argument("--show", type=Path, help="print the table of this saved result and time nothing")
    parser.add_argument(
        "--brief", action="store_true", help="print one line for each row instead of the Markdown table"
    )
    parser.add_argument("--dry-run", action="store_true", help="run every contender once at tiny sizes, on any machine")
    parser.add_argument("--child", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    shown = short_table if options.brief else section
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"groups: got {', '.join(sorted(unknown))}; accepted are {', '.join(GROUPS)}")
    if options.show:
        print(shown(json.loads(options.show.read_text())))
        return 0
    if not options.dry_run and device() != "cuda":
        parser.error(
            "there is no GPU here; --dry-run walks through everything without one, --show prints a saved result"
        )
    plan = Plan(options.dry_run, options.quick)
    if options.child:
        for found in measured(options.child, plan, options.late):
            print(json.dumps(found), flush=True)
        return 0
    saved: dict[str, Any] = {"machine": machine(plan, options.commit), "rows": {}, "failed": {}}
    file = options.out / f"{'-'.join(saved['machine']['gpu'].lower().split())}.json"
    groups = passes([] if options.ceilings else options.groups or GROUPS, plan, options.late)
    if options.dry_run and options.out == RESULTS:  # to show, not to save
        for group, late in groups:
            for found in measured(group, plan, late):
                take_in(saved, found)
        print(shown(saved))
        return 0
    torch.cuda.empty_cache()  # frees what the ceilings took, for the groups' processes
    continue_file(saved, file)
    save(saved, file)
    run_groups(groups, plan, saved, file, deadline)
    print(shown(saved))
    print(f"\nsaved as {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
