"""The cross-entropy of a linear layer's output, without holding it; see MATH.md."""

from gptkernels.linear_cross_entropy.api import LinearCrossEntropyFunction, linear_cross_entropy

__all__ = ["LinearCrossEntropyFunction", "linear_cross_entropy"]
