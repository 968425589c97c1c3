"""LoRA adapters on disk, in the layout of the `peft` library: ``adapter_model.safetensors`` and ``adapter_config.json``.

A pair (A, B) is stored under the name that its layer has in Hugging Face's model. Tensors that were trained whole, those of
a classifier's head, are stored beside them, as `peft` stores its ``modules_to_save``.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from gptcore._files import atomic_writer
from gptcore.nn.linear import Linear
from gptcore.nn.lora import LoRAConfig, adapt, lora_layers
from gptcore.weights import bert, classifier, gpt
from gptcore.weights.error import WeightsError
from gptcore.weights.names import ADAPTER, ADAPTER_CONFIG, INDEX, WEIGHTS
from gptcore.weights.tensors import read_tensors

if TYPE_CHECKING:
    from gptcore.models.model import Model

_PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"
"""The tensors' file of old versions of peft; never read."""
_BLOCK = re.compile(r"(?:backbone\.)?h\.(\d+)\.(.+)")
"""The name of a layer in a block: the block's number, and the name in the block."""
_NEVER = {"pooler.dense", "cls.predictions.transform.dense", "lm_head", "score", "classifier"}
"""Linear layers of transformers' models that never have an adapter of ours."""
_CONVERTERS: dict[str, Any] = {module.MODEL_TYPE: module for module in (gpt, bert)}
# Options of peft that change what an adapter computes -> the values without effect. Others only say how it was trained.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other kinds of initial values are subtracted from the base's weights, which then are not the base's.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
"""Options of peft with which an adapter computes something else; none is supported."""


class Adapter(NamedTuple):
    """An adapter as it was read from disk."""

    folder: Path
    config: LoRAConfig
    """Its rank, alpha and dropout."""
    task_type: str | None
    """peft's name of the task, such as ``CAUSAL_LM`` and ``SEQ_CLS``."""
    tensors: dict[str, Tensor]
    """Under the file's names, without the prefix ``base_model.model.``."""

    @property
    def source(self) -> Path:
        """The file of the tensors."""
        return self.folder / ADAPTER


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter and no weights of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def save_adapter(folder: str | Path, model: Model, base: str, state: dict[str, Tensor] | None = None) -> None:
    """Writes the adapters of a model, and the parameters that are trained beside them, into `folder`, each file atomically.

    The tensors keep their dtype and their exact values.

    Args:
        folder: made if it does not exist.
        model: a model with adapters.
        base: path or name of the model that the adapters belong to, for ``adapter_config.json``.
        state: the trained tensors under the model's names, if the model holds only a shard of each; None: the model's.

    Raises:
        WeightsError: a parameter is trained that is neither an adapter nor part of a classifier's head.
    """
    layers = lora_layers(model)
    if not layers:
        raise WeightsError("model: has no adapters; accepted is a model after add_lora")
    state = dict(model.state_dict()) if state is None else state
    backbone: Any = getattr(model.config, "backbone", model.config)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        names = _names(model, name)
        adapted = [theirs for theirs, rows in zip(names, _parts(model, name)) if rows in layer.parts]
        downs = state[f"{name}.lora_A"].split(layer.config.rank)
        ups = state[f"{name}.lora_B"].split(layer.part_rows())
        for theirs, down, up in zip(adapted, downs, ups):
            tensors |= {f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up}
    whole: list[str] = []
    for name, parameter in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            continue
        if theirs := classifier.head_name(name):
            tensors[theirs] = state[name]
            whole.append(theirs.rpartition(".")[0].removesuffix(".dense").rpartition(".")[2])
        elif parameter.requires_grad:
            raise WeightsError(
                f"{name}: is trained whole; accepted in an adapter are low-rank layers and a classifier's head"
            )
    config = next(iter(layers.values())).config
    values = {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _targets(model, {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}),
        "modules_to_save": sorted(set(whole)) or None,
        "fan_in_fan_out": backbone.model_type == gpt.MODEL_TYPE and gpt.is_gpt2(backbone),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_writer(folder / ADAPTER) as file:
        file.write(save(stored, metadata={"format": "pt"}))
    with atomic_writer(folder / ADAPTER_CONFIG) as file:
        file.write(json.dumps(values, indent=2).encode())


def read_adapter(folder: str | Path) -> Adapter:
    """Reads the two files of an adapter, ours or those of `peft`.

    Raises:
        WeightsError: a file is missing, damaged or a pickle, or the adapter is of a kind that is not supported; names the file.
    """
    folder = Path(folder)
    path = folder / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_bytes())
        config, task_type = _config(values)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path}: there is no such file; accepted is a folder with {ADAPTER_CONFIG} and {ADAPTER}"
        ) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise WeightsError(f"{path}: describes no adapter this version can load ({missing})") from error
    if (pickle := folder / _PICKLE).is_file() and not (folder / ADAPTER).is_file():
        raise WeightsError(f"{pickle}: is a pickle, which can run any code when it is read; accepted is {ADAPTER}")
    tensors = read_tensors(folder / ADAPTER)
    if wrong := [name for name in tensors if not name.startswith(_PREFIX)]:
        raise WeightsError(
            f"{folder / ADAPTER}: {wrong[0]} is no name of an adapter's tensor; accepted begin with {_PREFIX}"
        )
    return Adapter(folder, config, task_type, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()})


