"""Folders of weights: reading ours, Hugging Face's and GGUF files; writing ours and Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gptcore import _extras
from gptcore._files import atomic_writer
from gptcore.weights import bert, gpt
from gptcore.weights.error import WeightsError

if TYPE_CHECKING:
    from gptcore.models.model import ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
_FORMAT = "gptcore_format"
"""The key by which a config.json of ours is told from one of transformers, which may name the same model; its value is 1."""
_FORMATS = {"gpt2": gpt, "llama": gpt, "mistral": gpt, "bert": bert}
"""By transformers' model_type, the module that converts the model's configuration and tensors."""
_PICKLES = ("*model*.bin", "*.pt", "*.pth", "*.ckpt")
# What is fetched from the hub: safetensors, never pickles, and what the tokenizer needs.
_WANTED = [CONFIG, GENERATION, "*.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json"]
_WANTED += ["special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja"]


class Pretrained(NamedTuple):
    """A model as it was found on disk; `gptcore.models` builds it."""

    model_type: str
    """Its name in `gptcore.models.MODELS`."""
    config: dict[str, Any]
    """Fields of its configuration."""
    state: dict[str, Tensor]
    """Its state dict, under our names."""
    described: Path
    """The file that `config` is from."""
    source: Path
    """The file that `state` is from."""


def save_huggingface(
    folder: str | Path, config: ModelConfig, state: dict[str, Tensor], generation: dict[str, Any] | None = None
) -> None:
    """Writes a folder that Hugging Face's ``from_pretrained`` loads.

    Args:
        folder: where to.
        config, state: the model.
        generation: what ``generation_config.json`` is to say, for instance where texts end (``eos_token_id``: a
            tokenizer's `special_ids`); the model alone does not know.

    Raises:
        WeightsError: a configuration that none of Hugging Face's models has; names the field. Nothing is written then.
    """
    known = {
        name: value for name in ("bos_token_id", "eos_token_id") if (value := (generation or {}).get(name)) is not None
    }
    theirs = _by_model_type(config.model_type)
    _write(folder, theirs.config_to_huggingface(config) | known, theirs.to_huggingface(state, config))
    if generation is not None:
        with atomic_writer(Path(folder) / GENERATION) as file:
            file.write(json.dumps(generation, indent=2).encode())


def _by_model_type(model_type: str) -> Any:
    return next(module for module in _FORMATS.values() if model_type == module.MODEL_TYPE)


def read_generation(place: Path) -> dict[str, Any]:
    """What the makers of the weights at `place` say about generation, as they say it; {} where they say nothing.

    Raises:
        WeightsError: a damaged file.
    """
    if not (path := place / GENERATION).is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path}: is damaged ({error})") from error


def save_folder(folder: str | Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Writes a folder that `load` loads: each file appears whole or not at all."""
    _write(folder, description(config), state)


def description(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` holds: what the model is, and nothing of how it runs."""
    return {"model_type": config.model_type, _FORMAT: 1, **config.description()}


def _write(folder: str | Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_writer(folder / WEIGHTS) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    with atomic_writer(folder / CONFIG) as file:
        file.write(json.dumps(config, indent=2).encode())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a missing or damaged one is a `WeightsError` that names it."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is damaged or no safetensors file ({error})") from error


def load(path_or_name: str | Path) -> Pretrained:
    """Configuration and state dict of what `locate` finds.

    Raises:
        WeightsError: a file that is missing or damaged, or a model that is not known; names the file.
    """
    place = locate(path_or_name)
    if place.is_file():
        from gptcore.weights.gguf import load_gguf

        return Pretrained(gpt.MODEL_TYPE, *load_gguf(place), place, place)
    path = place / CONFIG
    try:
        values = json.loads(path.read_text())
        model_type, config, convert = _described(values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: describes no model this version can load ({error})") from error
    state, source = _read_state(place)
    if convert:  # may add to the configuration what only the tensors tell
        state = convert(state, config)
    return Pretrained(model_type, config, state, path, source)


def _described(values: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """The model's type, its configuration's fields, and what converts its tensors (None: they are ours)."""
    kind = values.get("model_type")
    if (found := values.get(_FORMAT)) is not None:
        if found != 1:
            raise WeightsError(f"{_FORMAT}: got {found!r}; accepted is 1")
        return str(kind), {name: value for name, value in values.items() if name not in ("model_type", _FORMAT)}, None
    if kind is None:  # ours, of a version that had one model
        return gpt.MODEL_TYPE, values, None
    if kind not in _FORMATS:
        raise WeightsError(f"model_type: got {kind!r}; accepted are {', '.join(map(repr, _FORMATS))}")
    module = _FORMATS[kind]
    config = module.config_from_huggingface(values)
    return module.MODEL_TYPE, config, module.convert


def _read_state(folder: Path) -> tuple[dict[str, Tensor], Path]:
    if (folder / INDEX).is_file():
        return _read_shards(folder), folder / INDEX
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles and not (folder / WEIGHTS).is_file():
        raise WeightsError(f"{pickles[0]}: is a pickle, which can run any code when it is read; accepted is {WEIGHTS}")
    return read_tensors(folder / WEIGHTS), folder / WEIGHTS


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Weights that Hugging Face has cut into several files, listed in an index."""
    try:
        where: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / INDEX}: is damaged ({error!r})") from error
    if outside := [name for name in where.values() if Path(name).name != name]:
        raise WeightsError(f"{folder / INDEX}: names {outside[0]!r}; accepted are files beside it")
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        state |= read_tensors(folder / name)
    return state


def locate(path_or_name: str | Path) -> Path:
    """The folder or GGUF file that `path_or_name` stands for: a path, a name that ``gptcore fetch`` brought, or the hub's.

    Raises:
        WeightsError: there is none; says what to do.
        MissingPackageError: it may be the hub's, and what that needs is not installed.
    """
    place = Path(path_or_name).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.gguf"))
        return files[0] if len(files) == 1 and not (place / CONFIG).is_file() else place
    if place.is_file():
        if place.suffix != ".gguf":
            raise WeightsError(f"{place}: is a file; accepted are folders with {CONFIG} and {WEIGHTS}, and .gguf files")
        return place
    from gptcore import assets

    name = str(path_or_name)
    if fetched := assets.find(name):
        return locate(fetched)
    if name in assets.CATALOGUE:
        raise WeightsError(f"{name}: is not here yet; gptcore fetch {name} brings it")
    return _download(name)


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], source: Path, model_type: str) -> None:
    """Raises `WeightsError` unless `state` holds the tensors that a model's state dict does, in their shapes.

    Args:
        state: what was read.
        expected: the model's own state dict; may be on the meta device.
        source: the file that `state` is from.
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
    _extras.load("tokenizers", name)  # which what comes from there needs, too: said before the download
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # the hub raises a dozen kinds, of three libraries
        raise WeightsError(f"{name}: is no local folder and could not be fetched from the hub ({error})") from error
