"""Reads a model from our folders, Hugging Face's and GGUF files; writes our folders and Hugging Face's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from gptcore import _extras
from gptcore._files import atomic_writer
from gptcore.weights import bert, classifier, gpt
from gptcore.weights.adapter import Adapter, base_of, is_adapter, read_adapter
from gptcore.weights.error import WeightsError
from gptcore.weights.names import (
    ADAPTER_CONFIG,
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION,
    INDEX,
    MORE_CHAT_TEMPLATES,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
)
from gptcore.weights.tensors import read_tensors

if TYPE_CHECKING:
    from gptcore.models.model import ModelConfig

_FORMAT_KEY = "gptcore_format"
"""A config.json with this key is ours, with the value 1. transformers' may have the same model_type."""
_CONVERTERS = {"gpt2": gpt, "llama": gpt, "mistral": gpt, "bert": bert}
"""transformers' model_type -> the module that converts the model's configuration and tensors, for all but classifiers."""
_MODULES: dict[str, Any] = {module.MODEL_TYPE: module for module in (gpt, bert, classifier)}
"""Our model_type -> the module that converts the model."""
_PICKLES = ("*model*.bin", "*.pt", "*.pth", "*.ckpt")
_DOWNLOADED = [CONFIG, ADAPTER_CONFIG, GENERATION, "*.safetensors", INDEX]
_DOWNLOADED += [TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE, MORE_CHAT_TEMPLATES]
"""The files to download from the hub: weights as safetensors, never as pickles, and the tokenizer."""


class Pretrained(NamedTuple):
    """A model as it was read from disk; `gptcore.models` builds it."""

    model_type: str
    """The model's name in `gptcore.models.MODELS`."""
    config: dict[str, Any]
    """The fields of the model's configuration."""
    state: dict[str, Tensor]
    """The model's state dict, under our names."""
    described: Path
    """The file that `config` was read from."""
    source: Path
    """The file that `state` was read from."""
    adapters: tuple[Adapter, ...] = ()
    """Adapters of the model. Each but the last is merged into the weights before the next is added."""


def save_huggingface(
    folder: str | Path, config: ModelConfig, state: dict[str, Tensor], generation: dict[str, Any] | None = None
) -> None:
    """Writes a folder that Hugging Face's ``from_pretrained`` loads.

    Args:
        folder: the folder to write; made if it does not exist.
        config, state: the model's configuration and state dict.
        generation: the contents of ``generation_config.json``, for example the ids that end a text (``eos_token_id``,
            from a tokenizer's `special_ids`), which the model alone does not know; None writes no such file.

    Raises:
        WeightsError: a configuration that none of Hugging Face's models has; names the field. Nothing is written then.
    """
    known = generation or {}
    token_ids = {name: known[name] for name in ("bos_token_id", "eos_token_id") if known.get(name) is not None}
    if config.model_type == classifier.MODEL_TYPE:
        token_ids |= classifier.padding(config, known)  # type: ignore[arg-type]
    converter = _MODULES[config.model_type]
    _write(folder, converter.config_to_huggingface(config) | token_ids, converter.to_huggingface(state, config))
    if generation is not None:
        with atomic_writer(Path(folder) / GENERATION) as file:
            file.write(json.dumps(generation, indent=2).encode())


def read_generation(folder: Path) -> dict[str, Any]:
    """The contents of the ``generation_config.json`` that came with the weights; {} if there is none.

    Raises:
        WeightsError: a damaged file.
    """
    if not (path := folder / GENERATION).is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path}: is damaged ({error})") from error


