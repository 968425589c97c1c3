"""Softmax over any dimension, scaled and causal; see MATH.md."""

from gptkernels.softmax.api import SoftmaxFunction, softmax

__all__ = ["SoftmaxFunction", "softmax"]
