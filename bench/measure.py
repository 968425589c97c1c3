"""What a timing needs beside a clock: waiting for the device, and this machine's own ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import gptkernels
import torch
from gptkernels.testing import Case, OpSpec

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
    run = waiting(function)
    run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


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
