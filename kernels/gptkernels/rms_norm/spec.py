"""The specifications of rms_norm and add_rms_norm."""

from __future__ import annotations

from gptkernels._norm_spec import add_norm, norm, without_bias
from gptkernels.rms_norm import reference
from gptkernels.rms_norm.api import add_rms_norm, rms_norm

SPEC = without_bias(norm("rms_norm", rms_norm, reference.rms_norm))
ADD_SPEC = without_bias(add_norm("add_rms_norm", add_rms_norm, reference.add_rms_norm))
