"""Training: one configuration, one loop, checkpoints that resume."""

from gptcore.train.config import TrainConfig
from gptcore.train.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
