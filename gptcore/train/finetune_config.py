"""The options of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptcore.nn import LoRALayers
from gptcore.train.config import RunConfig

Trained = Literal["lora", "all", "last-block", "head"]


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The options of the model that a run begins with, in the order of the command line before those of the run."""

    model: str
    """The base: folder of a run or of Hugging Face weights, a .gguf file, or a name that gptcore fetch or Hugging Face knows."""
    trained: Trained = "lora"
    """What is trained: lora, small matrices beside frozen layers; all weights; last-block and head; or the head alone."""
    lora_rank: int = 8
    """Rank of LoRA's matrices: more can learn more, and take more memory."""
    lora_alpha: float = 16.0
    """LoRA's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of LoRA's input in training."""
    lora_layers: LoRALayers = "all"
    """The linear layers of each block that LoRA adapts."""
    context: int | None = None
    """The most tokens in a row; 512, or the base's context if that is less, if left out."""
    epochs: float = 2.0
    """Passes over the training data, unless steps is given."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig, _Base):
    """Fine-tune a model: go on training a base on data of a task."""

    changeable: ClassVar[frozenset[str]] = frozenset({"model", "epochs"})

    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    warmup: int = 10
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of matrices and embeddings; vectors (biases, norms) have none."""
    beta2: float = 0.999
    """AdamW's decay rate of the mean squared gradient."""
    steps: int = 0
    """Optimizer steps of the run, and of the learning rate's schedule; 0: as many as epochs takes."""
    eval_interval: int = 100
    """Steps between evaluations, samples and checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise ValueError(f"steps: got {self.steps}; accepted are positive integers, and 0 for what epochs takes")
        for name in ("lora_rank", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; accepted are positive integers")
        for name in ("epochs", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted are positive numbers")
        for name in ("dropout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted is 0 <= {name} < 1")

    def title(self) -> str:
        return f"{self.model}, {self.trained} trained"
