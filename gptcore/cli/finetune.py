"""``gptcore finetune KIND``."""

from __future__ import annotations

import argparse
import inspect
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes

from gptcore.cli._listing import choose
from gptcore.tasks import TASKS, LanguageModelOptions, TaskOptions
from gptcore.train.config import NOT_SAVED
from gptcore.train.finetune_config import FinetuneConfig
from gptcore.train.guard import drop_unwritten

ANSWERS = "answers.md"
"""In the folder of an instruction-tuned run: the answers of the base and of the tuned model."""


def is_first_process() -> bool:
    """Returns whether this is the only process, or the first of those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class _Finetune(FinetuneConfig):
    config: Path | None = field(default=None, metadata=NOT_SAVED)
    """YAML file with values of these options, such as a run's config.yaml; options on the command line override it."""
    tune_allocator: bool = field(default=True, metadata=NOT_SAVED)
    """Keep freed memory in the process: faster steps on a CPU (see gptkernels.tune_allocator)."""
    task: Annotated[TaskOptions, OmitArgPrefixes] = field(default_factory=LanguageModelOptions)
    """Options of the task."""

    def run(self) -> int:
        import gptkernels

        from gptcore.train import train

        if self.tune_allocator:
            gptkernels.tune_allocator()
        try:
            if train(self).interrupted:
                return 130
            self.report()
            return 0
        finally:
            drop_unwritten()

    def report(self) -> None:
        """Shows what people want to know of the finished run besides its loss."""


@dataclass(frozen=True, kw_only=True)
class Text(_Finetune):
    """Train a model further on text.

    `gptcore prepare` must have tokenized the text with the model's own tokenizer.

    For example:
      gptcore prepare shakespeare --out data/plays --tokenizer smollm2-135m-instruct  # then: gptcore finetune text ...
      gptcore finetune text --data data/plays --model smollm2-135m-instruct --out runs/plays --steps 200
    """


@dataclass(frozen=True, kw_only=True)
class Classify(_Finetune):
    """Train a model to give labels to texts.

    The data is a table with a text and a label in each row: a CSV, TSV or JSON Lines file, or fetched data. At the end the model
    labels the texts that are held out for the test: a table of figures, test.json and confusion.png.

    For example:
      gptcore fetch sms-spam && gptcore finetune classify --data sms-spam --model smollm2-135m-instruct --out runs/spam
      gptcore finetune classify --data reviews.csv --text-column review --label-column stars --model runs/demo --out runs/stars
      gptcore finetune classify --data tickets.jsonl --balance weights --model minilm-l6 --trained all --out runs/tickets
    """

    def report(self) -> None:
        import torch

        from gptcore.evaluate.classification import FIGURES, PICTURE, figures_table, report_run
        from gptcore.tasks import ClassifyOptions
        from gptcore.train.hardware import find_device, multiplies_bf16

        assert isinstance(self.task, ClassifyOptions)
        if not self.task.test_fraction or not is_first_process():
            return
        device = find_device(self.device)
        bf16 = self.dtype == "bf16" or (self.dtype == "auto" and multiplies_bf16(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            print(figures_table(report_run(self.out, kernels=self.kernels, device=device)))
        print(f"all figures in {self.out / FIGURES}, the confusion matrix in {self.out / PICTURE}")


@dataclass(frozen=True, kw_only=True)
class Instruct(_Finetune):
    """Train a model to follow instructions.

    The file is JSON or JSON Lines, with "instruction", "input" and "output" (Alpaca's), or with "messages" (a chat). Only the
    answers are learnt. At the end answers.md shows what the base and the tuned model answer to the same questions.

    For example:
      gptcore fetch instructions && gptcore finetune instruct --data instructions --model smollm2-135m-instruct --out runs/tuned
      gptcore finetune instruct --data chats.jsonl --model runs/demo --template alpaca --trained all --out runs/assistant
    """

    answers: bool = field(default=True, metadata=NOT_SAVED)
    """At the end let both models answer a few questions."""

    def report(self) -> None:
        import torch

        from gptcore.evaluate.answers import QUESTIONS, answers, write_answers
        from gptcore.models import GPT
        from gptcore.nn import has_lora, without_lora
        from gptcore.text import get_tokenizer
        from gptcore.train.hardware import find_device, multiplies_bf16

        if not self.answers or not is_first_process():
            return
        device = find_device(self.device)
        options: dict[str, Any] = {"kernels": self.kernels}
        options["dtype"] = torch.bfloat16 if multiplies_bf16(device) else torch.float32
        tokenizer = get_tokenizer(self.out)
        tuned = GPT.from_pretrained(self.out, **options).to(device).eval()
        columns = {"tuned": answers(tuned, tokenizer)}
        if has_lora(tuned):
            with without_lora(tuned):
                columns = {"base": answers(tuned, tokenizer), **columns}
        else:
            base = GPT.from_pretrained(self.model, **options).to(device).eval()
            columns = {"base": answers(base, tokenizer), **columns}
        write_answers(self.out / ANSWERS, QUESTIONS, columns)
        print(f"answers of both models to {len(QUESTIONS)} questions in {self.out / ANSWERS}")


@dataclass(frozen=True, kw_only=True)
class Prefer(_Finetune):
    """Train a model to prefer some answers to others.

    The method is direct preference optimisation (DPO). The file is JSON Lines with "prompt", "chosen" and "rejected".

    For example:
      gptcore finetune prefer --data pairs.jsonl --model runs/tuned --out runs/preferred
      gptcore finetune prefer --data pairs.jsonl --model smollm2-135m-instruct --beta 0.3 --epochs 1 --out runs/preferred
    """


KINDS: dict[str, tuple[type[_Finetune], str]] = {
    "classify": (Classify, "classify"),
    "instruct": (Instruct, "instruct"),
    "prefer": (Prefer, "prefer"),
    "text": (Text, "language_model"),
}
"""The kinds of fine-tuning on the command line: the class of its options, and its task."""


class Finetune:
    """Train a model further, on data of a task.

    `gptcore finetune KIND --help` shows the options of a kind.

    For example:
      gptcore finetune classify --data sms-spam --model smollm2-135m-instruct --out runs/spam
      gptcore finetune instruct --data instructions --model runs/demo --out runs/assistant --trained all
      gptcore finetune prefer --data pairs.jsonl --model runs/assistant --out runs/preferred
      gptcore finetune text --data data/plays --model smollm2-135m-instruct --out runs/plays
    """

    @classmethod
    def parse(cls, arguments: list[str]) -> Any:
        """Parses ``KIND`` and its options, which override the file that ``--config`` names."""
        kind, rest = arguments[:1], arguments[1:]
        if not kind or kind[0] not in KINDS:
            classes = {name: made for name, (made, _) in KINDS.items()}
            return choose(classes, "gptcore finetune", inspect.getdoc(cls) or "", arguments)
        made, task = KINDS[kind[0]]
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        config = finder.parse_known_args(rest)[0].config
        options, _ = TASKS[task]
        values: dict[str, Any] = dict.fromkeys(("data", "out", "model"), tyro.MISSING)
        values |= {"task": options(), "config": config}
        if config is not None:
            values |= FinetuneConfig.read(config)
            if values["task"].name != task:
                raise ValueError(f"config: {config} is of the task {values['task'].name}; accepted is {task}")
        return tyro.cli(made, prog=f"gptcore finetune {kind[0]}", args=rest, default=made(**values))
