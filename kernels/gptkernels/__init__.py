"""Fused kernels for GPTs, forward and backward, behind plain functions: Triton on GPUs, C++ on CPUs, PyTorch everywhere.

>>> import torch, gptkernels
>>> x = torch.randn(2, 5, 64)
>>> y = gptkernels.layer_norm(x, torch.ones(64), torch.zeros(64))
>>> print(gptkernels.report())  # doctest: +SKIP
"""

from gptkernels.activation import gelu, swiglu
from gptkernels.allocator import tune_allocator
from gptkernels.attention import attention, attention_dropout_mask, attention_varlen, causal_attention
from gptkernels.backend import (
    BackendUnavailableError,
    available_backends,
    report,
    use_backend,
)
from gptkernels.cross_entropy import cross_entropy
from gptkernels.layer_norm import add_layer_norm, layer_norm
from gptkernels.linear import linear
from gptkernels.linear_cross_entropy import linear_cross_entropy
from gptkernels.rms_norm import add_rms_norm, rms_norm
from gptkernels.rotary import rotary
from gptkernels.softmax import softmax
from gptkernels.swap import replace_modules, restore_modules

__all__ = [
    "BackendUnavailableError",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_dropout_mask",
    "attention_varlen",
    "available_backends",
    "causal_attention",
    "cross_entropy",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "replace_modules",
    "report",
    "restore_modules",
    "rms_norm",
    "rotary",
    "softmax",
    "swiglu",
    "tune_allocator",
    "use_backend",
]
