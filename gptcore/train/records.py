"""What a run writes down: metrics.jsonl, timings.jsonl, loss.png, and TensorBoard's files if asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gptcore import _extras
from gptcore._files import atomic_writer, save_figure

METRICS, TIMINGS, PLOT, TENSORBOARD = "metrics.jsonl", "timings.jsonl", "loss.png", "tensorboard"


class Records:
    """Lines of JSON, one for each step and each evaluation.

    ``metrics.jsonl`` holds what the configuration decides and nothing that a clock does, so that a run that was
    killed and resumed leaves the same file, byte for byte; ``timings.jsonl`` holds the rest.

    Args:
        out: the run's folder.
        step: lines after this step are dropped: a run killed after its checkpoint wrote some that come again.
        tensorboard: write both for TensorBoard as well.

    Raises:
        MissingPackageError: TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self.out = out
        self._board: Any = None
        if tensorboard:
            _extras.load("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(out / TENSORBOARD, purge_step=step + 1)
        for name in (METRICS, TIMINGS):
            _drop_after(out / name, step)
        self._files = {name: (out / name).open("a") for name in (METRICS, TIMINGS)}

    def metrics(self, step: int, **values: float) -> None:
        self._add(METRICS, step, values)

    def timings(self, step: int, **values: float) -> None:
        self._add(TIMINGS, step, values)

    def _add(self, name: str, step: int, values: dict[str, float]) -> None:
        file = self._files[name]
        file.write(json.dumps({"step": step, **values}) + "\n")
        file.flush()
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def sync(self) -> None:
        """Makes all lines so far durable."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def plot(self, entropy: float) -> None:
        """Draws ``loss.png`` anew; `entropy` is the unigram entropy, nats per token."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
        records = read_records(self.out / METRICS)
        loss, val_loss = ([(r["step"], r[key]) for r in records if key in r] for key in ("loss", "val_loss"))
        if loss:
            axes.plot(*zip(*loss), linewidth=0.8, alpha=0.6, label="training")
        if val_loss:
            axes.plot(*zip(*val_loss), marker="o", markersize=3, label="validation")
        axes.axhline(entropy, color="grey", linestyle="--", label="unigram entropy")
        axes.legend()
        save_figure(figure, self.out / PLOT)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON, without a last one that a kill has torn."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _drop_after(path: Path, step: int) -> None:
    kept = [record for record in read_records(path) if record["step"] <= step]
    with atomic_writer(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
