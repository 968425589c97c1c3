"""The protocol of every model, `Model` and `ModelConfig`: all that training, generation and file formats use of one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from gptcore import weights
from gptcore.nn import merge_lora
from gptcore.weights import WeightsError

C = TypeVar("C", bound="ModelConfig")
M = TypeVar("M", bound="Model")

MAX_HEAD_DIM = 256
"""The most that gptkernels' attention takes."""
_HOW_IT_RUNS = frozenset({"kernels", "attention_impl", "dropout"})
"""Fields that change how a model runs, not what it is; config.json does not hold them."""


@dataclass(frozen=True)
class ModelConfig(ABC):
    """The sizes and choices of a model; each model has a frozen dataclass of its own, derived from this one."""

    model_type: ClassVar[str]
    """The model's name in `gptcore.models.MODELS` and in ``config.json``."""

    context: int
    """Longest sequence, tokens."""

    @classmethod
    @abstractmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Returns named sizes: for each, the fields that differ from the defaults."""

    @classmethod
    def preset(cls: type[C], name: str, **changes: Any) -> C:
        """Returns a named size, with `changes` to its fields: ``GPTConfig.preset("gpt2-124m", dropout=0.1)``.

        Raises:
            ValueError: there is no such preset, or no such field.
        """
        presets = cls.presets()
        if name not in presets:
            raise ValueError(f"preset: got {name!r}; accepted are {', '.join(presets)}")
        return cls.from_dict(presets[name] | changes)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Returns the configuration with these fields, and defaults for the others.

        Raises:
            ValueError: an unknown field, or a value that is not accepted.
        """
        accepted = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(accepted)):
            raise ValueError(f"{unknown[0]}: is no field of {cls.__name__}; accepted are {', '.join(accepted)}")
        return cls(**values)

    def description(self) -> dict[str, Any]:
        """Returns the fields for ``config.json``: those that say what the model is, not how it runs."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _HOW_IT_RUNS}

    @classmethod
    def from_description(cls: type[C], values: dict[str, Any], changes: dict[str, Any] | None = None) -> C:
        """Returns the configuration that a ``config.json`` describes, with `changes`; fields of how it ran are ignored."""
        described = {name: value for name, value in values.items() if name not in _HOW_IT_RUNS}
        return cls.from_dict(described | (changes or {}))


def check_sizes(config: ModelConfig, *names: str) -> None:
    """Raises ValueError unless these fields are positive integers, or None where None is the default."""
    optional = {field.name for field in dataclasses.fields(config) if field.default is None}
    for name in names:
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: got {value!r}; accepted are positive integers")


def check_transformer(config: Any) -> None:
    """Raises ValueError unless n_head divides width, heads are not too large, and `dropout` and `eps` are in range."""
    if config.width % config.n_head:
        raise ValueError(f"n_head: got {config.n_head}; accepted are divisors of width, {config.width}")
    if (head_dim := config.width // config.n_head) > MAX_HEAD_DIM:
        raise ValueError(
            f"n_head: got {config.n_head}, heads of {head_dim}; accepted are heads of at most {MAX_HEAD_DIM}"
        )
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout: got {config.dropout}; accepted is 0 <= dropout < 1")
    if not config.eps > 0.0:
        raise ValueError(f"eps: got {config.eps}; accepted are positive numbers")


def check_choices(config: ModelConfig) -> None:
    """Raises ValueError unless every field of a Literal type has one of its values."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and (value := getattr(config, name)) not in get_args(hint):
            raise ValueError(f"{name}: got {value!r}; accepted are {', '.join(map(repr, get_args(hint)))}")


class Model(nn.Module, ABC):
    """A model that can be trained, saved and loaded.

    A subclass defines `config_class`, `blocks`, `flops`, `summary`, `init_weights` and a `forward` with arguments of its own.
    """

    config_class: ClassVar[type[ModelConfig]]
    forward_methods: ClassVar[tuple[str, ...]] = ()
    """Public methods other than `forward` that compute with the weights: FSDP gathers the weights around them."""
    config: Any

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The layers, in order: FSDP shards them, activation checkpointing wraps them, ``--compile`` compiles them."""

    @abstractmethod
    def flops(self, batch_shape: tuple[int, int]) -> int:
        """Returns the floating-point operations of forward and backward on a batch of this shape ``(B, T)``."""

    @abstractmethod
    def summary(self) -> str:
        """Returns a line for people that names sizes and choices."""

    @abstractmethod
    def init_weights(self) -> None:
        """Draws the initial weights in place. A model that was made on the meta device needs this after ``to_empty``."""

    def num_parameters(self, trained: bool = False) -> int:
        """Returns the number of weights, or of those that are not frozen; weights that two layers share count once."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad or not trained)

    def head_parameters(self) -> list[nn.Parameter]:
        """Returns the weights of a head that is added for a task, such as a classifier's; none by default."""
        return []

    def last_layers(self) -> list[nn.Module]:
        """Returns the last block, and what comes between it and the output layer."""
        return [self.blocks[-1]]

    def trained_flops_share(self) -> float:
        """Returns the share of `flops` that a training step takes if some weights are frozen; 1 if none is.

        A third of the operations is the forward, a third the gradient of each layer's input, which goes back to the first
        block with a trained weight, and a third the gradient of each weight.
        """
        trained = self.num_parameters(trained=True)
        total = self.num_parameters()
        if trained == total:
            return 1.0
        frozen = [not any(p.requires_grad for p in block.parameters()) for block in self.blocks]
        first = frozen.index(False) if False in frozen else len(frozen)
        embedding = any(p.requires_grad for name, p in self.named_parameters() if "wte." in name)
        backward = 1.0 if embedding else 1 - first / len(frozen)
        return (1 + backward + trained / total) / 3

    def row_parts(self, layer: str) -> tuple[int, ...]:
        """Returns the rows of a linear layer that are layers of their own in Hugging Face's model: `nn.lora.add_lora` adapts
        each of them by itself. () for a layer that is one there too.

        Args:
            layer: its name, such as ``h.0.attn.c_attn``, whose rows are queries, keys and values.
        """
        return weights.row_parts(self.config, layer)

    @classmethod
    def from_pretrained(
        cls: type[M],
        path_or_name: str | Path,
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> M:
        """Loads weights that `save_pretrained` or Hugging Face wrote, or a GGUF file.

        Args:
            path_or_name: a folder with ``config.json`` and ``model.safetensors`` (or its shards), a ``.gguf`` file or a
                folder with one, a name that ``gptcore fetch`` brought, or a model of the Hugging Face hub such as ``"gpt2"``.
                Of a folder with a LoRA adapter, ours or one that `peft` wrote, the base that it names is loaded too.
            adapter: a folder with a LoRA adapter of the model.
            dtype: of the parameters; None keeps the file's (float32 from GGUF). An adapter's are always float32.
            changes: fields of the configuration to change, e.g. ``kernels="reference"``.

        Raises:
            WeightsError: a file is missing, damaged, or describes another model; names the file and what is wrong.
        """
        return cls.from_files(weights.load(path_or_name, adapter), dtype=dtype, **changes)

    @classmethod
    def from_files(cls: type[M], found: weights.Pretrained, *, dtype: torch.dtype | None = None, **changes: Any) -> M:
        """Builds the model from what `weights.load` returned; arguments and errors as `from_pretrained`."""
        model_type = cls.config_class.model_type
        if found.model_type != model_type:
            raise WeightsError(f"{found.described}: describes a {found.model_type}; accepted is a {model_type}")
        try:
            cls.config_class.from_description(found.config)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{found.described}: describes no model this version can load ({error})") from error
        config = cls.config_class.from_description(found.config, changes)
        with torch.device("meta"):
            model = cls(config)
        weights.check_state(found.state, model.state_dict(), found.source, cls.__name__)
        model.load_state_dict(found.state, assign=True)
        if dtype is not None:
            model.to(dtype)
        for adapter in found.adapters:
            merge_lora(model)  # the adapter before it, which is part of this one's base
            weights.load_adapter(model, adapter)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into `folder`, each of them atomically."""
        weights.save_folder(folder, self.config, self.state_dict())


def check_ids(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Raises unless `ids` is ``(batch, tokens)`` of integers below `vocab_size`, or `ignored`.

    Values are checked on the CPU only: on a GPU the check would wait for the device at every step.

    Raises:
        TypeError: another dtype than int64 or int32.
        ValueError: another rank than 2, or an id outside the vocabulary.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got dtype {ids.dtype}; accepted are int64 and int32")
    if ids.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(ids.shape)}; accepted is (batch, tokens)")
    # The compiler, torch.func and tensor subclasses have no values to check.
    valueless = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(ids)  # type: ignore[attr-defined]
    if valueless or type(ids) is not Tensor or ids.device.type != "cpu" or ids.numel() == 0:
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        wrong &= ids != ignored
    if wrong.any():
        raise ValueError(f"{name}: got id {int(ids[wrong][0])}; accepted are 0 to {vocab_size - 1} (vocab_size - 1)")
