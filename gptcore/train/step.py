"""A training step and an evaluation. Losses are summed over micro-batches and processes, and divided at the end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch

from gptcore.nn.mode import evaluation_mode
from gptcore.train.parallel import whole
from gptcore.train.state import TrainState


class StepResult(NamedTuple):
    """The result of a step's forward and backward, the same in every process."""

    loss: float
    """Nats per target."""
    norm: float
    """Norm of all gradients together, before clipping."""
    tokens: int
    """Tokens in the step's batches."""
    flops: float
    """Floating-point operations of the model on these tokens; see `Model.flops`."""
    stop: bool
    """Whether a process was asked to stop."""


def gradients(state: TrainState, step: int = 0, stopped: Callable[[], bool] = lambda: False) -> StepResult:
    """Runs forward and backward of the micro-batches of `step`, from 0; leaves the clipped gradients in the parameters.

    The loss is the sum over all micro-batches and processes, divided by the number of all targets. Its gradient does not
    depend on how the rows are split into micro-batches and among processes.

    Raises:
        ValueError: all targets are ignored.
    """
    config, world = state.config, state.world
    sums = torch.zeros(2, device=state.device)  # nats, targets
    tokens, flops, divisor = 0, 0, 1
    for index in range(state.batches):
        number = step * state.batches + index
        batch = state.task.batch(config.batch_size, state.generator, state.rows, number)
        rows, length = batch.shape
        tokens += rows * length
        flops += state.flops(batch.shape)
        # The number of targets is known only after the last batch. Dividing by the most tokens that there may be keeps the
        # gradients in the range of a mean loss until then. It is the same in every process; lengths may differ.
        divisor = rows * state.model.config.context * state.batches
        with state.replica.sums_gradients(last=index == state.batches - 1):
            with state.autocast():
                loss, count = state.task.loss(state.replica.forward, batch.to(state.device))
            (loss / divisor).backward()
        sums += torch.stack([loss.detach(), count])
    own = torch.cat([sums.cpu().double(), torch.tensor([tokens, flops, stopped()], dtype=torch.float64)])
    nats, targets, tokens, flops, stop = world.sum(own).tolist()
    if not targets:
        raise ValueError("data: all targets of the step are ignored; accepted are batches with one target or more")
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]
    correction = divisor * world.size / targets  # DDP and FSDP have averaged over the processes
    if correction != 1.0:
        for gradient in grads:
            gradient.mul_(correction)
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if config.clip and norm > config.clip:  # saves a pass over the gradients in most steps
        torch.nn.utils.clip_grads_with_norm_(state.model.parameters(), config.clip, norm)
    return StepResult(nats / targets, float(norm), int(tokens), flops, stop > 0)


def update(state: TrainState, lr: float) -> None:
    """Runs the optimizer's step with the gradients in the parameters, and clears them."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad()


@torch.no_grad()
def evaluate(state: TrainState, limit: int | None) -> dict[str, float]:
    """Returns what the task measures, such as its loss in nats per target, on validation data.

    The processes share the batches, and all return the same values.

    Args:
        state: the run.
        limit: number of rows, spread evenly over the validation data; None: all.
    """
    model, task, world = state.model, state.task, state.world
    sums: dict[str, torch.Tensor] = {}  # for each value its sum and count, (2,) float64
    batches = task.evaluation(state.config.batch_size, limit)
    with evaluation_mode(model), state.autocast():
        while group := list(islice(batches, world.size)):
            # In the last round some processes may have no batch. They compute another's, because gathering sharded weights
            # needs every process.
            batch = group[min(world.rank, len(group) - 1)]
            for name, pair in task.evaluate(model, batch.to(state.device)).items():
                added = torch.stack(pair).cpu().double()
                sums[name] = sums.get(name, torch.zeros_like(added)) + (added if world.rank < len(group) else 0.0)
    totals = {name: world.sum(pair).tolist() for name, pair in sums.items()}
    return {name: total / count for name, (total, count) in totals.items()}
