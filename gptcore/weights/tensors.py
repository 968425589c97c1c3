"""Reads safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptcore.weights.error import WeightsError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `WeightsError` if the file is missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is damaged or no safetensors file ({error})") from error
