"""What a timing needs beside a clock: waiting for the device, turns, this machine's own ceilings, and where results are kept."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import gptkernels
import torch
from gptkernels.testing import Case, Inputs, OpSpec, Output, assert_within_budget, random_grads, run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
BF16, FP32 = torch.bfloat16, torch.float32

# A call on a CPU should take well under a second: larger cases are for GPUs.
CPU_FLOPS, CPU_BYTES = 2e9, 4e7


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def waiting(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function`, returning when the device is done and not when the work is queued."""
    if device() == "cpu":
        return function

    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


def _best(function: Callable[[], Any]) -> float:
    function()
    return min(seconds_of(function) for _ in range(5))


def _product_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best(lambda: torch.matmul(a, b, out=out))


@cache
def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """``(bytes/s of a large copy, FLOP/s of a large matrix product)`` on this machine, measured once.

    On a CPU for which PyTorch has no fast product of a 16-bit `dtype`, float32's is the ceiling: it computes the same.
    """
    source = torch.empty((2**30 if device() == "cuda" else 2**27) // 4, device=device()).zero_()
    target = torch.zeros_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    if device() == "cuda":
        return bandwidth, _product_rate(dtype, 8192)
    slow = _product_rate(dtype, 256) < 0.5 * _product_rate(torch.float32, 256)
    return bandwidth, _product_rate(torch.float32 if slow else dtype, 2048)


def seconds_of(call: Callable[[], Any], queueing: float = 0.0) -> float:
    """Seconds of one call: by the clock on a CPU, by two events on a GPU, with nothing of the inputs left in its L2 cache.

    `queueing` is how long it takes to queue the call's work: the GPU is kept waiting for as long before the first event, so
    that the device's time is taken and not the interpreter's. The cache is emptied by writing twice its size.
    """
    if device() == "cpu":
        return _wall_seconds(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _twice_the_cache().zero_()
    torch.cuda._sleep(int((1.5 * queueing + 2e-5) * 2e9))  # cycles, at the fastest clock that GPUs have
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _twice_the_cache() -> torch.Tensor:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * max(size, 2**25), dtype=torch.uint8, device="cuda")


def _wall_seconds(call: Callable[[], Any]) -> float:
    call = waiting(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _queueing(call: Callable[[], Any]) -> float:
    """Seconds until `call` returns, its work on a GPU still under way."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, *, least: int = 3, wall: bool = False
) -> dict[str, float]:
    """Medians in seconds of calls that are timed in turns, one round of all after another, so that drift meets everyone.

    Two rounds warm up; the third says how many more fit into `seconds`, `least` at any rate. On a GPU the device's time is
    taken (see `seconds_of`), with `wall` the clock's, from queueing to the end of the work.
    """
    for call in contenders.values():
        waiting(call)()
    queueing = {name: _queueing(call) for name, call in contenders.items()}
    waiting(lambda: None)()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for turn in range(rounds):
        for name, call in contenders.items():
            times[name].append(_wall_seconds(call) if wall else seconds_of(call, queueing[name]))
        if turn == 0:
            rounds = min(rounds, max(least, int(seconds / (time.perf_counter() - began))))
        if turn + 1 >= rounds:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def verify(spec: OpSpec, function: Callable[..., Output], inputs: Inputs) -> None:
    """Holds `function`, forward and backward, to the float64 error budget on `inputs`; an `AssertionError` says what is wrong."""
    grad_out = random_grads(spec.reference(**inputs.tensors, **inputs.options), 1)
    plain = run(spec.reference, inputs, grad_out)
    exact = run(spec.reference, inputs.mapped(lambda t: t.double()), tuple(g.double() for g in grad_out))
    for name, value in run(function, inputs, grad_out).items():
        # Of a single number plain PyTorch's error is luck: the budget is then some float32 steps.
        luck = 1e-5 * max(1.0, float(exact[name].abs())) if value.numel() == 1 else None
        assert_within_budget(f"{spec.name} {name}", value, plain[name], exact[name], luck)


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32", torch.float16: "fp16"}[dtype]


def _commit() -> str:
    """This checkout's commit; "unknown" where there is no git, or no repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def versions(commit: str | None = None) -> dict[str, str]:
    """What a result was measured with: PyTorch, Python, commit (None: this checkout's), date."""
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit or _commit(),
        "date": date.today().isoformat(),
    }


def add_saving_options(parser: argparse.ArgumentParser, file: str, folder: Path | None = None) -> None:
    """``--out`` (`folder`: where the results go without it; None: nowhere) and ``--commit``; `file` names the file."""
    default = f"default: {folder.relative_to(ROOT)}" if folder else "default: nothing is saved"
    parser.add_argument("--out", type=Path, default=folder, help=f"folder for {file} ({default})")
    parser.add_argument("--commit", help="what the file says was measured, where there is no git to ask")


def results(kind: str) -> dict[str, dict[str, Any]]:
    """The saved results of a kind, by file name: "cpu" or "gpu" (the kernels there), or "gpt" (whole models)."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}

    def kinds(saved: dict[str, Any]) -> set[str]:
        # What a file without a kind of its own is about follows from its machine.
        return {saved["kind"]} if "kind" in saved else set(saved["machine"])

    return {name: saved for name, saved in found.items() if kind in kinds(saved)}


def save(saved: dict[str, Any], file: Path) -> None:
    """Writes a result so that the file is whole whenever it is read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(saved, indent=1) + "\n")
    unfinished.replace(file)


def affordable(spec: OpSpec, dtype: torch.dtype) -> list[Case]:
    """`spec`'s bench cases that this device runs in reasonable time; the cheapest one always."""

    def price(case: Case) -> float:
        cost = spec.cost(case, dtype)
        return max(cost.forward_flops / CPU_FLOPS, cost.forward_bytes / CPU_BYTES)

    ordered = sorted(spec.bench_cases, key=price)
    return ordered if device() == "cuda" else [c for i, c in enumerate(ordered) if i == 0 or price(c) <= 1]


def rounds_within(run: Callable[[], Any], seconds: float) -> int:
    """How often to time `run`, 2 to 8 times: a peer may take seconds (bfloat16 on a CPU without products of it)."""
    start = time.perf_counter()
    run()
    return min(8, max(2, int(seconds / max(time.perf_counter() - start, 1e-9))))


def own_backends() -> list[str]:
    """Our backends that can be timed here: the interpreter proves numbers, its time means nothing."""
    return [n for n in gptkernels.available_backends() if n != "triton" or device() == "cuda"]
