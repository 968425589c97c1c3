"""Small models with adapters; and one of two processes that train one: run by test_lora.py.

``python -m tests.gptcore.adapters STORE RANK``
"""

from __future__ import annotations

import datetime
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gptcore import GPT, GPTConfig
from gptcore.models import BERT, BERTConfig, Model
from gptcore.nn import LoRAConfig, add_lora
from gptcore.nn.lora import lora_layers

_SIZES: dict[str, Any] = {"vocab_size": 61, "context": 32, "n_layer": 2, "n_head": 4, "width": 32}
_LLAMA: dict[str, Any] = {"norm": "rms_norm", "positions": "rotary", "activation": "swiglu", "bias": False}
_LLAMA |= {"n_kv_head": 2, "mlp_width": 48}


def make(kind: str, **changes: Any) -> Any:
    """A random model whose parameters are all different, biases included: "gpt2", "llama" or "bert"."""
    torch.manual_seed(0)
    options = {"kernels": "reference", **_SIZES, **changes}
    model: Model = (
        BERT(BERTConfig(**options))
        if kind == "bert"
        else GPT(GPTConfig(**options, **(_LLAMA if kind == "llama" else {})))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    return model.eval()


def train_adapters(model: Model, **options: Any) -> None:
    """Adds adapters, as if they had been trained."""
    add_lora(model, LoRAConfig(**({"rank": 3, "alpha": 5.0} | options)))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_(std=0.2)


def _train(model: GPT, forward: Any, x: torch.Tensor) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    for tokens in x:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    x = torch.randint(0, 61, (3, 4, 17), generator=torch.Generator().manual_seed(0))
    mine = x[:, 2 * rank : 2 * rank + 2]

    def adapted() -> GPT:
        model = make("llama").to(torch.bfloat16)
        train_adapters(model)
        return model

    alone = adapted()
    before = {name: parameter.clone() for name, parameter in alone.named_parameters()}
    _train(alone, alone, x)

    def compare(model: GPT) -> None:
        for name, parameter in model.named_parameters():
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # type: ignore[attr-defined]
            other = alone.get_parameter(name)
            if "lora" in name:
                moved = (other - before[name]).abs().max()
                assert moved > 0
                assert (full - other).abs().max() < 0.1 * moved, name  # products in bfloat16
            else:
                assert torch.equal(full, before[name]), name

    replicated = adapted()
    _train(replicated, DistributedDataParallel(replicated), mine)
    compare(replicated)
    print("ddp equal", flush=True)

    sharded = adapted()
    mesh = init_device_mesh("cpu", (2,))
    for part in (*sharded.h, sharded):
        fully_shard(part, mesh=mesh)
    _train(sharded, sharded, mine)
    compare(sharded)
    print("fsdp equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
