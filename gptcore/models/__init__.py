"""The models, each built from `gptcore.layers`."""

from gptcore.models.gpt import GPT

__all__ = ["GPT"]
