"""``gptcore info``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class Info:
    """Show versions, devices and kernels, or describe a model.

    A model's description has its sizes, the memory and operations it needs, and the kernels that run.

    For example:
      gptcore info
      gptcore info smollm2-135m-instruct
      gptcore info gpt2-124m
    """

    model: Positional[str | None] = None
    """A preset, or anything that gptcore generate --model takes."""

    def run(self) -> int:
        from importlib import metadata

        import gptkernels
        import torch

        import gptcore
        from gptcore.evaluate.describe import describe
        from gptcore.models import MODELS, from_pretrained

        if self.model is not None:
            kinds = [kind for kind in MODELS.values() if self.model in kind.config_class.presets()]
            for kind in kinds:  # several models have a preset "tiny"
                with torch.device("meta"):
                    model = kind(kind.config_class.preset(self.model))
                if len(kinds) > 1:
                    print(f"{kind.config_class.model_type}:")
                print(describe(model.to_empty(device="cpu")))
            if not kinds:
                print(describe(from_pretrained(self.model)))
            return 0
        print(f"gptcore {gptcore.__version__}, Python {sys.version.split()[0]}, PyTorch {torch.__version__}")
        try:
            print(f"triton {metadata.version('triton')}")
        except metadata.PackageNotFoundError:
            print("triton is not installed")
        for index in range(torch.cuda.device_count()):
            print(f"cuda:{index} is {torch.cuda.get_device_name(index)}")
        print(gptkernels.report())
        return 0
