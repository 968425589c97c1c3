"""Suggests a learning rate, from a short sweep of rates from far too small to far too large."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptcore._files import save_figure
from gptcore.train import step as training_step
from gptcore.train.config import RunConfig
from gptcore.train.display import Display
from gptcore.train.parallel import processes
from gptcore.train.run_folder import locked_folder
from gptcore.train.state import TrainState

LR_PLOT = "lr.png"
_SMOOTHING, _DIVERGED = 0.9, 1.5


@dataclass(frozen=True)
class LrSweep:
    """The result of `find_lr`."""

    lrs: tuple[float, ...]
    """The learning rate of each step, until the loss diverged."""
    losses: tuple[float, ...]
    """The smoothed loss of each step, nats per target."""
    suggestion: float
    """A tenth of the learning rate with the lowest smoothed loss."""


def smoothed(losses: list[float]) -> list[float]:
    """Returns exponential moving averages with a decay of 0.9, corrected for their start at 0."""
    mean, means = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        means.append(mean / (1 - _SMOOTHING**count))
    return means


def find_lr(
    config: RunConfig, *, low: float = 1e-6, high: float = 1.0, steps: int = 100, progress: bool = True
) -> LrSweep:
    """Trains a temporary model with learning rates that grow from `low` to `high` by a constant factor a step.

    It ends early if the loss rises far above its lowest value. The only output is ``lr.png`` in ``config.out``.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.3. A
    tenth of the rate of the lowest loss is a rule of thumb.

    Raises:
        ValueError: as `train`; more than one process; an empty range.
        BlockingIOError: another process trains in ``out``.
    """
    if not 0 < low < high < math.inf or steps < 2:
        raise ValueError(
            f"low, high, steps: got {low}, {high}, {steps}; accepted are 0 < low < high and 2 steps or more"
        )
    with processes(config.device) as (world, device):
        if world.size > 1:
            raise ValueError(f"find_lr: got {world.size} processes; accepted is one")
        with locked_folder(config.out, world):
            sweep = _sweep(TrainState(config, world, device), low, high, steps, progress)
            _plot(sweep, config)
    return sweep


def _sweep(state: TrainState, low: float, high: float, steps: int, progress: bool) -> LrSweep:
    state.model.train()
    lrs: list[float] = []
    losses: list[float] = []
    with Display(progress, steps) as display:
        for done in range(steps):
            lr = low * (high / low) ** (done / (steps - 1))
            found = training_step.gradients(state, done)
            if not math.isfinite(found.loss) or not math.isfinite(found.norm):
                break
            lrs.append(lr)
            losses.append(found.loss)
            means = smoothed(losses)
            if means[-1] > _DIVERGED * min(means):
                break
            training_step.update(state, lr)
            display.sweep(done + 1, lr, found.loss)
    means = smoothed(losses)
    if not means:
        raise FloatingPointError("the loss of the initial weights is not finite: no learning rate can be found")
    suggestion = lrs[means.index(min(means))] / 10
    return LrSweep(tuple(lrs), tuple(means), suggestion)


def _plot(sweep: LrSweep, config: RunConfig) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="smoothed loss, nats per target", xscale="log")
    axes.plot(sweep.lrs, sweep.losses)
    axes.axvline(sweep.suggestion, color="grey", linestyle="--", label=f"suggestion {sweep.suggestion:.1e}")
    axes.legend()
    save_figure(figure, config.out / LR_PLOT)
