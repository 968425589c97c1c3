"""Training: configuration, loop, checkpoints that resume, one or several processes."""

from gptcore.train.config import TrainConfig
from gptcore.train.loop import TrainResult, train
from gptcore.train.lr_finder import LrSweep, find_lr

__all__ = ["LrSweep", "TrainConfig", "TrainResult", "find_lr", "train"]
