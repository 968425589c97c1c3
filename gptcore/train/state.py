"""The state of a run: task, model, optimizer, random states and progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gptcore.models import MODELS, Model
from gptcore.nn import load_kernels
from gptcore.tasks import TASKS, Task
from gptcore.train import finetune
from gptcore.train.config import RunConfig, TrainConfig
from gptcore.train.finetune_config import FinetuneConfig
from gptcore.train.hardware import multiplies_bf16
from gptcore.train.optimizers import make_optimizer
from gptcore.train.parallel import Replica, World, checkpoint_activations


@dataclass(frozen=True)
class Progress:
    """The progress of a run, as a checkpoint saves it."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    evaluated: int | None = None
    """Step of the last evaluation."""
    val_loss: float | None = None
    """Its loss on `eval_windows` rows, nats per target."""
    val_loss_full: float | None = None
    """Its loss on all validation data; only after the last step."""
    best_step: int | None = None
    """Step of the evaluation with the lowest `val_loss`."""
    best_val_loss: float | None = None

    def awaits_evaluation(self, config: RunConfig) -> bool:
        """Whether this step is due for evaluation and has not been evaluated; it is saved before."""
        if self.step == config.steps:
            return self.val_loss_full is None
        return self.step > 0 and self.step % config.eval_interval == 0 and self.evaluated != self.step


class TrainState:
    """Task, model, optimizer and random states of a run, as before its first step. Writes nothing.

    Raises:
        ValueError: data and configuration do not fit; names the argument.
        BackendUnavailableError: an explicit choice of kernels that cannot run here.
    """

    model: Model

    def __init__(self, config: RunConfig, world: World, device: torch.device) -> None:
        self.world, self.device = world, device
        self.rows = world.rows(config.batch_size)
        self.batches = config.batches()
        self.bf16 = config.dtype == "bf16" or (config.dtype == "auto" and multiplies_bf16(device))
        self.config: RunConfig = config
        """The options, with what the data and the base decide filled in."""
        self.base: str | None = None
        """Path or name of the base that is fine-tuned."""
        self.base_digest: str | None = None
        """Changes with the weights of the base that is fine-tuned."""
        self.task: Task
        if isinstance(config, FinetuneConfig):
            torch.manual_seed(config.seed)
            self.base = finetune.portable(config.model)
            self.config, self.task, self.model, self.base_digest = finetune.begin(config, self.bf16)
        else:
            assert isinstance(config, TrainConfig)
            make_task: Any = TASKS[config.task.name][1]
            self.task = make_task(config.task, config.data, config.model_config().context, config.seed)
            torch.manual_seed(config.seed)
            self.model = MODELS[config.model](config.model_config(**self.task.model_changes()))
        load_kernels(config.kernels, device)  # here and not in step 1, whose time is measured
        self.parameters = self.model.num_parameters()
        self.trained = self.model.num_parameters(trained=True)
        self._flops_share = self.model.trained_flops_share()
        if config.checkpoint_activations:
            checkpoint_activations(self.model)
        self.replica = Replica(self.model, world, device, config.parallel, config.compile)
        with self.autocast():
            self.task.start(self.model)
        self.replica.reshard()
        self.optimizer = make_optimizer(self.model, config, device)
        self.generator = torch.Generator().manual_seed(config.seed)
        """Draws the batches: the same in every process, which then takes its own rows."""
        torch.manual_seed(config.seed + world.rank)  # dropout differs between processes

    def flops(self, batch_shape: tuple[int, int]) -> float:
        """Returns the floating-point operations of a training step on a batch; frozen weights take fewer."""
        return self.model.flops(batch_shape) * self._flops_share

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sample(self) -> str:
        """Returns the task's sample of the model; "" in processes that do not take part."""
        return self.task.sample(self.model) if self.world.is_main or self.replica.sharded else ""
