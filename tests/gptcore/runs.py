"""A small corpus and a small run, for the tests of training and the processes that they start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from gptcore.tasks import TASK_OF_MODEL
from gptcore.train import TrainConfig
from gptcore.train.finetune_config import FinetuneConfig


def cli() -> ModuleType:
    """gptcore.cli; whoever asks is skipped where tyro, which it is made of, is not installed."""
    pytest.importorskip("tyro")
    import gptcore.cli

    return gptcore.cli


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    cli().main(list(arguments))


def make_corpus(folder: Path) -> Path:
    """A few thousand tokens of arithmetic: quickly learnt, and no download."""
    from gptcore.data.prepare import prepare

    pytest.importorskip("rustbpe")  # what trains the tokenizer
    for part in range(8):
        lines = (f"{a} plus {b} is {a + b}." for a in range(part * 9, part * 9 + 9) for b in range(30))
        (folder / f"{part}.txt").write_text("\n".join(lines))
    out = folder / "prepared"
    prepare([str(folder / "*.txt")], out, vocab_size=300, progress=False)
    return out


def make_words(folder: Path) -> Path:
    """The days of the week, over and over: a word follows from its neighbours. With a WordPiece tokenizer of its own."""
    from gptcore.data.prepare import prepare

    days = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
    for part in range(6):
        lines = (" ".join(days[(i + part) % 7] for i in range(k, k + 9 + k % 5)) for k in range(120))
        (folder / f"{part}.txt").write_text("\n".join(lines))
    out = folder / "data"
    prepare([str(folder / "*.txt")], out, tokenizer="wordpiece", vocab_size=60, progress=False)
    return out


def make_assistant(folder: Path) -> None:
    """A base without training, of single bytes, and conversations of different lengths: ``base`` and ``data.jsonl``."""
    import torch

    from gptcore import GPT, GPTConfig
    from tests.gptcore.small_tokenizers import of_bytes

    torch.manual_seed(1)
    tokenizer = of_bytes()
    config = GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, context=128)
    GPT(config).save_pretrained(folder / "base")
    tokenizer.save(folder / "base" / "tokenizer.json")
    rows = [{"instruction": "ab" * (1 + i * 7 % 15), "output": f"{i}" * (1 + i % 11)} for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))


def assistant(folder: Path, name: str, **changes) -> FinetuneConfig:
    """Instruction tuning of all weights of `make_assistant`'s base, one conversation in a row."""
    return FinetuneConfig.of(
        task="instruct", model=str(folder / "base"), data=folder / "data.jsonl", out=folder / name, trained="all", packing=False,
        steps=8, batch_size=4, accumulate=2, eval_interval=4, eval_windows=2, warmup=2, lr=3e-3, sample_tokens=0, dtype="fp32",
        kernels="reference", **changes,
    )  # fmt: skip


def config(corpus: Path, out: Path, **changes) -> TrainConfig:
    small = {
        "preset": "tiny",
        "context": 16,
        "batch_size": 2,
        "steps": 8,
        "warmup": 2,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "eval_interval": 4,
        "eval_windows": 2,
        "sample_tokens": 0,
        "dtype": "fp32",
        "kernels": "reference",
    }
    if "masked_lm" in (changes.get("task"), TASK_OF_MODEL.get(changes.get("model", "gpt"))):
        small = small | {"sample_text": ""}
        del small["sample_tokens"]
    return TrainConfig.of(data=corpus, out=out, **(small | changes))


def records(out: Path, key: str, file: str = "metrics.jsonl") -> list[float]:
    lines = [json.loads(line) for line in (out / file).read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same_end(one: Path, other: Path, step: str, weights: str = "model.safetensors") -> None:
    """Two runs have the same metrics, weights and last checkpoint, bit for bit."""
    for name in ("metrics.jsonl", weights):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    first, second = (contents(out / "checkpoints" / step) for out in (one, other))
    states = [json.loads(files.pop("state.json")) for files in (first, second)]
    assert first == second
    for state in states:
        state["config"].pop("out")
    assert states[0] == states[1]
