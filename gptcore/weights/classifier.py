"""Converts Hugging Face's models for sequence classification to `gptcore.models.Classifier` and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gptcore.weights import bert, gpt
from gptcore.weights.error import WeightsError

if TYPE_CHECKING:
    from gptcore.models.classifier import ClassifierConfig

MODEL_TYPE = "classifier"
"""The model's name in `gptcore.models.MODELS`."""
TASK = "ForSequenceClassification"
"""The names of transformers' classes for these models end so."""
_BACKBONE = "backbone."
"""Our names of the backbone's tensors begin so."""
_BACKBONES: dict[str, Any] = {module.MODEL_TYPE: module for module in (gpt, bert)}
_HEADS = {
    gpt.MODEL_TYPE: {"score": "score"},
    bert.MODEL_TYPE: {"pooler": "bert.pooler.dense", "classifier": "classifier"},
}
"""For each backbone the modules of the head: our name -> Hugging Face's."""
LAST = ("score.weight", "classifier.weight")
"""The last layer's weights, of one backbone and the other: a row for each class."""
_OUTSIDE = ("lm_head.", "head.")
"""Our names of tensors of a backbone that a classifier does not have begin so."""
_FIXED = {"problem_type": (None, (None, "single_label_classification"))}


def config_around(backbone: dict[str, Any], model_type: str, labels: list[str]) -> dict[str, Any]:
    """The fields of `ClassifierConfig` around a backbone of this type, with these fields, and these names of classes."""
    return {"backbone": {"model_type": model_type, **backbone}, "labels": labels}


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state dict under the classifier's names, without its output layer."""
    return {f"{_BACKBONE}{name}": tensor for name, tensor in state.items() if not name.startswith(_OUTSIDE)}


def head_name(model_type: str, name: str) -> str | None:
    """Hugging Face's name of a tensor of the head on a backbone of this type; None if it is no tensor of the head."""
    module, _, kind = name.rpartition(".")
    theirs = _HEADS.get(model_type, {}).get(module)
    return None if theirs is None else f"{theirs}.{kind}"


def head_state(model_type: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the head in Hugging Face's state dict, under our names."""
    modules = {theirs: ours for ours, theirs in _HEADS[model_type].items()}
    modules |= {theirs.removeprefix("bert."): ours for theirs, ours in modules.items()}  # transformers' bare encoder
    split = {name: name.rpartition(".") for name in state}
    return {f"{modules[module]}.{kind}": state[name] for name, (module, _, kind) in split.items() if module in modules}


def config_from_huggingface(values: dict[str, Any], backbone: Any) -> dict[str, Any]:
    """The fields of `ClassifierConfig` from the ``config.json`` of a Hugging Face model for sequence classification.

    Args:
        values: the contents of ``config.json``.
        backbone: the module that converts the model under the head, `gpt` or `bert`.

    Raises:
        WeightsError: an option with a value that this model does not support.
        KeyError: a size that is missing.
    """
    for name, (default, accepted) in _FIXED.items():
        if (value := values.get(name, default)) not in accepted:
            raise WeightsError(f"{name}: got {value!r}; accepted is {accepted[-1]!r}")
    labels = values.get("id2label") or {i: f"LABEL_{i}" for i in range(values.get("num_labels", 2))}
    names = [str(labels[index]) for index in sorted(labels, key=int)]
    return config_around(backbone.config_from_huggingface(values), backbone.MODEL_TYPE, names)


def convert(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a Hugging Face model for sequence classification under this model's names."""
    kind = config["backbone"]["model_type"]
    head = head_state(kind, state)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(("score.", "classifier."))}
    return backbone_state(_BACKBONES[kind].convert(rest, config["backbone"])) | head


def config_to_huggingface(config: ClassifierConfig) -> dict[str, Any]:
    """The ``config.json`` of the Hugging Face model that computes the same as a classifier of `config`.

    Raises:
        WeightsError: a backbone that Hugging Face has not; names the field.
    """
    values = _BACKBONES[config.backbone.model_type].config_to_huggingface(config.backbone)
    family = {"gpt2": "GPT2", "llama": "Llama", "bert": "Bert"}[values["model_type"]]
    return values | {
        "architectures": [f"{family}{TASK}"],
        "id2label": {str(index): label for index, label in enumerate(config.labels)},
        "label2id": {label: index for index, label in enumerate(config.labels)},
        "problem_type": "single_label_classification",
    }


def padding(config: ClassifierConfig, special_ids: dict[str, Any]) -> dict[str, int]:
    """``pad_token_id``, by which a GPT of Hugging Face's finds the last token of a padded text; {} if none is known.

    Without a token for padding it is the one that ends a text: no text has it inside.

    Args:
        config: the classifier's configuration.
        special_ids: the ids of special tokens, ``pad_token_id`` and ``eos_token_id`` among them where there are such tokens.
    """
    if config.backbone.model_type == bert.MODEL_TYPE:
        return {"pad_token_id": special_ids.get("pad_token_id") or 0}
    ends = special_ids.get("pad_token_id", special_ids.get("eos_token_id"))
    ends = ends[0] if isinstance(ends, list) else ends
    return {} if ends is None else {"pad_token_id": ends}


def to_huggingface(state: dict[str, Tensor], config: ClassifierConfig) -> dict[str, Tensor]:
    """This model's state dict under the names of Hugging Face's model for sequence classification."""
    kind = config.backbone.model_type
    backbone = {name.removeprefix(_BACKBONE): tensor for name, tensor in state.items() if name.startswith(_BACKBONE)}
    theirs = _BACKBONES[kind].to_huggingface(backbone, config.backbone)
    if kind == bert.MODEL_TYPE:  # a bare encoder's names have no prefix
        theirs = {f"bert.{name}": tensor for name, tensor in theirs.items()}
    return theirs | {name: tensor for ours, tensor in state.items() if (name := head_name(kind, ours)) is not None}
