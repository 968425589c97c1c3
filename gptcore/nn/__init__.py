"""The building blocks of models: attention, norms, MLP, positions, the key/value cache. Built from sizes, not from a config."""

from gptcore.nn.attention import AttentionArgs, AttentionImpl, CrossAttention, SelfAttention
from gptcore.nn.backend import Kernels, backend_of, check_kernels, load_kernels
from gptcore.nn.cache import KeyValueCache
from gptcore.nn.documents import Documents
from gptcore.nn.linear import Linear
from gptcore.nn.mlp import MLP, Activation
from gptcore.nn.norm import Norm, NormKind
from gptcore.nn.positions import RotaryScaling, rotary_tables

__all__ = [
    "MLP",
    "Activation",
    "AttentionArgs",
    "AttentionImpl",
    "CrossAttention",
    "Documents",
    "Kernels",
    "KeyValueCache",
    "Linear",
    "Norm",
    "NormKind",
    "RotaryScaling",
    "SelfAttention",
    "backend_of",
    "check_kernels",
    "load_kernels",
    "rotary_tables",
]
