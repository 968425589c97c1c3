"""What each of two processes does for test_distributed.py.

``torchrun --nproc-per-node 2 -m tests.gptcore.several_trainings CORPUS WORDS FOLDER``
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from gptcore.tasks import LanguageModel
from gptcore.train import optimizers, step, train
from gptcore.train.parallel import ALONE, processes
from gptcore.train.run_folder import locked_folder
from tests.gptcore.runs import assistant, config

RANK = int(os.environ["RANK"])
RUN = {"batch_size": 4, "accumulate": 2}


def say(text: object) -> None:
    """A line of this process, in one write so that the other's does not mix with it."""
    os.write(1, f"{RANK}: {text}\n".encode())


def at_step(number: int, action) -> None:
    """Calls `action` in the second process as it comes to its `number`-th step from now on."""
    gradients, calls = step.gradients, 0

    def instead(*args):
        nonlocal calls
        calls += 1
        if calls == number and RANK == 1:
            action()
        return gradients(*args)

    step.gradients = instead


def main(corpus: Path, words: Path, folder: Path) -> None:
    torch.set_num_threads(1)

    def run(name: str, data: Path = corpus, **changes):
        return train(config(data, folder / name, **(RUN | changes)), progress=False)

    with processes("cpu") as (world, _):
        run("ddp")
        run("fsdp", parallel="fsdp")
        run("checkpointed", parallel="fsdp", checkpoint_activations=True)
        # From the middle of one process's run, and of one's own.
        run("one-then-two", parallel="fsdp", resume="always")
        optimizers.multiplies_bf16 = lambda device: False  # in bfloat16, rounding would part the curves
        run("muon-ddp", optimizer="muon")
        run("muon-fsdp", optimizer="muon", parallel="fsdp")
        run("bert-ddp", words, model="bert")
        run("bert-fsdp", words, model="bert", parallel="fsdp")
        train(assistant(folder, "assistant-ddp"), progress=False)
        train(assistant(folder, "assistant-fsdp", parallel="fsdp"), progress=False)
        run("ddp-dropout", dropout=0.2)
        run("fsdp-dropout", dropout=0.2, parallel="fsdp")
        if world.is_main:
            for name in ("ddp-dropout", "fsdp-dropout"):
                shutil.copytree(folder / name, folder / f"{name}-again")
                shutil.rmtree(folder / f"{name}-again/checkpoints/step-00000008")
        world.barrier()
        run("ddp-dropout-again", dropout=0.2, resume="auto")
        run("fsdp-dropout-again", dropout=0.2, parallel="fsdp", resume="auto")
        try:
            run("odd", batch_size=3)
        except ValueError as error:
            say(error)
        gradients = step.gradients
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        say(f"stopped {run('stopped', parallel='fsdp').steps}")
        step.gradients = gradients
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if RANK == 1:  # its shard no longer fits, and the model of the first still does
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            run("full", parallel="fsdp")
        except OSError as error:
            say(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with locked_folder(folder / "held", ALONE) if world.is_main else nullcontext():
            world.barrier()
            try:
                run("held")
            except BlockingIOError as error:
                say(error)
            world.barrier()
        loss = LanguageModel.loss

        def not_finite(*args):
            total, count = loss(*args)
            return total * torch.nan, count

        at_step(3, lambda: setattr(LanguageModel, "loss", not_finite))
        try:
            run("nan")
        except FloatingPointError as error:
            say(error)
    say("done")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
