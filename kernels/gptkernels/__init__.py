"""Fused kernels for GPTs, forward and backward, behind plain functions: Triton on GPUs, PyTorch everywhere.

>>> import torch, gptkernels
>>> x = torch.randn(2, 5, 64)
>>> y = gptkernels.layer_norm(x, torch.ones(64), torch.zeros(64))
>>> print(gptkernels.report())  # doctest: +SKIP
"""

from gptkernels.attention import attention, causal_attention
from gptkernels.backend import (
    BackendUnavailableError,
    available_backends,
    report,
    use_backend,
)
from gptkernels.layer_norm import layer_norm
from gptkernels.softmax import softmax

__all__ = [
    "BackendUnavailableError",
    "attention",
    "available_backends",
    "causal_attention",
    "layer_norm",
    "report",
    "softmax",
    "use_backend",
]
