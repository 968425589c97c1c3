"""The building blocks of models: attention, norms, MLP, positions, the key/value cache. Built from sizes, not from a config."""

from gptcore.nn.attention import AttentionArgs, AttentionImpl, CrossAttention, SelfAttention
from gptcore.nn.backend import Kernels, backend_of, check_kernels, load_kernels
from gptcore.nn.cache import KeyValueCache
from gptcore.nn.documents import Documents
from gptcore.nn.linear import Linear
from gptcore.nn.lora import LoRAConfig, LoRALayers, add_lora, has_lora, merge_lora, without_lora
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
    "LoRAConfig",
    "LoRALayers",
    "Norm",
    "NormKind",
    "RotaryScaling",
    "SelfAttention",
    "add_lora",
    "backend_of",
    "check_kernels",
    "has_lora",
    "load_kernels",
    "merge_lora",
    "rotary_tables",
    "without_lora",
]
