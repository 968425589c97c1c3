"""Scaled dot-product attention, causal or full, of padded or packed batches; see MATH.md."""

from gptkernels.attention.api import AttentionFunction, attention, attention_varlen, causal_attention
from gptkernels.attention.dropout import attention_dropout_mask

__all__ = ["AttentionFunction", "attention", "attention_dropout_mask", "attention_varlen", "causal_attention"]
