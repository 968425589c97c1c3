"""The options of a training run: the command line and the YAML file are made from them."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from gptcore._files import atomic_writer
from gptcore.models import MODELS, ModelConfig
from gptcore.nn import AttentionImpl, Kernels
from gptcore.tasks import TASK_OF_MODEL, TASKS, LanguageModelOptions, TaskOptions

R = TypeVar("R", bound="RunConfig")

Resume = Literal["never", "auto", "always"]
Parallel = Literal["auto", "ddp", "fsdp"]
NOT_SAVED = {"saved": False}
"""Marks options of how one process starts, which the run's config.yaml does not hold."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(ABC):
    """The options of every run; `TrainConfig` and `FinetuneConfig` add the model that it begins with."""

    changeable: ClassVar[frozenset[str]] = frozenset()
    """Options of a subclass that a resumed run may change."""

    data: Path
    """The data to learn from."""
    out: Path
    """Folder of the run, for checkpoints, metrics.jsonl and loss.png; must not hold another run."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    kernels: Kernels = "auto"
    """The kernels that run; auto takes the fastest available, any other choice is an error if it cannot run."""
    attention_impl: AttentionImpl = "fused"
    """fused: attention in one kernel; explicit: softmax(QK^T)V step by step."""
    batch_size: int = 8
    """Sequences in a micro-batch, which is one forward and backward; all processes share them."""
    accumulate: int = 1
    """Micro-batches of an optimizer step (gradient accumulation)."""
    steps: int = 900
    """Optimizer steps of the run, and of the learning rate's schedule."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices in the blocks, with adamw for all other weights."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls: along a cosine after the warmup, or linearly over the last half of the run."""
    warmup: int = 40
    """Steps over which the learning rate rises."""
    muon_lr: float = 0.02
    """Peak learning rate of muon; it follows the same schedule as lr."""
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; vectors (biases, norms) have none."""
    beta1: float = 0.9
    """AdamW's decay rate of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay rate of the mean squared gradient."""
    clip: float = 1.0
    """Gradient clipping: the largest norm of all gradients together; 0 for no limit."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast to bfloat16; auto takes it if the hardware multiplies bfloat16, else fp32."""
    eval_interval: int = 300
    """Steps between evaluations, samples and checkpoints."""
    eval_windows: int = 64
    """Sequences of an evaluation, spread evenly over the validation data; the end of a run evaluates all of it as well."""
    keep: int = 2
    """Number of the latest checkpoints to keep."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss as well."""
    compile: bool = False
    """Run the model through torch.compile."""
    checkpoint_activations: bool = False
    """Save only the inputs of each block and recompute the rest in the backward: less memory, a third more work."""
    parallel: Parallel = "auto"
    """Under torchrun: ddp, each process has the whole model; fsdp, the model is sharded over the processes; auto is ddp."""
    device: str = "auto"
    """cuda, cpu, ...; auto takes a GPU if there is one."""
    seed: int = 1337
    """Seed of the initial weights and the order of the data."""
    tensorboard: bool = False
    """Also write the curves for TensorBoard, to out/tensorboard."""
    resume: Resume = field(default="never", metadata=NOT_SAVED)
    """always: continue from the newest checkpoint in out; auto: the same if there is one; otherwise start."""
    overwrite: bool = field(default=False, metadata=NOT_SAVED)
    """Replace the run in out."""
    task: TaskOptions = field(default_factory=LanguageModelOptions)
    """The task and its options."""

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            if isinstance(path := getattr(self, name), Path):  # not where tyro still has its mark for a missing value
                object.__setattr__(self, name, path.expanduser())
        for name in ("batch_size", "accumulate", "eval_interval", "eval_windows", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted are positive integers")
        for name in ("warmup", "weight_decay", "clip", "min_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted are 0 and more")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted is 0 <= {name} < 1")
        if not self.min_lr <= self.lr < math.inf or self.lr == 0:
            raise ValueError(f"lr: got {self.lr}; accepted are positive numbers not under min_lr, {self.min_lr}")
        if not 0 < self.muon_lr < math.inf:
            raise ValueError(f"muon_lr: got {self.muon_lr}; accepted are positive numbers")
        if not abs(self.seed) < 2**63:  # each process adds its rank, and PyTorch takes less than 2**64
            raise ValueError(f"seed: got {self.seed}; accepted are integers between -2**63 and 2**63")
        if self.resume != "never" and self.overwrite:
            raise ValueError(f"overwrite: got True with resume {self.resume}; accepted is one of the two")

    def batches(self) -> int:
        """Returns the number of micro-batches of an optimizer step."""
        return self.accumulate

    @abstractmethod
    def title(self) -> str:
        """Returns the name of the model for people."""

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of `step` (from 0): linear warmup, then `schedule`, down to `min_lr` at the last step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "linear":
            half = max(self.steps // 2, self.warmup)
            progress = min(max(step - half, 0) / max(self.steps - 1 - half, 1), 1.0)
            return self.lr + (self.min_lr - self.lr) * progress
        progress = min((step - self.warmup) / max(self.steps - 1 - self.warmup, 1), 1.0)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def plain(self) -> dict[str, Any]:
        """Returns the options of the run and of its task as plain values, for JSON and YAML."""
        saved = [option.name for option in dataclasses.fields(self) if option.metadata.get("saved", True)]
        values = {name: getattr(self, name) for name in saved if name != "task"} | {"task": self.task.name}
        values |= {option.name: getattr(self.task, option.name) for option in dataclasses.fields(self.task)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def default_task(cls, values: dict[str, Any]) -> str:
        """Returns the name of the task of a run with these options, which name none."""
        return LanguageModelOptions.name

    @classmethod
    def of(cls: type[R], **values: Any) -> R:
        """Builds a configuration from options of the run and of its task, named as on the command line.

        ``TrainConfig.of(data=folder, out=run, steps=100, sample_tokens=0)``. `task` is a name; if it is left out, a new model
        has a default task.

        Raises:
            ValueError: an unknown task.
            TypeError: an unknown option.
        """
        return cls(**cls.split_options(values))

    @classmethod
    def split_options(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Converts options of a run and of its task, given side by side, to fields of this class.

        Raises:
            ValueError: an unknown task.
        """
        task = values.get("task") or cls.default_task(values)
        if isinstance(task, TaskOptions):
            return values
        if task not in TASKS:
            raise ValueError(f"task: got {task!r}; accepted are {', '.join(TASKS)}")
        options, _ = TASKS[task]
        own = {option.name for option in dataclasses.fields(options)}
        rest = {name: value for name, value in values.items() if name not in own and name != "task"}
        return rest | {"task": options(**{name: value for name, value in values.items() if name in own})}

    def save(self, path: Path) -> None:
        """Writes the YAML file that `read` reads."""
        import yaml

        with atomic_writer(path) as file:
            file.write(yaml.safe_dump(self.plain(), sort_keys=False).encode())

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Reads fields of this class from a YAML file, converted to their types.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a YAML mapping, or has an unknown key or a value of another type; names file and key.
        """
        import yaml

        path = path.expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"config: there is no file {path}")
        try:
            values = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config: {path} is not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} holds {values!r}; accepted are lines of the form 'steps: 900'")
        task = values.get("task") or cls.default_task(values)
        options = TASKS[task][0] if task in TASKS else TaskOptions
        hints = get_type_hints(cls) | get_type_hints(options) | {"task": Literal[tuple(TASKS)]}
        hints = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
        if unknown := [str(name) for name in values if name not in hints]:
            raise ValueError(f"config: {path}: {unknown[0]} is not an option; accepted are {', '.join(hints)}")
        return cls.split_options({name: _converted(path, name, value, hints[name]) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class _NewModel:
    """The options of a new model, in the order of the command line before those of the run."""

    model: str = "gpt"
    """The model: gpt, or bert (learns masked words, from data prepared with --tokenizer wordpiece)."""
    preset: str = "mini"
    """Its size: tiny, mini, small, gpt2-124m, -medium, -large, -xl; llama-tiny, -mini, -small; smollm2-135m; bert-base."""
    context: int | None = None
    """Tokens in a sequence; the preset's if left out."""
    tokens_per_step: int | None = None
    """Tokens of an optimizer step, instead of accumulate: a multiple of batch_size times context."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, _NewModel):
    """Train a model on a folder that `gptcore prepare` made.

    For example:
      gptcore train --data data/python-docs --out runs/demo
      gptcore train --data data/python-docs --out runs/demo --resume auto --steps 1200
      gptcore train --data data/books --out runs/small --preset small --batch-size 32 --tokens-per-step 65536
      gptcore train --config runs/small/config.yaml --out runs/other --seed 2
      gptcore train --data data/books --out runs/small --preset small --find-lr
      gptcore train --model bert --data data/wordpiece --out runs/bert
      torchrun --nproc-per-node 2 -m gptcore train --data data/books --out runs/two --parallel fsdp
    """

    changeable: ClassVar[frozenset[str]] = frozenset({"tokens_per_step"})

    data: Path
    """Folder with the token files and tokenizer.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}; accepted are positive integers")
        if self.model not in MODELS:
            raise ValueError(f"model: got {self.model!r}; accepted are {', '.join(MODELS)}")
        self.task.check_model(self.model_config())
        self.batches()

    def title(self) -> str:
        return f"{self.model} {self.preset}"

    @classmethod
    def default_task(cls, values: dict[str, Any]) -> str:
        return TASK_OF_MODEL.get(values.get("model", "gpt"), LanguageModelOptions.name)

    def model_config(self, **changes: Any) -> ModelConfig:
        """Returns the model's configuration, with `changes` that the data decides."""
        if self.context is not None:
            changes["context"] = self.context
        return MODELS[self.model].config_class.preset(
            self.preset, dropout=self.dropout, kernels=self.kernels, attention_impl=self.attention_impl, **changes
        )

    def batches(self) -> int:
        """Returns the number of micro-batches of an optimizer step."""
        batch = self.batch_size * self.model_config().context
        if self.tokens_per_step is None:
            return self.accumulate
        if self.accumulate != 1:
            raise ValueError(
                f"tokens_per_step: got {self.tokens_per_step} with accumulate {self.accumulate}; accepted is one of the two"
            )
        if self.tokens_per_step < 1 or self.tokens_per_step % batch:
            raise ValueError(
                f"tokens_per_step: got {self.tokens_per_step}; accepted are multiples of a batch's {batch} tokens "
                f"(batch_size {self.batch_size} times context {batch // self.batch_size})"
            )
        return self.tokens_per_step // batch


def _converted(path: Path, name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ValueError(f"config: {path}: {name}: got {value!r}; accepted are {', '.join(get_args(hint))}")
    accepted = get_args(hint) or (hint,)  # X | None
    for kind in accepted:
        if kind is Path and type(value) is str:
            return Path(value)
        if kind is float and type(value) in (int, str):
            try:
                return float(value)  # YAML 1.1 reads 1e-3, without a point, as text
            except ValueError:
                continue
        if type(value) is kind:
            return value
    names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in accepted)
    raise ValueError(f"config: {path}: {name}: got {value!r}; accepted is {names}")
