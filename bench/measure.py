"""What every bench uses: timing in turns, CUDA graphs, this machine's ceilings, the check of results, saved files."""

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

CPU_FLOPS, CPU_BYTES = 2e9, 4e7  # the most work of a case that `make bench` times on a CPU: well under a second


def device() -> str:
    """Where benches run: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def waiting(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` followed by a wait for the GPU to finish its work; on a CPU `function` itself."""
    if device() == "cpu":
        return function

    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


def _best(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of five calls, after one to warm up."""
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

    Where the CPU has no fast product of a 16-bit `dtype`, float32's rate is the ceiling: converting and using it is the best
    that a kernel can do.
    """
    source = torch.empty((2**30 if device() == "cuda" else 2**27) // 4, device=device()).zero_()
    target = torch.zeros_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    if device() == "cuda":
        return bandwidth, _product_rate(dtype, 8192)
    slow = _product_rate(dtype, 256) < 0.5 * _product_rate(torch.float32, 256)
    return bandwidth, _product_rate(torch.float32 if slow else dtype, 2048)


def seconds_of(call: Callable[[], Any], queueing: float = 0.0) -> float:
    """Seconds of one call: by the clock on a CPU, by two CUDA events on a GPU, starting with an empty L2 cache.

    The cache is emptied by writing twice its size. `queueing` is how many seconds the host needs to queue the call's work.
    The GPU sleeps for that long before the first event, so that only the GPU's time is measured.
    """
    if device() == "cpu":
        return _wall_seconds(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _twice_the_cache().zero_()
    torch.cuda._sleep(int((1.5 * queueing + 2e-5) * 2e9))  # in cycles of a 2 GHz clock
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _twice_the_cache() -> torch.Tensor:
    """A tensor of twice the L2 cache's size: writing it evicts everything else."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * max(size, 2**25), dtype=torch.uint8, device="cuda")


def _wall_seconds(call: Callable[[], Any]) -> float:
    call = waiting(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _queueing(call: Callable[[], Any]) -> float:
    """Seconds until `call` returns; the GPU may still be working then."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, *, least: int = 3, wall: bool = False
) -> dict[str, float]:
    """Median seconds of each contender. They are timed in turns, so that a change of the machine's speed affects all alike.

    Two rounds warm up. The first timed round says how many fit into `seconds`; at least `least` and at most `rounds` are made.
    On a GPU the device's time is measured (see `seconds_of`); with `wall`, the time from queueing to the end of the work.
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


class CapturedGraph:
    """A step as a CUDA graph. Calling it replays the graph and returns the step's outputs, the same tensors each time."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step  # a graph holds the addresses of the step's tensors, and does not keep the tensors alive
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles kernels and allocates memory, which a capture must not do
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = step()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.outputs


def verify(spec: OpSpec, function: Callable[..., Output], inputs: Inputs) -> None:
    """Checks `function`, forward and backward, against the float64 error budget on `inputs`.

    Raises:
        AssertionError: naming the result that is outside the budget.
    """
    grad_out = random_grads(spec.reference(**inputs.tensors, **inputs.options), 1)
    plain = run(spec.reference, inputs, grad_out)
    exact = run(spec.reference, inputs.mapped(lambda t: t.double()), tuple(g.double() for g in grad_out))
    for name, value in run(function, inputs, grad_out).items():
        # PyTorch's error in a single number may be 0 by chance: the budget is then a few float32 roundings.
        least = 1e-5 * max(1.0, float(exact[name].abs())) if value.numel() == 1 else None
        assert_within_budget(f"{spec.name} {name}", value, plain[name], exact[name], least)


def short(dtype: torch.dtype) -> str:
    """A dtype's name in tables: "bf16", "fp32", "fp16"."""
    return {BF16: "bf16", FP32: "fp32", torch.float16: "fp16"}[dtype]


def _commit() -> str:
    """This checkout's commit; "unknown" without git or outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def versions(commit: str | None = None) -> dict[str, str]:
    """What a result was measured with: the versions of PyTorch and Python, the commit (None: this checkout's), the date."""
    return {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit or _commit(),
        "date": date.today().isoformat(),
    }


def add_saving_options(parser: argparse.ArgumentParser, file: str, folder: Path | None = None) -> None:
    """Adds ``--out``, the folder to save `file` in (default: `folder`; None saves nothing), and ``--commit``."""
    default = f"default: {folder.relative_to(ROOT)}" if folder else "default: nothing is saved"
    parser.add_argument("--out", type=Path, default=folder, help=f"folder for {file} ({default})")
    parser.add_argument("--commit", help="commit to write into the file (default: asked of git)")


def results(kind: str) -> dict[str, dict[str, Any]]:
    """The saved results of a kind, by file name: "cpu" or "gpu" (operations), or "gpt" (whole models)."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}

    def kinds(saved: dict[str, Any]) -> set[str]:
        # bench.cpu and bench.gpu write no kind, but the machine's "cpu" or "gpu".
        return {saved["kind"]} if "kind" in saved else set(saved["machine"])

    return {name: saved for name, saved in found.items() if kind in kinds(saved)}


def save(saved: dict[str, Any], file: Path) -> None:
    """Writes a result as JSON. The file is never half-written: a finished one is renamed over it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(saved, indent=1) + "\n")
    unfinished.replace(file)


def affordable(spec: OpSpec, dtype: torch.dtype) -> list[Case]:
    """`spec`'s bench cases, cheapest first; on a CPU those within `CPU_FLOPS` and `CPU_BYTES`, and always the cheapest one."""

    def price(case: Case) -> float:
        cost = spec.cost(case, dtype)
        return max(cost.forward_flops / CPU_FLOPS, cost.forward_bytes / CPU_BYTES)

    ordered = sorted(spec.bench_cases, key=price)
    return ordered if device() == "cuda" else [c for i, c in enumerate(ordered) if i == 0 or price(c) <= 1]


def rounds_within(run: Callable[[], Any], seconds: float) -> int:
    """How many calls of `run`, 2 to 8, fit into `seconds`: a peer may take seconds (bfloat16 without instructions for it)."""
    start = time.perf_counter()
    run()
    return min(8, max(2, int(seconds / max(time.perf_counter() - start, 1e-9))))


def own_backends() -> list[str]:
    """Our backends that can be timed here. Triton on a CPU is its interpreter, whose speed means nothing."""
    return [n for n in gptkernels.available_backends() if n != "triton" or device() == "cuda"]
