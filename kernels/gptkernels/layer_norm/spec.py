"""The specifications of layer_norm and add_layer_norm."""

from __future__ import annotations

from gptkernels._norm_spec import add_norm, norm
from gptkernels.layer_norm import reference
from gptkernels.layer_norm.api import add_layer_norm, layer_norm

SPEC = norm("layer_norm", layer_norm, reference.layer_norm)
ADD_SPEC = add_norm("add_layer_norm", add_layer_norm, reference.add_layer_norm)
