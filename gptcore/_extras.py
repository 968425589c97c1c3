"""Optional packages: imports them, and says what to install if one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

EXTRAS = {
    "tokenizers": "pretrained",
    "gguf": "pretrained",
    "huggingface_hub": "pretrained",
    "pyarrow": "data",
    "datasets": "data",
    "sklearn": "finetune",
    "lm_eval": "eval",
    "tensorboard": "monitor",
}
"""Import name of each optional package -> the extra of gptcore that installs it."""


class MissingPackageError(ImportError):
    """An optional package is missing, which plain ``pip install gptcore`` does not install."""


def load(package: str, what: str) -> Any:
    """Import an optional package and return it.

    Args:
        package: a key of :data:`EXTRAS`, or a module in such a package.
        what: for the error: what needs the package, such as ``f"{path}"`` or ``"--tensorboard"``.

    Raises:
        MissingPackageError: the package is not installed or cannot be imported; says what to install.
    """
    try:
        return import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        problem = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingPackageError(
            f"{what}: needs the package {name}, which {problem}; pip install 'gptcore[{EXTRAS[name]}]'"
        ) from error
