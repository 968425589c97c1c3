"""What a run is made of: the task, the model, the optimizer and the random states, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gptcore.models import MODELS, Model
from gptcore.nn import load_kernels
from gptcore.tasks import TASKS, Task
from gptcore.train.config import TrainConfig
from gptcore.train.hardware import multiplies_bf16
from gptcore.train.optimizers import make_optimizer
from gptcore.train.parallel import Replica, World, checkpoint_activations


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    evaluated: int | None = None
    """The step of the last evaluation."""
    val_loss: float | None = None
    """Its result, nats per target of `eval_windows` rows."""
    val_loss_full: float | None = None
    """The same of all validation data; after the last step only."""
    best_step: int | None = None
    """The evaluation that found the lowest `val_loss`."""
    best_val_loss: float | None = None

    def awaits_evaluation(self, config: TrainConfig) -> bool:
        """Whether this step is to be evaluated and has not been: it is saved first."""
        if self.step == config.steps:
            return self.val_loss_full is None
        return self.step > 0 and self.step % config.eval_interval == 0 and self.evaluated != self.step


class TrainState:
    """Task, model, optimizer and random states of a run, as they are before its first step. Writes nothing.

    Raises:
        ValueError: data and configuration do not fit each other; names the argument.
        BackendUnavailableError: kernels that were chosen explicitly and cannot run here.
    """

    model: Model

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.rows = world.rows(config.batch_size)
        self.batches = config.batches()
        make_task: Any = TASKS[config.task.name][1]
        self.task: Task = make_task(config.task, config.data, config.model_config().context, config.seed)
        load_kernels(config.kernels, device)  # here and not in step 1, whose time is measured
        self.bf16 = config.dtype == "bf16" or (config.dtype == "auto" and multiplies_bf16(device))
        torch.manual_seed(config.seed)
        self.model = MODELS[config.model](config.model_config(**self.task.model_changes()))
        self.parameters = self.model.num_parameters()
        if config.checkpoint_activations:
            checkpoint_activations(self.model)
        self.replica = Replica(self.model, world, device, config.parallel, config.compile)
        self.optimizer = make_optimizer(self.model, config, device)
        self.generator = torch.Generator().manual_seed(config.seed)
        """Of the data: every process draws the same batches and takes its rows."""
        torch.manual_seed(config.seed + world.rank)  # dropout differs between processes

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sample(self) -> str:
        """What the model makes of the task's example; empty in processes that have no part in it."""
        return self.task.sample(self.model) if self.world.is_main or self.replica.sharded else ""
