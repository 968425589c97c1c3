"""Layer normalisation over the last dimension, alone or after a residual sum; see MATH.md."""

from gptkernels.layer_norm.api import AddLayerNormFunction, LayerNormFunction, add_layer_norm, layer_norm

__all__ = ["AddLayerNormFunction", "LayerNormFunction", "add_layer_norm", "layer_norm"]