def save_folder(folder: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes a folder that `load` reads. Each file appears complete or not at all."""
    _write(folder, description(config), state)


def description(config: ModelConfig) -> dict[str, Any]:
    """The contents of ``config.json``: what the model is, without the options of how it runs."""
    return {"model_type": config.model_type, _FORMAT_KEY: 1, **config.description()}


def _write(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_writer(folder / WEIGHTS) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with atomic_writer(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2).encode())


def row_parts(config: ModelConfig, layer: str) -> tuple[int, ...]:
    """The rows of a linear layer that are layers of their own in Hugging Face's model; () if it is one layer there too.

    Args:
        config: the model's configuration; a classifier's has its backbone's.
        layer: the layer's name in the model, such as ``h.0.attn.c_attn``.
    """
    config = getattr(config, "backbone", config)
    converter = _MODULES.get(config.model_type)
    block = re.fullmatch(r"(?:backbone\.)?h\.\d+\.(.+)", layer)
    return converter.row_parts(config, block[1]) if converter and block else ()


def load(path_or_name: str | Path, adapter: str | Path | None = None) -> Pretrained:
    """Reads the configuration and the weights that `locate` finds, and an adapter.

    Args:
        path_or_name: a model; or a folder with an adapter, whose base is then read.
        adapter: a folder with an adapter of the model.

    Raises:
        WeightsError: a file that is missing or damaged, an unknown model, or a base that is missing; names the file.
    """
    path = locate(path_or_name)
    if adapter is None:
        return _load(path)
    adapter = Path(adapter).expanduser()
    if path.resolve() == adapter.resolve():
        raise WeightsError(
            f"adapter: got {adapter} twice, a run with an adapter loads it by itself; accepted is another"
        )
    found = read_adapter(adapter)  # before the base: an error comes at once
    return _adapted(_load(path), found)


def locate_base(folder: Path) -> Path:
    """The folder or file of the base of the adapter in `folder`.

    Raises:
        WeightsError: the base is missing, or is the adapter itself; says that the adapter needs it.
    """
    name = base_of(folder)
    needs = f"{folder}: is an adapter that needs its base {name!r}, which cannot be loaded"
    try:
        base = locate(name)
    except (WeightsError, _extras.MissingPackageError) as error:
        raise WeightsError(f"{needs}: {error}; --model BASE --adapter {folder} takes it from another place") from error
    if base.resolve() == folder.resolve():
        raise WeightsError(f"{needs}: it is the adapter itself")
    return base


def _load(path: Path) -> Pretrained:
    """Reads a model from its folder or file; of an adapter, the base too."""
    if is_adapter(path):
        found = read_adapter(path)
        return _adapted(_load(locate_base(path)), found)
    if path.is_file():
        from gptcore.weights.gguf import load_gguf

        return Pretrained(gpt.MODEL_TYPE, *load_gguf(path), path, path)
    config_path = path / CONFIG
    try:
        values = json.loads(config_path.read_text())
        model_type, config, convert = _parse_config(values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{config_path}: describes no model this version can load ({error})") from error
    state, source = _read_state(path)
    if convert:  # may set fields of the configuration that only the tensors show
        state = convert(state, config)
    return Pretrained(model_type, config, state, config_path, source)


def _adapted(base: Pretrained, adapter: Adapter) -> Pretrained:
    """The base with an adapter; of a classifier's adapter, the classifier around the base."""
    described = adapter.folder / CONFIG
    base = base._replace(adapters=(*base.adapters, adapter))
    model_type, config = base.model_type, base.config
    try:
        values = json.loads(described.read_bytes()) if described.is_file() else {}
        if _FORMAT_KEY in values:  # a run of ours; another program's file describes the base alone
            model_type, config, _ = _parse_config(values)
            base = base._replace(described=described)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{described}: describes no model this version can load ({error})") from error
    is_classifier = classifier.MODEL_TYPE in (model_type, base.model_type) or adapter.task_type == "SEQ_CLS"
    if not is_classifier or base.model_type == classifier.MODEL_TYPE:
        return base._replace(model_type=model_type, config=config)
    head = classifier.head_state(adapter.tensors)
    if base.model_type == bert.MODEL_TYPE and "pooler.weight" not in head:  # peft leaves the base's as it is
        head = classifier.head_state(_read_state(base.source.parent)[0]) | head
    last = next((tensor for name, tensor in head.items() if name in classifier.LAST), None)
    if last is None:
        raise WeightsError(
            f"{adapter.source}: has no head of a classifier; accepted are {' or '.join(classifier.LAST)}"
        )
    if model_type != classifier.MODEL_TYPE:
        backbone = {"model_type": base.model_type, **base.config}
        config = {"backbone": backbone, "labels": [f"LABEL_{index}" for index in range(len(last))]}
    if len(config["labels"]) != len(last):
        raise WeightsError(
            f"{adapter.source}: has scores of {len(last)} classes; accepted are {described}'s {len(config['labels'])}"
        )
    state = classifier.backbone_state(base.state) | head
    return base._replace(model_type=classifier.MODEL_TYPE, config=config, state=state)


def _parse_config(values: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Our name of the model's type, the fields of its configuration, and the function that converts its state dict.

    The function is None if the state dict has our names already.
    """
    model_type = values.get("model_type")
    if (version := values.get(_FORMAT_KEY)) is not None:
        if version != 1:
            raise WeightsError(f"{_FORMAT_KEY}: got {version!r}; accepted is 1")
        fields = {name: value for name, value in values.items() if name not in ("model_type", _FORMAT_KEY)}
        return str(model_type), fields, None
    if model_type is None:  # ours, of an early version that had one model
        return gpt.MODEL_TYPE, values, None
    if model_type not in _CONVERTERS:
        raise WeightsError(f"model_type: got {model_type!r}; accepted are {', '.join(map(repr, _CONVERTERS))}")
    converter = classifier if classifier.is_classifier(values) else _CONVERTERS[model_type]
    return converter.MODEL_TYPE, converter.config_from_huggingface(values), converter.convert


def _read_state(folder: Path) -> tuple[dict[str, Tensor], Path]:
    if (folder / INDEX).is_file():
        return _read_shards(folder), folder / INDEX
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles and not (folder / WEIGHTS).is_file():
        raise WeightsError(f"{pickles[0]}: is a pickle, which can run any code when it is read; accepted is {WEIGHTS}")
    return read_tensors(folder / WEIGHTS), folder / WEIGHTS


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Weights that are stored in several files, which an index lists."""
    try:
        file_of: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / INDEX}: is damaged ({error!r})") from error
    if outside := [name for name in file_of.values() if Path(name).name != name]:
        raise WeightsError(f"{folder / INDEX}: names {outside[0]!r}; accepted are files beside it")
    state: dict[str, Tensor] = {}
    for name in sorted(set(file_of.values())):
        state |= read_tensors(folder / name)
    return state


def locate(path_or_name: str | Path) -> Path:
    """The folder or GGUF file of a model: a path, a name that ``gptcore fetch`` downloaded, or a model of the hub.

    A model of the hub is downloaded.

    Raises:
        WeightsError: there is no such model; says what to do.
        MissingPackageError: the name may be the hub's, and the packages to download from it are not installed.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        return files[0] if len(files) == 1 and not (path / CONFIG).is_file() else path
    if path.is_file():
        if path.suffix != ".gguf":
            raise WeightsError(f"{path}: is a file; accepted are folders with {CONFIG} and {WEIGHTS}, and .gguf files")
        return path
    from gptcore import assets

    name = str(path_or_name)
    if fetched := assets.find(name):
        return locate(fetched)
    if name in assets.CATALOGUE:
        raise WeightsError(f"{name}: has not been fetched; run: gptcore fetch {name}")
    return _download(name)


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], source: Path, model_type: str) -> None:
    """Raises `WeightsError` unless `state` has exactly the tensors of `expected`, with their shapes.

    Args:
        state: the state dict that was read.
        expected: the model's own state dict; may be on the meta device.
        source: the file that `state` was read from, for the message.
        model_type: the model's name, for the message.
    """
    if missing := sorted(set(expected) - set(state)):
        raise WeightsError(f"{source}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are)")
    if extra := sorted(set(state) - set(expected)):
        raise WeightsError(f"{source}: {extra[0]} belongs to no {model_type} ({len(extra)} such tensors)")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            accepted = tuple(expected[name].shape)
            raise WeightsError(f"{source}: {name} has shape {tuple(tensor.shape)}; accepted is {accepted}")


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WeightsError(f"{name}: there is no such folder")
    hub = _extras.load("huggingface_hub", f"{name}: is no local folder; fetching it from the hub")
    _extras.load("tokenizers", name)  # the model's tokenizer needs it: raise the error before the download
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:  # the hub raises a dozen kinds of errors, from three libraries
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{name}: there is no such folder, and the hub's model could not be downloaded: {cause}"
        ) from error
