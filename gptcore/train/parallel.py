"""Training in several processes: how they share a batch and the model's weights."""

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
    """The processes that train together; one unless `torchrun` started more."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums `values` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Tensor) -> list[Tensor]:
        """Returns the CPU tensors of all processes by rank; all have the same shape."""
        if self.size == 1:
            return [value]
        gathered = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def rows(self, batch_size: int) -> slice:
        """Returns this process's rows of a batch.

        Raises:
            ValueError: `batch_size` is not a multiple of the number of processes.
        """
        if batch_size % self.size:
            raise ValueError(f"batch_size: got {batch_size}; accepted are multiples of the {self.size} processes")
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


ALONE = World()


@contextmanager
def processes(device: str) -> Iterator[tuple[World, torch.device]]:
    """Joins the processes that `torchrun` started; gives them and this one's device. Without `torchrun` there is one process.

    An existing process group is used, and not destroyed. A process can join a new group only once: PyTorch does not find the
    others a second time.
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
        dist.barrier()  # no process leaves while another still communicates with it
    finally:
        gc.collect()  # frees what holds the group's threads, before the group itself
        dist.destroy_process_group()


def _recomputed(forward: Callable[..., Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False)


def checkpoint_activations(model: Model) -> None:
    """Makes each block save only its inputs; its backward recomputes the rest, with the same dropout."""
    for block in model.blocks:
        block.forward = partial(_recomputed, block.forward)


class Replica:
    """The model in this process: alone, replicated (DDP) or sharded (FSDP).

    A task's loss calls `forward`; its backward averages the gradients over the processes.

    Raises:
        ValueError: ``parallel`` needs processes that `torchrun` did not start.
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

            # Harmless: a block returns a view of a product, and nothing changes it in place.
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

    def reshard(self) -> None:
        """Shards the weights again that a forward without backward has left whole; the optimizer must take the shards."""
        if self.sharded:
            self._fsdp.reshard()

    def sums_gradients(self, last: bool) -> AbstractContextManager[object]:
        """Skips gradient synchronisation for a micro-batch, unless it is the `last` one of the step."""
        if self.sharded:
            self._fsdp.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if self._ddp is None or last else self._ddp.no_sync()


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that may be sharded; every process must call this."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns this process's shard of `tensor`, sharded like `other` and on its device; all of it if `other` is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
