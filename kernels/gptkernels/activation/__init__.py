"""GELU (with bias) and SwiGLU; see MATH.md."""

from gptkernels.activation.api import GELUFunction, SwiGLUFunction, gelu, swiglu

__all__ = ["GELUFunction", "SwiGLUFunction", "gelu", "swiglu"]
