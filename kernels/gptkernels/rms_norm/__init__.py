"""RMS normalisation over the last dimension, alone or after a residual sum; see MATH.md."""

from gptkernels.rms_norm.api import AddRMSNormFunction, RMSNormFunction, add_rms_norm, rms_norm

__all__ = ["AddRMSNormFunction", "RMSNormFunction", "add_rms_norm", "rms_norm"]
