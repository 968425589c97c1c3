"""Options that several verbs share: loading a model, and sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gptcore.generate import Sampling
from gptcore.nn import Kernels

if TYPE_CHECKING:
    import torch

    from gptcore.models import Model
    from gptcore.text import PretrainedTokenizer, Tokenizer

M = TypeVar("M", bound="Model")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options of every verb that runs a trained model."""

    model: str
    """Folder of a run or of Hugging Face weights (GPT-2, Llama, BERT), a .gguf file, or a name that gptcore fetch or Hugging
    Face knows."""
    adapter: Path | None = None
    """Folder with a LoRA adapter of the model, from gptcore finetune or peft; a run that has one loads it by itself."""
    merge: bool = False
    """Add the adapter's product to the weights: the model then runs as fast as its base."""
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
        """Loads the model, which must be of this kind (`Model`: any), and its tokenizer.

        `changes` are fields of its configuration.
        """
        import gptkernels
        import torch

        from gptcore.models import Model, from_pretrained
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
        # Before the model: an error comes at once.
        tokenizer = get_tokenizer(self.tokenizer or tokenizer_place(place, self.adapter))
        read: Callable[..., Any] = from_pretrained if kind is Model else kind.from_pretrained
        model = load_model(read, place, self.adapter, dtype, merge=self.merge, kernels=self.kernels, **changes)
        model = model.to(device).eval()
        if tokenizer.base_size > model.config.vocab_size:  # added tokens may lack rows: the model never makes them
            raise ValueError(
                f"tokenizer: has {tokenizer.base_size} tokens; accepted are at most the model's {model.config.vocab_size}"
            )
        return model, tokenizer


def tokenizer_place(model: Path, adapter: Path | None) -> Path:
    """The folder or file of the tokenizer: the adapter's where it has one, which may have other special tokens."""
    from gptcore.weights.names import TOKENIZER

    return adapter if adapter is not None and (adapter / TOKENIZER).is_file() else model


def load_model(
    load: Callable[..., M], place: Path, adapter: Path | None, dtype: torch.dtype | None, *, merge: bool, **changes: Any
) -> M:
    """Loads a model with `load`, one of the functions `from_pretrained`, and merges its adapter if asked to.

    Raises:
        ValueError: `merge` for a model without an adapter; otherwise as `load`.
    """
    from gptcore.nn import has_lora, merge_lora

    if not merge:
        return load(place, adapter=adapter, dtype=dtype, **changes)
    model = load(place, adapter=adapter, **changes)  # in the file's dtype: the sum is rounded once, to `dtype`
    if not has_lora(model):
        raise ValueError(f"merge: {place} has no adapter; accepted is a model that has one, or one with --adapter")
    merge_lora(model, dtype)
    return model


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Sampling):
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""

    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}
