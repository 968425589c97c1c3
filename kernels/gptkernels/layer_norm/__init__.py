"""Layer normalisation over the last dimension; see MATH.md."""

from gptkernels.layer_norm.api import LayerNormFunction, layer_norm

__all__ = ["LayerNormFunction", "layer_norm"]
