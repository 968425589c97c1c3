"""Models on disk: our folders and Hugging Face's (safetensors and JSON), and GGUF files."""

from gptcore.weights.error import WeightsError
from gptcore.weights.files import (
    Pretrained,
    check_state,
    description,
    load,
    locate,
    read_generation,
    read_tensors,
    row_parts,
    save_folder,
    save_huggingface,
)
from gptcore.weights.gpt import config_from_huggingface, config_to_huggingface, from_huggingface, to_huggingface
from gptcore.weights.names import CONFIG, WEIGHTS

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Pretrained",
    "WeightsError",
    "check_state",
    "config_from_huggingface",
    "config_to_huggingface",
    "description",
    "from_huggingface",
    "load",
    "locate",
    "read_generation",
    "read_tensors",
    "row_parts",
    "save_folder",
    "save_huggingface",
    "to_huggingface",
]
