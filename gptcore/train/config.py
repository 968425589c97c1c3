"""Everything that decides a training run; the command line is made from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptcore.config import AttentionImpl, GPTConfig, Kernels


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on a folder that `gptcore prepare` made.

    For example:

    gptcore train --data data/python-docs --out runs/demo

    gptcore train --data data/python-docs --out runs/demo --resume --steps 800

    gptcore train --data data/books --out runs/small --preset small --batch-size 32 --kernels triton
    """

    data: Path
    """Folder with train.bin, val.bin and tokenizer.json."""
    out: Path
    """Folder for the checkpoint, metrics.jsonl and loss.png; must not hold another run."""
    preset: str = "mini"
    """Size of the model: tiny, mini, small, gpt2-124m, gpt2-medium, gpt2-large or gpt2-xl."""
    context: int | None = None
    """Tokens in a sequence; the preset's if left out."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    kernels: Kernels = "auto"
    """Which kernels run; auto takes the fastest that can, anything else must be able to run here."""
    attention_impl: AttentionImpl = "fused"
    """fused, or explicit: softmax(QK^T)V step by step."""
    batch_size: int = 8
    """Sequences in one forward and backward."""
    accumulate: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    steps: int = 900
    """Optimizer steps; the learning rate's schedule ends here."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup: int = 40
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; vectors (biases, norms) are not decayed."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 for no limit."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast; auto takes it where the hardware multiplies bfloat16."""
    eval_interval: int = 300
    """Steps between evaluations, samples and checkpoints."""
    eval_windows: int = 64
    """Sequences of the validation text in an evaluation on the way; the last one takes all of it."""
    sample_prompt: str = "The function returns"
    """What the sample at each evaluation continues."""
    sample_tokens: int = 40
    """Length of that sample; 0 for none."""
    compile: bool = False
    """Run the model through torch.compile."""
    device: str = "auto"
    """cuda, cpu, ...; auto takes a GPU where there is one."""
    seed: int = 1337
    """Of the initial weights and the order of the data."""
    resume: bool = False
    """Go on from the checkpoint in out."""
    overwrite: bool = False
    """Replace the run in out."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "steps", "eval_interval", "eval_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted are positive integers")
        for name in ("warmup", "weight_decay", "clip", "min_lr", "sample_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted are 0 and more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted is 0 <= {name} < 1")
        if not self.min_lr <= self.lr < math.inf or self.lr == 0:
            raise ValueError(f"lr: got {self.lr}; accepted are positive numbers not under min_lr, {self.min_lr}")
        if self.resume and self.overwrite:
            raise ValueError("overwrite: got True with resume; accepted is one of them")
        self.model(vocab_size=1)

    def model(self, vocab_size: int) -> GPTConfig:
        """The model's configuration for a tokenizer of `vocab_size`."""
        changes = {} if self.context is None else {"context": self.context}
        return GPTConfig.preset(
            self.preset,
            vocab_size=vocab_size,
            dropout=self.dropout,
            kernels=self.kernels,
            attention_impl=self.attention_impl,
            **changes,
        )

    def lr_at(self, step: int) -> float:
        """Learning rate of `step` (from 0): linear warmup, then a cosine down to `min_lr` at the last step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = min((step - self.warmup) / max(self.steps - 1 - self.warmup, 1), 1.0)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
