"""The choice of kernels, a field of every model's configuration."""

from __future__ import annotations

from typing import Literal

import torch
from gptkernels import BackendUnavailableError, available_backends, report, softmax

Kernels = Literal["auto", "reference", "triton", "native"]


def backend_of(kernels: Kernels) -> str | None:
    """Return the `backend` argument for functions of gptkernels; "auto" gives None, which leaves the choice to `use_backend`."""
    return None if kernels == "auto" else kernels


def check_kernels(kernels: Kernels) -> None:
    """Raise BackendUnavailableError if no device of this machine can run these kernels; the message says why."""
    if kernels == "auto" or kernels in available_backends():
        return
    reason = report().rows[-1].unavailable[kernels]  # on the last device: the GPU, where there is one
    raise BackendUnavailableError(f"kernels: got {kernels!r}, which cannot run here: {reason}")


def load_kernels(kernels: Kernels, device: torch.device) -> None:
    """Load the kernels before their first use; the native ones are compiled where no build for this CPU exists yet.

    Raises:
        BackendUnavailableError: an explicit choice that cannot run on `device`.
    """
    check_kernels(kernels)
    softmax(torch.zeros(1, 1, device=device), backend=backend_of(kernels))  # any operation loads its backend
