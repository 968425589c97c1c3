"""The records of a run: metrics.jsonl, timings.jsonl, loss.png, and optionally TensorBoard's files."""

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
    """Writes a line of JSON for each step and each evaluation.

    ``metrics.jsonl`` holds values that only depend on the configuration, so that a run that was killed and resumed leaves the
    same file, byte for byte; ``timings.jsonl`` holds measured times. Lines that do not fit on a full disk are kept in memory;
    they are an error only if `sync` still cannot write them.

    Args:
        out: folder of the run.
        step: drop lines after this step: a run that was killed after its checkpoint repeats those steps.
        evaluated: keep this step's evaluation; False drops it, because it is repeated.
        tensorboard: also write for TensorBoard.
        guard: handles errors of TensorBoard.

    Raises:
        MissingPackageError: TensorBoard is not installed.
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
        """Writes all lines so far to the disk.

        Raises:
            OSError: a file cannot be written; names it.
        """
        for file in self._files.values():
            file.sync()

    def plot(self, baseline: tuple[str, float] | None) -> None:
        """Draws ``loss.png``; `baseline` is the name and the loss of a trivial model, if there is one."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per target")
        records = read_records(self.out / METRICS)
        loss, val_loss = ([(r["step"], r[key]) for r in records if key in r] for key in ("loss", "val_loss"))
        if loss:
            axes.plot(*zip(*loss), linewidth=0.8, alpha=0.6, label="training")
        if val_loss:
            axes.plot(*zip(*val_loss), marker="o", markersize=3, label="validation")
        if baseline:
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
    """Appends lines to a file without a buffer. What a full disk refuses is written with the next line, or by `sync`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._unwritten = bytearray()

    def add(self, line: str) -> None:
        self._unwritten += line.encode() + b"\n"
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
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines, without an incomplete last line, which a killed process may leave."""
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
