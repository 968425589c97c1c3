"""Converts Hugging Face's models for sequence classification to `gptcore.models.Classifier` and back.

Those of GPT-2, Llama, Mistral and BERT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gptcore.weights import bert, gpt
from gptcore.weights.error import WeightsError

if TYPE_CHECKING:
    from gptcore.models.classifier import ClassifierConfig

MODEL_TYPE = "classifier"
"""The model's name in `gptcore.models.MODELS`."""
_SUFFIX = "ForSequenceClassification"
_HEADS = {"pooler": "bert.pooler.dense", "classifier": "classifier", "score": "score"}
"""Our name of a head's layer -> Hugging Face's."""
LAST = ("score.weight", "classifier.weight")
"""Our name of the weights of a GPT's last layer, and of a BERT's: a row for each class."""
_OUTPUTS = ("lm_head.", "head.")
"""Our names of the tensors of output layers, which a classifier does not have, begin so."""


def head_name(name: str) -> str | None:
    """Hugging Face's name of a tensor of a classifier's head; None if it is no tensor of the head."""
    module, _, kind = name.rpartition(".")
    return f"{_HEADS[module]}.{kind}" if module in _HEADS else None


def head_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a classifier's head in a Hugging Face state dict, under our names."""
    layers = {theirs: ours for ours, theirs in _HEADS.items()} | {"pooler.dense": "pooler"}  # BertModel's has no prefix
    split = {name: name.rpartition(".") for name in state}
    return {f"{layers[module]}.{kind}": state[name] for name, (module, _, kind) in split.items() if module in layers}


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model of ours under the names of a classifier around it, without the model's output layer."""
    return {f"backbone.{name}": tensor for name, tensor in state.items() if not name.startswith(_OUTPUTS)}


def is_classifier(values: dict[str, Any]) -> bool:
    """Whether a Hugging Face ``config.json`` describes a model for sequence classification."""
    return any(name.endswith(_SUFFIX) for name in values.get("architectures") or [])


def config_from_huggingface(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ClassifierConfig` from the ``config.json`` of a Hugging Face model for sequence classification.

    Raises:
        WeightsError: one score (a regression) or several right classes for a text, or an option that the backbone lacks.
        KeyError: a size that is missing.
    """
    if (kind := values.get("problem_type")) not in (None, "single_label_classification"):
        raise WeightsError(f"problem_type: got {kind!r}; accepted is 'single_label_classification'")
    converter = bert if values["model_type"] == "bert" else gpt
    backbone = {"model_type": converter.MODEL_TYPE, **converter.config_from_huggingface(values)}
    backbone |= {"masked_words": False} if converter is bert else {"tied": True}
    names = {int(index): name for index, name in (values.get("id2label") or {}).items()}
    classes = len(names) or values.get("num_labels", 2)  # transformers leaves out what its defaults say
    return {"backbone": backbone, "labels": [names.get(index, f"LABEL_{index}") for index in range(classes)]}


def convert(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a Hugging Face model for sequence classification under our classifier's names."""
    layers = {theirs: ours for ours, theirs in _HEADS.items()}
    head, rest = {}, {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in layers:
            head[f"{layers[module]}.{kind}"] = tensor
        else:
            rest[name] = tensor
    backbone = config["backbone"]
    converter = bert if backbone["model_type"] == bert.MODEL_TYPE else gpt
    return {f"backbone.{name}": tensor for name, tensor in converter.convert(rest, backbone).items()} | head


def config_to_huggingface(config: ClassifierConfig) -> dict[str, Any]:
    """The ``config.json`` of the Hugging Face model for sequence classification that computes the same.

    Raises:
        WeightsError: a backbone that none of Hugging Face's models is; names the field.
    """
    encoder = config.backbone.model_type == bert.MODEL_TYPE
    values = (bert if encoder else gpt).config_to_huggingface(config.backbone)  # type: ignore[arg-type]
    name = {"gpt2": "GPT2", "llama": "Llama", "bert": "Bert"}[values["model_type"]]
    return values | {
        "architectures": [f"{name}{_SUFFIX}"],
        "problem_type": "single_label_classification",
        "id2label": {str(index): label for index, label in enumerate(config.labels)},
        "label2id": {label: index for index, label in enumerate(config.labels)},
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
    """Our classifier's state dict under Hugging Face's names and layouts.

    Raises:
        WeightsError: as `config_to_huggingface`.
    """
    backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    head = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    if config.backbone.model_type == bert.MODEL_TYPE:
        theirs = {f"bert.{name}": t for name, t in bert.to_huggingface(backbone, config.backbone).items()}  # type: ignore[arg-type]
    else:
        theirs = gpt.to_huggingface(backbone, config.backbone)  # type: ignore[arg-type]
    for name, tensor in head.items():
        module, _, kind = name.rpartition(".")
        theirs[f"{_HEADS[module]}.{kind}"] = tensor
    return theirs