def base_of(folder: Path) -> str:
    """The path or name of the base of the adapter in `folder`; reads ``adapter_config.json`` only.

    Raises:
        WeightsError: the file is missing or damaged, or names no base.
    """
    path = folder / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: is missing or damaged ({error})") from error
    if not base:
        raise WeightsError(
            f"{path}: names no base_model_name_or_path; accepted then is --model BASE --adapter {folder}"
        )
    return str(base)


def load_adapter(model: Model, adapter: Adapter | str | Path) -> None:
    """Adds an adapter from disk to a model, in place; all other parameters are frozen. Nothing changes if it does not fit.

    The low-rank tensors, and those of a classifier's head, become float32 whatever the model's dtype.

    Args:
        model: the base of the adapter, without adapters.
        adapter: a folder, or what `read_adapter` returned.

    Raises:
        WeightsError: as `read_adapter`; the adapter is of another base: names the tensor and both shapes.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    found = _match(model, adapter)
    adapt(model, {name: sorted(parts) for name, parts in found.layers.items()}, adapter.config)
    for name, tensor in _packed(found).items():
        module, _, kind = name.rpartition(".")
        device = model.get_parameter(name).device
        setattr(model.get_submodule(module), kind, nn.Parameter(tensor.to(device, torch.float32)))


def adapter_state(model: Model, adapter: Adapter) -> dict[str, Tensor]:
    """Returns the adapter's tensors under the names of the model's state dict, for a model that has these adapters already.

    Raises:
        WeightsError: the model's adapters are others: names the tensor and both shapes.
    """
    state, own = _packed(_match(model, adapter)), model.state_dict()
    expected = {n for n in own if n.endswith((".lora_A", ".lora_B")) or classifier.head_name(n)}
    if missing := sorted(expected - set(state)):
        raise WeightsError(f"{adapter.source}: has nothing for {missing[0]}; accepted is an adapter of the same layers")
    for name, tensor in state.items():
        if name not in own:
            raise WeightsError(
                f"{adapter.source}: has {name}, which the model has not; accepted is an adapter of the same layers"
            )
        if own[name].shape != tensor.shape:
            raise WeightsError(
                f"{adapter.source}: {name} has shape {tuple(tensor.shape)}; accepted is {tuple(own[name].shape)}"
            )
    return state


class _Found(NamedTuple):
    """An adapter's tensors by our names."""

    layers: dict[str, dict[tuple[int, int], dict[str, Tensor]]]
    """For each layer its parts with their A and B."""
    whole: dict[str, Tensor]
    """The tensors that are not low-rank."""


def _match(model: Model, adapter: Adapter) -> _Found:
    """Finds the layer of each tensor. Raises WeightsError if there is none, or its shape is another."""
    rank, kind = adapter.config.rank, type(model).__name__
    places = {
        _bare(theirs): (name, rows)
        for name in _adaptable(model)
        for theirs, rows in zip(_names(model, name), _parts(model, name))
    }
    heads = {_bare(theirs): name for name in model.state_dict() if (theirs := classifier.head_name(name))}
    found: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, dict[tuple[int, int], dict[str, Tensor]]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in sorted(adapter.tensors.items()):
        source = f"{adapter.source}: {_PREFIX}{name}"
        parsed = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", name)
        if parsed is None:
            if _bare(name) not in heads:
                raise WeightsError(f"{source} belongs to no {kind} with low-rank adapters")
            ours = heads[_bare(name)]
            _check_shape(source, tensor, tuple(model.state_dict()[ours].shape))
            whole[ours] = tensor
            continue
        if _bare(parsed[1]) not in places:
            raise WeightsError(f"{source} belongs to no layer of this {kind} that can be adapted: {model.summary()}")
        ours, rows = places[_bare(parsed[1])]
        layer = model.get_submodule(ours)
        assert isinstance(layer, Linear)
        accepted = (rank, layer.in_features) if parsed[2] == "A" else (rows[1] - rows[0], rank)
        _check_shape(source, tensor, accepted)
        found.setdefault(parsed[1], {})[parsed[2]] = tensor
        layers.setdefault(ours, {})[rows] = found[parsed[1]]
    for name, pair in found.items():
        if missing := {"A", "B"} - set(pair):
            raise WeightsError(f"{adapter.source}: {_PREFIX}{name}.lora_{missing.pop()}.weight is missing")
    if not layers:
        raise WeightsError(
            f"{adapter.source}: has no low-rank tensors; accepted are lora_A and lora_B of a layer or more"
        )
    # The pooler of transformers' BERT belongs to the base, and peft does not train it unless asked to.
    if adapter.task_type == "SEQ_CLS" and (
        missing := sorted(name for name in set(heads.values()) - set(whole) if not name.startswith("pooler."))
    ):
        raise WeightsError(f"{adapter.source}: {missing[0]} of the classifier's head is missing")
    return _Found(layers, whole)


