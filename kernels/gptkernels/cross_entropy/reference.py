"""Cross-entropy in plain PyTorch: both losses share the formula, in `_loss`."""

from gptkernels._loss.reference import cross_entropy

__all__ = ["cross_entropy"]
