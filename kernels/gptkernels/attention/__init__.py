"""Scaled dot-product attention, causal or full; see MATH.md."""

from gptkernels.attention.api import AttentionFunction, attention, causal_attention

__all__ = ["AttentionFunction", "attention", "causal_attention"]