def _check_shape(source: str, tensor: Tensor, accepted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != accepted:
        raise WeightsError(
            f"{source} has shape {tuple(tensor.shape)}; accepted for this model is {accepted}: is it the adapter's base?"
        )


def _packed(found: _Found) -> dict[str, Tensor]:
    """The tensors by the names of the state dict."""
    state = dict(found.whole)
    for name, parts in found.layers.items():
        pairs = [parts[rows] for rows in sorted(parts)]
        state[f"{name}.lora_A"] = torch.cat([pair["A"] for pair in pairs])
        state[f"{name}.lora_B"] = torch.cat([pair["B"] for pair in pairs])
    return state


def _adaptable(model: Model) -> list[str]:
    """The names of the linear layers in the blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear) and _BLOCK.fullmatch(name)]


def _names(model: Model, name: str) -> tuple[str, ...]:
    """Hugging Face's names of the layers that a layer's rows are."""
    config = model.config
    block = _BLOCK.fullmatch(name)
    assert block is not None
    backbone = getattr(config, "backbone", config)
    if backbone.model_type not in _CONVERTERS:
        return (name,)
    names = _CONVERTERS[backbone.model_type].layer_names(backbone, int(block[1]), block[2])
    # transformers' classifier has a prefix that its bare encoder has not.
    return tuple(f"bert.{n}" for n in names) if backbone is not config and backbone.model_type == "bert" else names


def _parts(model: Model, name: str) -> list[tuple[int, int]]:
    """The first row and the row after the last of each layer in `_names`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, Linear)
    ends = accumulate(model.row_parts(name) or (layer.out_features,), initial=0)
    return list(pairwise(ends))


def _bare(name: str) -> str:
    """A name without the prefix that transformers' models with a head have, and those without have not."""
    return re.sub(r"^(transformer|bert|model)\.", "", name)


def _targets(model: Model, adapted: set[str]) -> list[str]:
    """The shortest ends of names that fit the adapted layers and no other layer, as peft's ``target_modules``."""
    every = {theirs for name in _adaptable(model) for theirs in _names(model, name)} | _NEVER
    others = every - adapted
    found: set[str] = set()
    for name in adapted:
        pieces = name.split(".")
        ends = (".".join(pieces[-count:]) for count in range(1, len(pieces) + 1))
        found.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(found)


def _task_type(model: Model) -> str | None:
    """peft's name of what the model does."""
    if model.config.model_type == classifier.MODEL_TYPE:
        return "SEQ_CLS"
    if model.config.model_type == gpt.MODEL_TYPE:
        return "CAUSAL_LM"
    return None if getattr(model.config, "masked_words", False) else "FEATURE_EXTRACTION"


def _config(values: dict[str, Any]) -> tuple[LoRAConfig, str | None]:
    """Rank, alpha and dropout, and the task, from the contents of ``adapter_config.json``."""
    if (kind := values["peft_type"]) != "LORA":
        raise ValueError(f"peft_type: got {kind!r}; accepted is 'LORA'")
    for name in _UNSUPPORTED:
        if value := values.get(name):
            raise ValueError(f"{name}: got {value!r}; accepted are adapters without it")
    for name, accepted in _PLAIN.items():
        if (value := values.get(name, accepted[0])) not in accepted:
            raise ValueError(f"{name}: got {value!r}; accepted are {', '.join(map(repr, accepted))}")
    rank, alpha = values["r"], float(values["lora_alpha"])
    if values.get("use_rslora"):  # the product is multiplied by alpha / sqrt(rank)
        alpha *= math.sqrt(rank)
    return LoRAConfig(rank, alpha, float(values.get("lora_dropout", 0.0))), values.get("task_type")
