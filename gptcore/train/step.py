"""A training step, forward, backward and update, and an evaluation: sums over batches and processes, divided at the end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch

from gptcore.train.parallel import whole
from gptcore.train.state import TrainState


class StepResult(NamedTuple):
    """What one step's forward and backward found, the same in every process."""

    loss: float
    """Nats per target."""
    norm: float
    """Of all gradients together, before clipping."""
    tokens: int
    """That the step's batches held."""
    flops: float
    """Floating-point operations that the model needs for them; see `Model.flops`."""
    stop: bool
    """Whether a process was asked to stop."""


def gradients(state: TrainState, stopped: Callable[[], bool] = lambda: False) -> StepResult:
    """Forward and backward of one step's batches; leaves the clipped gradients in the parameters.

    The gradient is that of the summed loss of all batches and processes over the number of all targets, however the rows
    are shared out among them.

    Raises:
        ValueError: not one target counts.
    """
    config, world = state.config, state.world
    sums = torch.zeros(2, device=state.device)  # nats, targets
    tokens, flops, divisor = 0, 0, 1
    for index in range(state.batches):
        batch = state.task.batch(config.batch_size, state.generator, state.rows)
        rows, length = batch.shape
        tokens += rows * length
        flops += state.model.flops(batch.shape)
        # How many targets count is known after the last batch. Until then sums are divided by the number of tokens, which
        # keeps gradients near the size of a mean's.
        divisor = divisor if index else rows * length * state.batches
        with state.replica.sums_gradients(last=index == state.batches - 1):
            with state.autocast():
                loss, count = state.task.loss(state.replica.forward, batch.to(state.device))
            (loss / divisor).backward()
        sums += torch.stack([loss.detach(), count])
    own = torch.cat([sums.cpu().double(), torch.tensor([tokens, flops, stopped()], dtype=torch.float64)])
    nats, targets, tokens, flops, stop = world.sum(own).tolist()
    if not targets:
        raise ValueError("data: none of the step's targets counts; accepted are batches with one target or more")
    found = [p.grad for p in state.model.parameters() if p.grad is not None]
    correction = divisor * world.size / targets  # backward has averaged over the processes
    if correction != 1.0:
        for gradient in found:
            gradient.mul_(correction)
    norm = whole(torch.nn.utils.get_total_norm(found))
    if config.clip and norm > config.clip:  # most steps need no pass over the gradients
        torch.nn.utils.clip_grads_with_norm_(state.model.parameters(), config.clip, norm)
    return StepResult(nats / targets, float(norm), int(tokens), flops, stop > 0)


def update(state: TrainState, lr: float) -> None:
    """The optimizer's step with the gradients that are there, which it uses up."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()


@torch.no_grad()
def evaluate(state: TrainState, limit: int | None) -> float:
    """Nats per target over `limit` rows spread evenly over the validation data (None, or fewer rows: all of them).

    The processes share the batches, and all return the same.
    """
    model, task, world = state.model, state.task, state.world
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
    batches = task.evaluation(state.config.batch_size, limit)
    with state.autocast():
        while group := list(islice(batches, world.size)):
            # In the last round some may have no batch: they compute another's, for sharded weights are gathered together.
            batch = group[min(world.rank, len(group) - 1)]
            loss, count = task.loss(model, batch.to(state.device))
            if world.rank < len(group):
                sums += torch.stack([loss, count]).cpu().double()
    model.train(was_training)
    nats, count = world.sum(sums).tolist()
    return nats / count
