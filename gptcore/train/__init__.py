"""Training: configuration, loop, checkpoints that resume, one or several processes."""

from gptcore.train.config import RunConfig, TrainConfig
from gptcore.train.finetune_config import FinetuneConfig
from gptcore.train.loop import TrainResult, train
from gptcore.train.lr_finder import LrSweep, find_lr

__all__ = ["FinetuneConfig", "LrSweep", "RunConfig", "TrainConfig", "TrainResult", "find_lr", "train"]
