"""The optimizers, by the names that ``--optimizer`` has for them."""

from __future__ import annotations

import torch

from gptcore.models import Model
from gptcore.train.config import TrainConfig


def make_optimizer(model: Model, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused where PyTorch has it for the device, with decay on matrices only; frozen parameters are left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=device.type in ("cuda", "cpu"))


def initialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the tensors that the optimizer keeps for each parameter, as its first step would, and changes no weight.

    The step has gradients of zero and a learning rate of zero. What is made is sharded as the parameters are.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
