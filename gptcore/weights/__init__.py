"""Models on disk: our folders and Hugging Face's (safetensors and JSON), and GGUF files."""

from gptcore.weights.adapter import Adapter, adapter_state, is_adapter, load_adapter, read_adapter, save_adapter
from gptcore.weights.error import WeightsError
from gptcore.weights.files import (
    Pretrained,
    check_state,
    description,
    load,
    locate,
    locate_base,
    read_generation,
    row_parts,
    save_folder,
    save_huggingface,
)
from gptcore.weights.gpt import config_from_huggingface, config_to_huggingface, from_huggingface, to_huggingface
from gptcore.weights.names import ADAPTER, ADAPTER_CONFIG, CONFIG, WEIGHTS
from gptcore.weights.tensors import read_tensors

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "CONFIG",
    "WEIGHTS",
    "Adapter",
    "Pretrained",
    "WeightsError",
    "adapter_state",
    "check_state",
    "config_from_huggingface",
    "config_to_huggingface",
    "description",
    "from_huggingface",
    "is_adapter",
    "load",
    "load_adapter",
    "locate",
    "locate_base",
    "read_adapter",
    "read_generation",
    "read_tensors",
    "row_parts",
    "save_adapter",
    "save_folder",
    "save_huggingface",
    "to_huggingface",
]
