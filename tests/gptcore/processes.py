"""One of the processes that train the same GPT on shares of each batch: run by test_machinery.py.

``python -m tests.gptcore.processes STORE RANK SIZE DEVICE``: on "cpu" they talk by gloo, on "cuda" by NCCL.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys

import gptkernels
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gptcore import GPT, GPTConfig

STEPS, ROWS = 3, 4
CONFIG = GPTConfig(vocab_size=61, context=32, n_layer=2, n_head=2, width=32)


def make(device: str) -> tuple[GPT, torch.Tensor]:
    """The model, and tokens and targets of each step for all processes, (2, steps, rows, T)."""
    kernels = "triton" if device == "cuda" else "native"
    kernels = kernels if kernels in gptkernels.available_backends() else "reference"
    torch.manual_seed(0)
    model, tokens = GPT(dataclasses.replace(CONFIG, kernels=kernels)), torch.randint(0, 61, (2, STEPS, ROWS, 24))
    return model.to(device), tokens.to(device)


def train(model: GPT, loss_of, x: torch.Tensor, y: torch.Tensor) -> None:
    # Not Adam: in its first steps the sign of a gradient counts alone, and rounding decides the sign of small ones.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for tokens, targets in zip(x, y):
        loss_of(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(store: str, rank: int, size: int, device: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)

    alone, (x, y) = make(device)
    train(alone, alone.loss, x, y)

    model, _ = make(device)
    replicated = DistributedDataParallel(model)
    train(model, lambda tokens, targets: replicated(tokens, targets=targets), x[:, mine], y[:, mine])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-4, atol=1e-6)
    print("ddp equal", flush=True)

    sharded, _ = make(device)
    mesh = init_device_mesh(device, (size,))
    for part in (*sharded.h, sharded):
        fully_shard(part, mesh=mesh)
    train(sharded, sharded.loss, x[:, mine], y[:, mine])
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), alone.get_parameter(name), rtol=1e-4, atol=1e-6)
    print("fsdp equal", flush=True)

    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
