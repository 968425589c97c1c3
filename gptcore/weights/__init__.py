"""Weights on disk: safetensors and json, our own and Hugging Face's GPT-2 and Llama; and GGUF files."""

from gptcore.weights.folder import (
    CONFIG,
    WEIGHTS,
    check_state,
    load,
    locate,
    read_generation,
    read_tensors,
    save_folder,
    save_huggingface,
)
from gptcore.weights.huggingface import (
    WeightsError,
    config_from_huggingface,
    config_to_huggingface,
    from_huggingface,
    to_huggingface,
)

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "WeightsError",
    "check_state",
    "config_from_huggingface",
    "config_to_huggingface",
    "from_huggingface",
    "load",
    "locate",
    "read_generation",
    "read_tensors",
    "save_folder",
    "save_huggingface",
    "to_huggingface",
]
