"""A linear layer; see MATH.md."""

from gptkernels.linear.api import LinearFunction, linear

__all__ = ["LinearFunction", "linear"]
