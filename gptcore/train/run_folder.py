"""The folder of a run: checked, locked, and prepared for the run."""

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
from gptcore.train.config import RunConfig
from gptcore.train.metrics import METRICS, PLOT, TENSORBOARD, TIMINGS
from gptcore.train.parallel import World
from gptcore.weights import CONFIG, WEIGHTS
from gptcore.weights.names import ADAPTER, ADAPTER_CONFIG

RUN = "config.yaml"
# A folder with any of these holds a run: they are written first.
_MARKS = {RUN, METRICS, FOLDER}
# A process that trains in the folder locks the first and names itself in the second. A killed process may leave both files,
# but not the lock.
_LOCK, _HOLDER = ".lock", ".lock-holder"
_NO_RUN = {"lr.png", _LOCK, _HOLDER}


def check_folder(out: Path) -> bool:
    """Returns whether `out` holds a run.

    Raises:
        FileExistsError: `out` is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file; accepted is a folder")
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if names & _MARKS:
        return True
    if foreign := sorted(n for n in names - _NO_RUN if not (n.startswith(".") and n.endswith(".tmp"))):
        raise FileExistsError(f"out: {out} holds {foreign[0]!r} and no run; accepted is a new or empty folder")
    return False


@contextmanager
def locked_folder(out: Path, world: World) -> Iterator[None]:
    """Locks `out` for the processes of `world` until the block ends, or until they end in any way.

    If `out` was made here and stays empty, it is removed at the end.

    Raises:
        BlockingIOError: another process has the lock; says which, where and since when.
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
            raise problem or BlockingIOError(f"out: the first process could not lock {out}; its error says why")
        yield
    finally:
        if lock.is_locked:
            (out / _HOLDER).unlink(missing_ok=True)
            with suppress(OSError):  # before the release; Windows removes it at the release
                (out / _LOCK).unlink(missing_ok=True)
            lock.release()
        for folder in made:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def _holder(out: Path) -> str:
    with suppress(OSError):
        return (out / _HOLDER).read_text() or "another process"
    return "another process"


def start_folder(config: RunConfig, task: Task, resumed: bool) -> None:
    """Prepares the folder for a new or a resumed run; deletes files that a killed process left incomplete."""
    out = config.out
    for place in (out, out / FOLDER):
        for incomplete in place.glob(".*.tmp"):
            shutil.rmtree(incomplete) if incomplete.is_dir() else incomplete.unlink()
    if not resumed:
        for name in (FOLDER, TENSORBOARD):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (METRICS, TIMINGS, PLOT, WEIGHTS, ADAPTER, ADAPTER_CONFIG, CONFIG):
            (out / name).unlink(missing_ok=True)
    config.save(out / RUN)
    task.save(out)
