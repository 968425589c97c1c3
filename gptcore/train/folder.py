"""The folder of a run: whose it is, and what may be done with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from gptcore.train.checkpoint import FOLDER
from gptcore.train.config import TrainConfig
from gptcore.train.job import TOKENIZER
from gptcore.train.records import METRICS, PLOT, TENSORBOARD, TIMINGS
from gptcore.weights import CONFIG, WEIGHTS

RUN = "config.yaml"
# Written first, so that a folder with any of these is a run's.
_MARKS = {RUN, METRICS, FOLDER}


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
    if foreign := sorted(n for n in held if n != "lr.png" and not (n.startswith(".") and n.endswith(".tmp"))):
        raise FileExistsError(f"out: {out} holds {foreign[0]!r} and no run; accepted is a new or empty folder")
    return False


def start_folder(config: TrainConfig, goes_on: bool) -> None:
    """Makes the folder of a new run, or readies one that goes on; what a killed process left half-written goes."""
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    for place in (out, out / FOLDER):
        for left in place.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not goes_on:
        for name in (FOLDER, TENSORBOARD):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (METRICS, TIMINGS, PLOT, WEIGHTS, CONFIG):
            (out / name).unlink(missing_ok=True)
    config.save(out / RUN)
    shutil.copyfile(config.data / TOKENIZER, out / TOKENIZER)
