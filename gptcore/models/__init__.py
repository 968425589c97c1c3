"""The models, each built from `gptcore.nn`, and a registry by name."""

from pathlib import Path
from typing import Any

import torch

from gptcore import weights
from gptcore.models.bert import BERT, BERTConfig
from gptcore.models.classifier import Classifier, ClassifierConfig
from gptcore.models.gpt import GPT
from gptcore.models.gpt_config import PRESETS, GPTConfig
from gptcore.models.model import Model, ModelConfig

MODELS: dict[str, type[Model]] = {model.config_class.model_type: model for model in (GPT, BERT, Classifier)}
"""By `model_type`, the name in ``config.json`` and of ``gptcore train --model``."""


def from_pretrained(
    path_or_name: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> Model:
    """Loads the model at `path_or_name`, of any type; arguments and errors as `Model.from_pretrained`."""
    found = weights.load(path_or_name, adapter)
    if found.model_type not in MODELS:
        raise weights.WeightsError(
            f"{found.described}: model_type: got {found.model_type!r}; accepted are {', '.join(MODELS)}"
        )
    return MODELS[found.model_type].from_files(found, dtype=dtype, **changes)


__all__ = [
    "BERT",
    "GPT",
    "MODELS",
    "PRESETS",
    "BERTConfig",
    "Classifier",
    "ClassifierConfig",
    "GPTConfig",
    "Model",
    "ModelConfig",
    "from_pretrained",
]
