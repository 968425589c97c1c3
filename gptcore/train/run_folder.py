"""The folder of a run: whose it is, and what may be done with it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from gptcore.tasks import Task
from gptcore.train.checkpoint import FOLDER
from gptcore.train.config import TrainConfig
from gptcore.train.metrics import METRICS, PLOT, TENSORBOARD, TIMINGS
from gptcore.train.parallel import World
from gptcore.weights import CONFIG, WEIGHTS

RUN = "config.yaml"
# Written first, so that a folder with any of these is a run's.
_MARKS = {RUN, METRICS, FOLDER}
# The first is locked by whoever works in the folder, the second says who that is. A process that was killed may leave
# both, and locks neither.
_LOCK, _HOLDER = ".lock", ".lock-holder"
_NO_RUN = {"lr.png", _LOCK, _HOLDER}


def check_folder(out: Path) -> bool:
    """Whether `out` holds a run.

    Raises:
        FileExistsError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file; accepted is a folder")
    held = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if held & _MARKS:
        return True
    if foreign := sorted(n for n in held - _NO_RUN if not (n.startswith(".") and n.endswith(".tmp"))):
        raise FileExistsError(f"out: {out} holds {foreign[0]!r} and no run; accepted is a new or empty folder")
    return False


@contextmanager
def locked_folder(out: Path, world: World) -> Iterator[None]:
    """Keeps `out` for the processes of `world` until the block ends, or they do, however they end.

    A folder that was made for it and in which nothing was written is removed again.

    Raises:
        BlockingIOError: others have it; says who, where and since when.
        FileExistsError: as `check_folder`.
    """
    check_folder(out)
    problem: OSError | None = None
    made: list[Path] = []
    lock = FileLock(out / _LOCK, timeout=0)
    if world.is_main:
        try:
            made = [folder for folder in (out, *out.parents) if not folder.exists()]
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            holder = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            (out / _HOLDER).write_text(holder)
        except Timeout:
            problem = BlockingIOError(
                f"out: {out} is in use by {_holder(out)}; accepted is a folder in which no other process trains"
            )
        except OSError as error:
            problem = error
    try:
        if world.sum(torch.tensor([float(problem is not None)])).item():
            raise problem or BlockingIOError(f"out: the first process cannot have {out}, and says why")
        yield
    finally:
        if lock.is_locked:
            (out / _HOLDER).unlink(missing_ok=True)
            with suppress(OSError):  # while it is ours; Windows removes it as it is let go
                (out / _LOCK).unlink(missing_ok=True)
            lock.release()
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _holder(out: Path) -> str:
    with suppress(OSError):
        return (out / _HOLDER).read_text() or "another process"
    return "another process"


def start_folder(config: TrainConfig, task: Task, goes_on: bool) -> None:
    """Makes the folder of a new run, or readies one that goes on; what a killed process left half-written goes."""
    out = config.out
    for place in (out, out / FOLDER):
        for left in place.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not goes_on:
        for name in (FOLDER, TENSORBOARD):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (METRICS, TIMINGS, PLOT, WEIGHTS, CONFIG):
            (out / name).unlink(missing_ok=True)
    config.save(out / RUN)
    task.save(out)
