"""Several processes, one model: who they are, how they share a batch, and the model's weights among them."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptcore.models import Model
from gptcore.train.config import Parallel
from gptcore.train.hardware import find_device


@dataclass(frozen=True)
class World:
    """The processes that train together; alone unless `torchrun` started more."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Tensor) -> list[Tensor]:
        """A CPU tensor of each process, by rank; all of one shape."""
        if self.size == 1:
            return [value]
        gathered = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that are this process's.

        Raises:
            ValueError: a batch that cannot be shared evenly.
        """
        if batch_size % self.size:
            raise ValueError(f"batch_size: got {batch_size}; accepted are multiples of the {self.size} processes")
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


ALONE = World()


@contextmanager
def processes(device: str) -> Iterator[tuple[World, torch.device]]:
    """The processes that `torchrun` started and this one's device; a process that was started alone is the only one.

    A process group that is already there is used and left alone. Without one, `torchrun`'s processes can be joined once
    in their lives: PyTorch does not find the others a second time.
    """
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not started and not dist.is_initialized():
        yield ALONE, find_device(device)
        return
    found = find_device(device)
    if found.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"device: process {local} of this machine has no GPU; accepted are up to {torch.cuda.device_count()} processes"
            )
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size()), found
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), found
        dist.barrier()  # none leaves while another still talks to it
    finally:
        gc.collect()  # what holds the group's threads goes before the group
        dist.destroy_process_group()


def _computed_again(forward: Callable[..., Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)


def checkpoint_activations(model: Model) -> None:
    """Lets each block keep its inputs alone; its backward computes the rest again, with the same dropout."""
    for block in model.blocks:
        block.forward = partial(_computed_again, block.forward)


class Replica:
    """A model as this process trains it: whole, a copy beside others, or a share of one.

    `forward` is what a task's loss calls; its backward averages the gradients over the processes.

    Raises:
        ValueError: ``parallel`` asks for processes that were not started.
    """

    def __init__(self, model: Model, world: World, device: torch.device, parallel: Parallel, compile: bool) -> None:
        if parallel != "auto" and not dist.is_initialized():
            raise ValueError(
                f"parallel: got {parallel!r} in a process started alone; accepted is auto, or "
                "torchrun --nproc-per-node 2 -m gptcore train ..."
            )
        self.sharded = parallel == "fsdp"
        self._ddp = None
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            # A block returns a view of a product's result, and nothing here changes it in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            mesh = init_device_mesh(device.type, (world.size,))
            for block in model.blocks:
                if compile:
                    block.compile()
                fully_shard(block, mesh=mesh)
            self._fsdp = fully_shard(model, mesh=mesh)
            for method in model.forward_methods:
                register_fsdp_forward_method(model, method)
            self.forward: Callable[..., Any] = model
            return
        self.forward = model.to(device)
        if world.size > 1 or parallel == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            ids = [device.index] if device.type == "cuda" else None
            self.forward = self._ddp = DistributedDataParallel(model, device_ids=ids)
        if compile:
            self.forward = torch.compile(self.forward)

    def sums_gradients(self, last: bool) -> AbstractContextManager[object]:
        """Around a batch's forward and backward: gradients are exchanged after the `last` batch of a step alone."""
        if self.sharded:
            self._fsdp.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if self._ddp is None or last else self._ddp.no_sync()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask for it."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor
