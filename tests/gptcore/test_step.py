"""A step's gradient is that of the summed loss over all targets, however the rows are shared out."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gptcore.train import step
from gptcore.train.parallel import World

ROWS, WIDTH = 8, 5


class Rows(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, 1)
        self.config = SimpleNamespace(context=ROWS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[..., 0]

    def flops(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]


class Batch:
    def __init__(self, x: torch.Tensor, targets: torch.Tensor) -> None:
        self.x, self.targets = x, targets
        self.shape = tuple(targets.shape)

    def to(self, device: torch.device) -> Batch:
        return self


class Task:
    """Rows of squared errors, of which row i has i + 1 targets that count."""

    def __init__(self, ignored: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(ROWS, ROWS, WIDTH, generator=generator)
        self.y = torch.randn(ROWS, ROWS, generator=generator)
        self.counts = (torch.arange(ROWS)[None, :] <= torch.arange(ROWS)[:, None]) & (not ignored)

    def batch(self, size: int, generator: torch.Generator, rows: slice, index: int) -> Batch:
        chosen = slice(index * size, (index + 1) * size)
        return Batch(self.x[chosen][rows], self.y[chosen].masked_fill(~self.counts[chosen], torch.nan)[rows])

    def loss(self, model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        counted = ~batch.targets.isnan()
        return (model(batch.x)[counted] - batch.targets[counted]).square().sum(), counted.sum().float()


class Processes(World):
    """One of several processes, that are none: tests say what the sum over all is."""


def state(batches: int, task: Task, world: World, clip: float = 0.0) -> SimpleNamespace:
    model = Rows()
    return SimpleNamespace(
        config=SimpleNamespace(batch_size=ROWS // batches, clip=clip),
        world=world,
        device=torch.device("cpu"),
        task=task,
        model=model,
        flops=model.flops,
        batches=batches,
        rows=world.rows(ROWS // batches),
        generator=torch.Generator(),
        autocast=nullcontext,
        replica=SimpleNamespace(forward=model, sums_gradients=lambda last: nullcontext()),
    )


def expected() -> tuple[torch.Tensor, float]:
    """The gradient of the mean over all targets, and that mean."""
    model, task = Rows(), Task()
    errors = (model(task.x) - task.y).square()[task.counts]
    errors.mean().backward()
    return model.layer.weight.grad, float(errors.mean())


@pytest.mark.parametrize("batches", [1, 2, 4, 8])
def test_any_micro_batches_have_the_gradient_of_all_rows(batches: int):
    """Row i has i + 1 targets: a mean of the batches' means would be another."""
    gradient, loss = expected()
    made = state(batches, Task(), World())
    found = step.gradients(made)
    torch.testing.assert_close(made.model.layer.weight.grad, gradient)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.tokens == ROWS * ROWS
    assert found.flops == ROWS * ROWS
    norms = [p.grad.norm() for p in made.model.parameters()]
    assert found.norm == pytest.approx(float(torch.stack(norms).norm()), rel=1e-6)


@pytest.mark.parametrize("batches", [1, 2])
def test_any_processes_have_the_gradient_of_all_rows(batches: int, monkeypatch: pytest.MonkeyPatch):
    """Two processes, whose gradients DistributedDataParallel averages."""
    gradient, loss = expected()
    sums = []
    for rank in range(2):  # first what each adds up, then with the sum over both
        monkeypatch.setattr(Processes, "sum", lambda self, values: sums.append(values.clone()) or values)
        step.gradients(state(batches, Task(), Processes(rank, 2)))
    monkeypatch.setattr(Processes, "sum", lambda self, values: sums[0] + sums[1])
    found = []
    for rank in range(2):
        made = state(batches, Task(), Processes(rank, 2))
        assert step.gradients(made).loss == pytest.approx(loss, rel=1e-6)
        found.append(made.model.layer.weight.grad)
    torch.testing.assert_close((found[0] + found[1]) / 2, gradient)


def test_gradients_are_clipped_after_they_are_divided():
    made = state(2, Task(), World(), clip=0.25)
    found = step.gradients(made)
    assert found.norm > 0.25
    norms = [p.grad.norm() for p in made.model.parameters()]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.25, rel=1e-4)


def test_a_step_without_a_target_is_refused():
    with pytest.raises(ValueError, match="data: all targets of the step are ignored"):
        step.gradients(state(2, Task(ignored=True), World()))
