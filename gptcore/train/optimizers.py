"""The optimizers of ``--optimizer``: AdamW and Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptcore.models import Model
from gptcore.train.config import RunConfig
from gptcore.train.hardware import multiplies_bf16
from gptcore.train.parallel import shard_like, whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the polynomial ``a x + b x^3 + c x^5``, whose iteration brings singular values to about 1."""
_ITERATIONS = 5


def make_optimizer(model: Model, config: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    """Returns the optimizer that `config` names, with weight decay on matrices only; it skips frozen parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    betas = config.beta1, config.beta2
    if config.optimizer == "muon":
        hidden = [p for p in model.blocks.parameters() if p.requires_grad and p.dim() == 2]
        chosen = {id(p) for p in hidden}
        groups = [
            {
                "params": hidden,
                "weight_decay": config.weight_decay,
                "lr_scale": config.muon_lr / config.lr,
                "muon": True,
            },
            {"params": [p for p in matrices if id(p) not in chosen], "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
        return Muon(groups, lr=config.lr, momentum=config.momentum, betas=betas, dtype=dtype)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # Fused on the devices for which PyTorch has a fused AdamW.
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=device.type in ("cuda", "cpu"))


def initialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates the tensors that the optimizer keeps for each parameter, by a step with zero gradients and learning rate.

    The step changes no weight. The tensors are sharded like the parameters.
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


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``"muon": True``, whose parameters are matrices, and AdamW for the others.

    The step of a matrix is its momentum with all singular values brought to about 1. Results equal those of
    `torch.optim.Muon` within rounding; that one always iterates in bfloat16, this one in a `dtype` that the machine
    multiplies fast. For matrices that FSDP shards, every process gathers the momentum, computes the whole step and keeps its
    shard.

    Args:
        groups: dicts with ``params``, ``weight_decay``, and optionally ``muon`` and ``lr_scale``.
        lr: learning rate; the trainer multiplies it by a group's ``lr_scale``.
        momentum: Nesterov momentum of matrices.
        betas: AdamW's decay rates, for the other parameters.
        eps: AdamW's eps.
        dtype: of the iteration's matrix products.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, kellerjordan.github.io/posts/muon.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "muon": False})
        for group in self.param_groups:
            if group["muon"] and (wrong := [p.shape for p in group["params"] if p.dim() != 2]):
                raise ValueError(f"groups: got a parameter of shape {tuple(wrong[0])} for Muon; accepted are matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _muon(self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"]
        mean.lerp_(gradient, 1 - group["momentum"])
        step = gradient.lerp(mean, group["momentum"])
        rows, columns = parameter.shape
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        parameter.sub_(shard_like(orthogonalised(whole(step), self.dtype), parameter), alpha=rate)

    def _adamw(self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        (beta1, beta2), count = group["betas"], float(state["step"])
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (square.sqrt() / math.sqrt(1 - beta2**count)).add_(group["eps"])
        parameter.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1**count))


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Brings the singular values of ``(M, N)`` to between about 0.7 and 1.2, by five Newton-Schulz iterations in `dtype`.

    A zero matrix stays zero.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T  # (M, M) of the shorter side
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
