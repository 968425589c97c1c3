"""Which kernels a model runs on: a field of every model's configuration."""

from __future__ import annotations

from typing import Literal

from gptkernels import use_backend

Kernels = Literal["auto", "reference", "triton", "native"]


def backend_of(kernels: Kernels) -> str | None:
    """What to pass as `backend` to a function of gptkernels; None, for "auto", leaves the choice to `use_backend`."""
    return None if kernels == "auto" else kernels


def check_kernels(kernels: Kernels) -> None:
    """Raises BackendUnavailableError if these kernels cannot run here; says why and what to do."""
    with use_backend(kernels):
        pass
