"""A run that is killed several times and resumed: run by test_resume.py, in a process of its own.

``python -m tests.gptcore.killed_runs CORPUS FOLDER SEED KILLS [BASE]`` trains once without a stop into FOLDER/whole and once
with kills into FOLDER/killed: a new model, or LoRA on BASE. Every attempt is a fork of this process, which has imported
everything and computed nothing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401 (once, not in each fork)
import torch

from gptcore.train import FinetuneConfig, RunConfig, train
from tests.gptcore.runs import config

CALLS = "fsync", "rename", "replace", "link"  # what makes a checkpoint durable, in os


def dies_at_call(number: int) -> None:
    """This process kills itself instead of its `number`-th call that makes something durable."""
    left = number

    def counted(call):
        def instead(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return instead

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def options(corpus: Path, out: Path, base: Path | None) -> RunConfig:
    made = config(corpus, out, steps=36, eval_interval=3, dropout=0.1, resume="auto")
    if base is None:
        return made
    shared = {name: value for name, value in made.plain().items() if name not in ("model", "preset", "tokens_per_step")}
    shared |= {"data": corpus, "out": out, "lora_dropout": 0.1, "resume": "auto"}
    return FinetuneConfig.of(model=str(base), **shared)


def attempt(corpus: Path, out: Path, base: Path | None, at_call: int | None = None, after: float | None = None) -> bool:
    """One process that trains to the end unless it is killed; whether it was."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        if at_call:
            dies_at_call(at_call)
        train(options(corpus, out, base), progress=False)
        os._exit(0)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def main(corpus: Path, folder: Path, seed: int, turns: int, base: Path | None = None) -> None:
    draw = random.Random(seed)
    assert not attempt(corpus, folder / "whole", base)
    kills = 0
    for turn in range(turns):
        if turn % 2:
            kills += attempt(corpus, folder / "killed", base, at_call=draw.randint(1, 45))
        else:
            kills += attempt(corpus, folder / "killed", base, after=draw.uniform(0.4, 1.4))
        steps = sorted(p.name for p in (folder / "killed").glob("checkpoints/step-*"))
        print(f"kill {kills}: {', '.join(steps)}", flush=True)
    assert not attempt(corpus, folder / "killed", base)
    print(f"{kills} kills", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *map(Path, sys.argv[5:]))
