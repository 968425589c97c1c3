"""One of two processes that train the same GPT on halves of each batch: run by test_machinery.py."""

from __future__ import annotations

import datetime
import sys

import gptkernels
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gptcore import GPT, GPTConfig

STEPS, ROWS = 3, 2
KERNELS = "native" if "native" in gptkernels.available_backends() else "reference"
CONFIG = GPTConfig(vocab_size=61, context=32, n_layer=2, n_head=2, width=32, kernels=KERNELS)


def make() -> tuple[GPT, torch.Tensor]:
    """The model, and tokens and targets of each step for both processes, (2, steps, 2 * rows, T)."""
    torch.manual_seed(0)
    return GPT(CONFIG), torch.randint(0, CONFIG.vocab_size, (2, STEPS, 2 * ROWS, 24))


def train(model: GPT, loss_of, x: torch.Tensor, y: torch.Tensor) -> None:
    # Not Adam: in its first steps the sign of a gradient counts alone, and rounding decides the sign of small ones.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for tokens, targets in zip(x, y):
        loss_of(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)

    alone, (x, y) = make()
    train(alone, alone.loss, x, y)

    model, _ = make()
    replicated = DistributedDataParallel(model)
    train(model, lambda tokens, targets: replicated(tokens, targets=targets), x[:, mine], y[:, mine])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-4, atol=1e-6)
    print("ddp equal", flush=True)

    sharded, _ = make()
    mesh = init_device_mesh("cpu", (2,))
    for part in (*sharded.h, sharded):
        fully_shard(part, mesh=mesh)
    train(sharded, sharded.loss, x[:, mine], y[:, mine])
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), alone.get_parameter(name), rtol=1e-4, atol=1e-6)
    print("fsdp equal", flush=True)

    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
