"""``gptcore export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as a folder for Hugging Face transformers.

    The folder holds weights, configuration and tokenizer. A LoRA adapter is merged into the weights.

    For example:
      gptcore export --model runs/demo --out exported/demo
      gptcore export --model smollm2-135m-instruct --out exported/smollm2 --dtype bf16
      gptcore export --model smollm2-135m-instruct --adapter runs/tuned --out exported/tuned
    """

    model: str
    """Folder of a run or of weights, a .gguf file, or a name that gptcore fetch or Hugging Face knows."""
    adapter: Path | None = None
    """Folder with a LoRA adapter of the model, from gptcore finetune or peft; a run that has one loads it by itself."""
    out: Path
    """Folder to write; must be new or empty."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Of the weights in the folder; keep takes the model's (fp32 for a GGUF file)."""

    def run(self) -> int:
        import torch

        from gptcore import _extras
        from gptcore._files import folder_writer
        from gptcore.cli._options import load_model, tokenizer_place
        from gptcore.models import from_pretrained
        from gptcore.text import get_tokenizer
        from gptcore.weights import is_adapter, locate, locate_base, read_generation, save_huggingface

        _extras.load("tokenizers", "export")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise FileExistsError(f"out: {self.out} holds something; accepted are a new or an empty folder")
        dtypes = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        place = locate(self.model)
        tokenizer = get_tokenizer(tokenizer_place(place, self.adapter))
        dtype, adapted = dtypes[self.dtype], self.adapter is not None or is_adapter(place)
        model = load_model(from_pretrained, place, self.adapter, dtype, merge=adapted)
        generation = read_generation(locate_base(place) if is_adapter(place) else place) | tokenizer.special_ids(
            model.config.vocab_size
        )
        with folder_writer(self.out.resolve()) as folder:
            save_huggingface(folder, model.config, model.state_dict(), generation)
            tokenizer.save_huggingface(folder)
        print(f"{self.out}: {model.num_parameters():,} parameters; transformers' from_pretrained loads the folder")
        return 0
