"""Cross-entropy of logits; see MATH.md."""

from gptkernels.cross_entropy.api import CrossEntropyFunction, cross_entropy

__all__ = ["CrossEntropyFunction", "cross_entropy"]
