"""Options that several verbs share: loading a model, and sampling."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gptcore.generate import Sampling
from gptcore.nn import Kernels

if TYPE_CHECKING:
    from gptcore.models import Model
    from gptcore.text import PretrainedTokenizer, Tokenizer

M = TypeVar("M", bound="Model")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options of every verb that runs a trained model."""

    model: str
    """Folder of a run or of Hugging Face weights (GPT-2, Llama, BERT), a .gguf file, or a name that gptcore fetch or Hugging
    Face knows."""
    tokenizer: str | None = None
    """gpt2, or the path of a saved tokenizer; the model's own if left out."""
    kernels: Kernels = "auto"
    """The kernels that run; auto takes the fastest available."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights. auto takes bf16, which halves the bytes to read for each token; on a CPU with kernels reference, fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    tune_allocator: bool = True
    """Keep freed memory in the process (see gptkernels.tune_allocator)."""

    def load(self, kind: type[M], **changes: Any) -> tuple[M, Tokenizer | PretrainedTokenizer]:
        """Loads the model, which must be of this kind, and its tokenizer; `changes` are fields of its configuration."""
        import gptkernels
        import torch

        from gptcore.nn import check_kernels
        from gptcore.text import get_tokenizer
        from gptcore.weights import locate

        if self.tune_allocator:
            gptkernels.tune_allocator()
        check_kernels(self.kernels)  # an error comes before anything is loaded
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        wide = self.dtype == "fp32" or (self.dtype == "auto" and (device, self.kernels) == ("cpu", "reference"))
        dtype = torch.float32 if wide else torch.bfloat16
        place = locate(self.model)
        tokenizer = get_tokenizer(self.tokenizer or place)  # before the model: an error comes at once
        model = kind.from_pretrained(place, dtype=dtype, kernels=self.kernels, **changes).to(device).eval()
        if tokenizer.base_size > model.config.vocab_size:  # added tokens may lack rows: the model never makes them
            raise ValueError(
                f"tokenizer: has {tokenizer.base_size} tokens; accepted are at most the model's {model.config.vocab_size}"
            )
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Sampling):
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""

    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
