"""Reads hardware counters of attention's kernels with Nsight Compute: ``python -m bench.counters --out FOLDER``.

Forward, dK/dV and dQ run at two shapes, with all counters and without fixing the GPU's clocks. The folder gets
attention.ncu-rep for Nsight Compute's window, counters.txt with its explanations, and counters.csv.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from gptkernels.attention.spec import SPEC
from gptkernels.testing import outputs

from bench.measure import BF16
from bench.rows import calls, output_gradients, with_gradients

CASES = ("B16-H12-T1024-D64-causal", "B4-H16-T4096-D128-causal")
DRY_CASES = ("B2-H3-T37-D64-causal",)
KERNELS = ("_forward_kernel", "_dkdv_kernel", "_dq_kernel")
SHOWN = {
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
    "launch__occupancy_limit_shared_mem": "blocks by shared memory",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active, %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessor, %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor pipe, %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor pipe active, %",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "exponentials' pipe, %",
    "sm__inst_executed.avg.per_cycle_active": "instructions a cycle",
    "dram__bytes.sum.per_second": "memory",
    "smsp__inst_executed_op_local_ld.sum": "local loads",
    "smsp__inst_executed_op_local_st.sum": "local stores",
}


def run(dry: bool) -> None:
    """One forward and backward of each case."""
    device, backend = ("cpu", "auto") if dry else ("cuda", "triton")
    function = partial(SPEC.function, backend=backend)
    known = {case.name: case for case in (*SPEC.bench_cases, *SPEC.cases)}
    for name in DRY_CASES if dry else CASES:
        leaves = with_gradients(SPEC.make_inputs(known[name], BF16, torch.device(device), 0))
        outs = outputs(function(**leaves.tensors, **leaves.options))
        calls(function, leaves, outs, output_gradients(SPEC, outs))["backward"]()
    if not dry:
        torch.cuda.synchronize()


def shown(raw: str) -> str:
    """The counters of `SHOWN`, a line for each kernel. `raw`: ncu's raw page as CSV, with a line of names and one of units."""
    rows = list(csv.reader(line for line in raw.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return "ncu reported no kernel"
    names, units, kernels = rows[0], rows[1], rows[2:]
    lines = []
    for kernel in kernels:
        values = dict(zip(names, zip(kernel, units)))
        found = [f"{label} {' '.join(values[name]).strip()}" for name, label in SHOWN.items() if name in values]
        lines.append(f"{values.get('Kernel Name', ('?',))[0]}: {', '.join(found)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.counters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m bench.counters --out /tmp/counters",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder for the three files (default: the current one)"
    )
    parser.add_argument("--run", action="store_true", help="only run the kernels, under a profiler of your choice")
    parser.add_argument("--dry-run", action="store_true", help="only run the kernels, at tiny sizes and without a GPU")
    options = parser.parse_args(arguments)
    if options.run or options.dry_run:
        run(options.dry_run)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    report = options.out / "attention.ncu-rep"
    kernels = f"regex:^({'|'.join(KERNELS)})$"
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "--force-overwrite", "--export", str(report)]
    ncu += ["--kernel-name", kernels, "--launch-count", str(len(KERNELS) * len(CASES))]
    done = subprocess.run([*ncu, sys.executable, "-m", "bench.counters", "--run"], check=False)
    for page, file in (("details", "counters.txt"), ("raw", "counters.csv")):
        command = ["ncu", "--import", str(report), "--page", page, *(["--csv"] if page == "raw" else [])]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (options.out / file).write_text(text)
    print(shown((options.out / "counters.csv").read_text()))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
