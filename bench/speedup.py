"""Compares training with plain PyTorch and with the fused kernels on this machine, in speed and memory.

``python -m bench.speedup --data data/python-docs`` makes the same short training run with ``--kernels reference`` and with
``--kernels auto``, each in a process of its own, so that its peak memory is its own. The runs take turns of a few steps, so
that a slow moment of the machine affects both, and the medians of the steps' times are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from gptcore.nn import Kernels

KERNELS: tuple[Kernels, ...] = ("reference", "auto")
WARMUP, TURN = 2, 2
"""Steps before timing starts, and steps of a turn."""


def _serve(data: Path, kernels: Kernels, steps: int, **size: Any) -> None:
    """The child process: reads a number of steps from each line of standard input, makes them, prints their seconds as JSON.

    0 ends the run: the answer then describes it.
    """
    import gptkernels
    import torch

    from gptcore.train import TrainConfig, step
    from gptcore.train.hardware import find_device, peak_flops, peak_memory
    from gptcore.train.parallel import ALONE
    from gptcore.train.state import TrainState

    gptkernels.tune_allocator()
    # TrainConfig requires `out`; this run writes nothing.
    config = TrainConfig.of(data=data, out=Path("unused"), kernels=kernels, steps=steps, sample_tokens=0, **size)
    device = find_device(config.device)
    state = TrainState(config, ALONE, device)
    peak, _ = peak_flops(device, torch.bfloat16 if state.bf16 else torch.float32)
    done, flops, tokens = 0, 0.0, 0
    for line in sys.stdin:
        count, seconds = int(line), []
        for _ in range(count):
            start = time.perf_counter()
            found = step.gradients(state)
            step.update(state, config.lr_at(done))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            done, flops, tokens = done + 1, found.flops, found.tokens
        if count:
            print(json.dumps(seconds), flush=True)
            continue
        about = {"flops": flops, "tokens": tokens, "peak_flops": peak, "peak": peak_memory(device)}
        print(json.dumps(about | {"val_loss": step.evaluate(state, None)}), flush=True)
        return


def compare(data: Path, steps: int, **size: Any) -> dict[str, dict[str, Any]]:
    """Speed, memory and loss of a training run of `steps` steps with each of `KERNELS`; `size`: options of `gptcore train`."""
    children: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[float]] = {kernels: [] for kernels in KERNELS}

    def ask(kernels: str, count: int) -> Any:
        child = children[kernels]
        assert child.stdin is not None
        assert child.stdout is not None
        print(count, file=child.stdin, flush=True)
        answer = child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the run with --kernels {kernels} ended with status {child.wait()}")
        return json.loads(answer)

    try:
        for kernels in KERNELS:
            run = json.dumps({"kernels": kernels, "data": str(data), "steps": steps, **size})
            command = [sys.executable, "-m", "bench.speedup", "--run", run]
            children[kernels] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ask(kernels, WARMUP)
        for turn in range(max(steps - WARMUP, 1) // TURN):
            print(f"\r{(turn + 1) * TURN} timed steps of each ...", end="", file=sys.stderr, flush=True)
            for kernels in KERNELS:
                seconds[kernels] += ask(kernels, TURN)
        print(file=sys.stderr)
        rows = {}
        for kernels in KERNELS:
            about, own = ask(kernels, 0), median(seconds[kernels])
            rows[kernels] = {
                "tokens_per_second": about["tokens"] / own,
                "mfu": about["flops"] / own / about["peak_flops"],
                "peak": about["peak"],
                "val_loss": about["val_loss"],
            }
        return rows
    finally:
        for child in children.values():
            child.kill()
            child.communicate()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speedup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m bench.speedup --data data/python-docs --steps 60 --preset small",
    )
    parser.add_argument("--data", type=Path, help="folder made by gptcore prepare")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default: 40)")
    parser.add_argument("--preset", default="mini", help="size of the model (default: mini)")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the child process's run, as JSON
    options = parser.parse_args(arguments)
    if options.run:
        run = json.loads(options.run)
        _serve(Path(run.pop("data")), **run)
        return 0
    if options.data is None:
        parser.error("--data: got none; accepted is a folder made by gptcore prepare")
    rows = compare(options.data, options.steps, preset=options.preset)
    print(f"{'--kernels':<12}{'tokens/s':>12}{'MFU':>8}{'peak memory, MiB':>20}{'validation loss':>18}")
    for kernels, row in rows.items():
        speed = f"{row['tokens_per_second']:>12,.0f}{row['mfu']:>8.1%}"
        print(f"{kernels:<12}{speed}{row['peak'] / 2**20:>20,.0f}{row['val_loss']:>18.4f}")
    plain, fast = (rows[kernels] for kernels in KERNELS)
    speed, memory = fast["tokens_per_second"] / plain["tokens_per_second"], fast["peak"] / plain["peak"]
    print(f"--kernels auto against reference: {speed:.2f}x the speed, {memory:.2f}x the memory of the process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
