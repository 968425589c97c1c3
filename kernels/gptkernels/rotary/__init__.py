"""Rotary position embedding; see MATH.md."""

from gptkernels.rotary.api import RotaryFunction, rotary

__all__ = ["RotaryFunction", "rotary"]
