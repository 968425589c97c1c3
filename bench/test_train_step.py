"""Times a training step (forward, loss, backward, AdamW) with each of our backends, torch.compile and Hugging Face's GPT-2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.measure import ceilings, device, own_backends, waiting
from gptcore import GPT, GPTConfig

PRESET, BATCH = ("gpt2-124m", 8) if device() == "cuda" else ("mini", 8)
CONTENDERS = [*own_backends(), "compile", "transformers"]


@pytest.mark.parametrize("contender", CONTENDERS)
def test_train_step(benchmark, contender: str):
    kernels = contender if contender in own_backends() else "reference"
    config = GPTConfig.preset(PRESET, vocab_size=4096 if device() == "cpu" else 50257, kernels=kernels)
    torch.manual_seed(0)
    model = GPT(config).to(device())
    loss_of = torch.compile(model.loss) if contender == "compile" else model.loss
    parameters = list(model.parameters())
    if contender == "transformers":
        transformers = pytest.importorskip("transformers")
        from gptcore.weights import config_to_huggingface

        values = config_to_huggingface(config)
        other = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values)).to(device())
        parameters = list(other.parameters())

        def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(other(tokens).logits.flatten(0, 1).float(), targets.flatten())

    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tokens = torch.randint(0, config.vocab_size, (2, BATCH, config.context), device=device())

    def step() -> None:
        with torch.autocast(device(), torch.bfloat16):
            loss = loss_of(tokens[0], tokens[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    benchmark.group = f"training step, {PRESET}, batch {BATCH}, context {config.context}, bf16 autocast"
    benchmark.pedantic(waiting(step), rounds=5 if device() == "cpu" else 30, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    rate = tokens[0].numel() / seconds
    flops = model.flops((BATCH, config.context)) / seconds
    benchmark.extra_info.update(
        contender=contender,
        device=device(),
        tokens_per_s=rate,
        tflop_per_s=flops / 1e12,
        share_of_ceiling=flops / ceilings(torch.bfloat16)[1],
    )
