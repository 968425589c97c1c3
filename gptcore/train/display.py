"""The display of a run: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from gptcore.train.guard import Guard, GuardedStream

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille character, by row and column


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """Returns a curve as `height` lines of `width` characters, in braille dots, with its highest and lowest value at the left."""
    values = [value for value in values if math.isfinite(value)]
    labels = [f"{edge:8.3f} " for edge in (max(values, default=0.0), min(values, default=0.0))]
    columns = max(2 * (width - len(labels[0])), 2)
    rows = 4 * height
    cells = [[0x2800] * (columns // 2) for _ in range(height)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    count = min(columns, len(values))
    for column in range(count):
        part = values[column * len(values) // count : (column + 1) * len(values) // count]
        mean = sum(part) / len(part)
        row = round((high - mean) / (high - low) * (rows - 1)) if high > low else rows - 1
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    lines = ["".join(map(chr, row)) for row in cells]
    edges = [labels[0], *[" " * len(labels[0])] * (height - 2), labels[1]]
    return [edge + line for edge, line in zip(edges, lines)]


def shown(name: str, value: float) -> str:
    """Returns a measured value for people; accuracies and rates as a percentage."""
    words = name.replace("_", " ")
    return f"{words} {value:.1%}" if name.endswith(("accuracy", "rate")) else f"{words} {value:.3f}"


class Display:
    """Shows progress, curve, speed and the latest sample. Use it in a ``with`` block. Errors in printing end nothing.

    Args:
        shown: whether to print anything.
        steps: steps of the whole run.
        done: steps done before.
        guard: reports what could not be shown, once.
        console: a `rich.console.Console`; None for one on the standard output.
    """

    def __init__(self, shown: bool, steps: int, done: int = 0, guard: Guard | None = None, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.guard = guard or Guard()
        out = sys.stdout  # None in a process that was started without one
        stream: Any = out and GuardedStream(out, self.guard)
        self.console = console or Console(file=stream, quiet=not shown, highlight=False)
        self.steps, self.done = steps, done
        self.losses: list[float] = []
        self.status, self.sample = "", ""
        columns = TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self.console, expand=True)
        self._task = self._bar.add_task("training", total=steps, completed=done)
        live = shown and self.console.is_terminal
        self._live = Live(self, console=self.console, refresh_per_second=4, transient=True) if live else None
        # For the time left: the steps since `done`, and the seconds of all but the first, which also compiles and allocates.
        self._steps, self._seconds = 0, 0.0

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        drawn = self.losses and not self.console.options.ascii_only  # braille
        lines = chart(self.losses, min(self.console.width, 100), 8) if drawn else []
        sample = [Text(self.sample, style="dim")] if self.sample else []
        return Group(*map(Text, lines), Text(self.status), self._bar, *sample)

    def say(self, text: str) -> None:
        """Prints text above the live view, where it stays. Markup and emoji codes in it are not interpreted."""
        from rich.text import Text

        self.console.print(Text(text), soft_wrap=True)

    def step(self, done: int, loss: float, seconds: float, tokens_per_second: float, mfu: float) -> None:
        """Shows a finished step."""
        self.done = done
        self.losses.append(loss)
        self._steps += 1
        self._seconds += seconds if self._steps > 1 else 0.0
        self.status = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, MFU {mfu:.0%}"
        self._bar.update(self._task, completed=done)
        if self._live is None and done % max(self.steps // 20, 1) == 0:
            left = ""
            if self._steps > 1:
                seconds = round(self._seconds / (self._steps - 1) * (self.steps - done))
                left = f", {seconds // 60}:{seconds % 60:02d} left"
            self.say(f"step {done}/{self.steps}: {self.status}{left}")

    def sweep(self, done: int, lr: float, loss: float) -> None:
        """Shows a step of the search for a learning rate."""
        self.losses.append(loss)
        self.status = f"lr {lr:.1e}, loss {loss:.3f}"
        self._bar.update(self._task, completed=done)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Shows what an evaluation measured."""
        self.say(f"step {step}: validation " + ", ".join(shown(name, value) for name, value in values.items()))

    def sampled(self, sample: str) -> None:
        """Shows the model's sample."""
        self.sample = "  " + sample.replace("\n", "\n  ") if sample else ""
        if self.sample and self._live is None:
            self.say(self.sample)
