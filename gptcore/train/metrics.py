"""What a run writes down: metrics.jsonl, timings.jsonl, loss.png, and TensorBoard's files if asked for."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptcore import _extras
from gptcore._files import atomic_writer, save_figure
from gptcore.train.guard import Guard

METRICS, TIMINGS, PLOT, TENSORBOARD = "metrics.jsonl", "timings.jsonl", "loss.png", "tensorboard"


class MetricsLog:
    """Lines of JSON, one for each step and each evaluation.

    ``metrics.jsonl`` holds what the configuration decides and nothing that a clock does, so that a run that was
    killed and resumed leaves the same file, byte for byte; ``timings.jsonl`` holds the rest. A line that the disk has no
    room for is kept, and is an error only when `sync` still finds no room.

    Args:
        out: the run's folder.
        step: lines after this step are dropped: a run killed after its checkpoint wrote some that come again.
        evaluated: whether this step's evaluation stays; otherwise that comes again, too.
        tensorboard: write both for TensorBoard as well.
        guard: around what is only shown.

    Raises:
        MissingPackageError: TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path, step: int, evaluated: bool, tensorboard: bool, guard: Guard) -> None:
        self.out = out
        self.guard = guard
        self._board: Any = None
        if tensorboard:
            _extras.load("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(out / TENSORBOARD, purge_step=step + 1)
        for name in (METRICS, TIMINGS):
            _drop_after(out / name, step, evaluated)
        self._files = {name: _Lines(out / name) for name in (METRICS, TIMINGS)}

    def metrics(self, step: int, **values: float) -> None:
        self._add(METRICS, step, values)

    def timings(self, step: int, **values: float) -> None:
        self._add(TIMINGS, step, values)

    def _add(self, name: str, step: int, values: dict[str, float]) -> None:
        self._files[name].add(json.dumps({"step": step, **values}))
        if self._board is not None:
            with self.guard("TensorBoard"):
                for key, value in values.items():
                    self._board.add_scalar(key, value, step)

    def sync(self) -> None:
        """Makes all lines so far durable.

        Raises:
            OSError: they cannot be written; names the file.
        """
        for file in self._files.values():
            file.sync()

    def plot(self, baseline: tuple[str, float]) -> None:
        """Draws ``loss.png`` anew; `baseline` is what a model without context reaches, with its name."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
        records = read_records(self.out / METRICS)
        loss, val_loss = ([(r["step"], r[key]) for r in records if key in r] for key in ("loss", "val_loss"))
        if loss:
            axes.plot(*zip(*loss), linewidth=0.8, alpha=0.6, label="training")
        if val_loss:
            axes.plot(*zip(*val_loss), marker="o", markersize=3, label="validation")
        name, value = baseline
        axes.axhline(value, color="grey", linestyle="--", label=name)
        axes.legend()
        save_figure(figure, self.out / PLOT)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            with self.guard("TensorBoard"):
                self._board.close()


class _Lines:
    """A file that lines are added to at once; what a full disk does not take waits for the next line, or for `sync`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._left = bytearray()

    def add(self, line: str) -> None:
        self._left += line.encode() + b"\n"
        with suppress(OSError):
            self._write()

    def sync(self) -> None:
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(f"{self.path} could not be written ({error})") from error

    def close(self) -> None:
        with suppress(OSError):
            self._write()
        self._file.close()

    def _write(self) -> None:
        while self._left:
            del self._left[: self._file.write(self._left)]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON, without a last one that a kill has torn."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _drop_after(path: Path, step: int, evaluated: bool) -> None:
    records = [record for record in read_records(path) if record["step"] <= step]
    kept = [record for record in records if evaluated or record["step"] < step or "val_loss" not in record]
    with atomic_writer(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
