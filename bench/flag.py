"""What the flag buys on this machine: the same short training run by ``--kernels reference`` and by ``auto``.

``python -m bench.flag --data data/python-docs``; each run is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptcore.nn import Kernels

KERNELS: tuple[Kernels, ...] = ("reference", "auto")


def _run(data: Path, kernels: Kernels, steps: int, **size: Any) -> dict[str, Any]:
    import gptkernels

    from gptcore.train import TrainConfig, train

    gptkernels.tune_allocator()
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = size | {"steps": steps, "eval_interval": steps, "eval_windows": 1, "sample_tokens": 0}
        config = TrainConfig(data=data, out=Path(folder) / "run", kernels=kernels, **sizes)
        result = train(config, progress=False)
    about = {"tokens_per_second": result.tokens_per_second, "mfu": result.mfu, "peak": result.peak_memory}
    return about | {"val_loss": result.val_loss_full}


def compare(data: Path, steps: int, **size: Any) -> dict[str, dict[str, Any]]:
    """``steps`` steps by each choice of kernels, each in a process of its own; `size`: fields of `TrainConfig`."""
    rows: dict[str, dict[str, Any]] = {}
    for kernels in KERNELS:
        print(f"{steps} steps with --kernels {kernels} ...", file=sys.stderr, flush=True)
        run = json.dumps({"kernels": kernels, "data": str(data), "steps": steps, **size})
        command = [sys.executable, "-m", "bench.flag", "--run", run]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[kernels] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.flag",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m bench.flag --data data/python-docs --steps 60 --preset small",
    )
    parser.add_argument("--data", type=Path, help="folder that gptcore prepare made")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default: 40)")
    parser.add_argument("--preset", default="mini", help="size of the model (default: mini)")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, for the parent
    options = parser.parse_args(arguments)
    if options.run:
        run = json.loads(options.run)
        print(json.dumps(_run(Path(run.pop("data")), **run)))
        return 0
    if options.data is None:
        parser.error("--data: got none; accepted is a folder that gptcore prepare made")
    rows = compare(options.data, options.steps, preset=options.preset)
    print(f"{'--kernels':<12}{'tokens/s':>12}{'MFU':>8}{'peak memory, MiB':>20}{'validation loss':>18}")
    for kernels, row in rows.items():
        speed = f"{row['tokens_per_second']:>12,.0f}{row['mfu']:>8.1%}"
        print(f"{kernels:<12}{speed}{row['peak'] / 2**20:>20,.0f}{row['val_loss']:>18.4f}")
    plain, fast = (rows[kernels] for kernels in KERNELS)
    speed, memory = fast["tokens_per_second"] / plain["tokens_per_second"], fast["peak"] / plain["peak"]
    print(f"what the flag bought here: {speed:.2f}x the speed, {memory:.2f}x the memory of the whole process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
