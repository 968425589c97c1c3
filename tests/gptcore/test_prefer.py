"""Direct preference optimisation: the loss and gradient of the textbook, its reference, and what a model comes to prefer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcore import GPT, GPTConfig
from gptcore.nn import LoRAConfig, add_lora
from gptcore.tasks.prefer import Prefer, PreferBatch, PreferOptions, log_probabilities
from gptcore.train import train
from gptcore.train.finetune_config import FinetuneConfig
from tests.gptcore.runs import contents, records
from tests.gptcore.small_tokenizers import of_bytes

CHATML = ("<|im_start|>", "<|im_end|>")


def write(path: Path, *pairs: tuple[Any, str, str]) -> Path:
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def stops(count: int) -> list[tuple[str, str, str]]:
    """Answers that end in a full stop are preferred."""
    words = ["red", "sky", "one", "sea", "old", "tea", "day", "oak"]
    texts = [f"{words[i % 8]} {words[i // 8 % 8]}" for i in range(count)]
    return [(f"{i}?", f"{text}.", text) for i, text in enumerate(texts)]


def make(data: Path, context: int = 96, **options: Any) -> Prefer:
    options = {"template": "chatml", "sample_tokens": 0} | options
    return Prefer(PreferOptions(**options), data, context, 0, of_bytes(*CHATML))


def small(seed: int = 0, kernels: Any = "reference") -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig.preset("llama-tiny", vocab_size=259, context=128, kernels=kernels))


def whole(task: Prefer, size: int | None = None) -> PreferBatch:
    return task.batch(size or task.rows, torch.Generator(), slice(None), 0)


def by_the_book(model: GPT, task: Prefer) -> Tensor:
    """The log-probabilities ``(2, P)`` of the training pairs' answers, each in a batch of its own, from full log-softmax."""
    found = []
    order = task.order.indices(task.rows, 0)
    for side in range(2):
        for pair in [pair for i in order for pair in task.train[i]]:
            tokens, targets = (part.long() for part in pair[side])
            logs = model(tokens[None])[0].log_softmax(-1)  # (T, V)
            found.append(sum(logs[at, target] for at, target in enumerate(targets.tolist()) if target != -100))
    return torch.stack(found).view(2, -1)


def dpo(policy: Tensor, reference: Tensor, beta: float, smoothing: float) -> Tensor:
    chosen, rejected = beta * (policy - reference)
    right = torch.sigmoid(chosen - rejected)
    return -((1 - smoothing) * right.log() + smoothing * (1 - right).log()).sum()


@pytest.mark.parametrize(("kernels", "smoothing"), [("reference", 0.0), ("native", 0.2)])
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradient_are_the_textbooks(lora: bool, kernels: str, smoothing: float, tmp_path: Path):
    if kernels == "native":
        import gptkernels

        if "native" not in gptkernels.available_backends():
            kernels = "reference"
    asked = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "never learnt"},
        {"role": "user", "content": "b"},
    ]
    data = write(tmp_path / "data.jsonl", *stops(7), (asked, "yes, and more", "no"))
    task = make(data, val_fraction=0.2, beta=0.5, label_smoothing=smoothing, context=128)
    base, model = small(kernels=kernels), small(kernels=kernels)
    if lora:
        add_lora(model, LoRAConfig(rank=2))
    task.start(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss, count = task.loss(model, whole(task))
    pairs = sum(map(len, task.train))
    assert count == pairs == 6
    assert loss.item() == pytest.approx(pairs * math.log(2), rel=1e-5)  # the model is the reference
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    batch = whole(task)
    torch.testing.assert_close(log_probabilities(model, batch), by_the_book(model, task), rtol=1e-4, atol=1e-3)
    loss, _ = task.loss(model, batch)
    expected = dpo(by_the_book(model, task), by_the_book(base, task).detach(), 0.5, smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert loss.item() != pytest.approx(pairs * math.log(2), rel=1e-2)
    ours, theirs = (torch.autograd.grad(value, trained) for value in (loss, expected))
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-4 * max(1.0, float(their.abs().max())))


def test_the_reference_is_not_changed_and_has_no_dropout(tmp_path: Path):
    task, model = make(write(tmp_path / "data.jsonl", *stops(6))), small()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    task.start(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss, count = task.loss(model, whole(task))
        (loss / count).backward()
        optimizer.step()
    reference = task._reference
    assert reference is not None
    assert reference is not model
    torch.testing.assert_close(reference.state_dict(), base, rtol=0, atol=0)
    assert not torch.equal(model.wte.weight, base["wte.weight"])
    assert all(parameter.grad is None for parameter in reference.parameters())
    # With LoRA there is one model: its adapters are on again after the loss, and dropout as it was.
    adapted = small()
    add_lora(adapted, LoRAConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_()
    task.start(adapted.train())
    assert task._reference is adapted
    with torch.no_grad():
        before = adapted.eval()(torch.arange(9)[None])
        task.loss(adapted.train(), whole(task))
        assert adapted.training
        torch.testing.assert_close(adapted.eval()(torch.arange(9)[None]), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"start\(model\) must be called before the loss"):
        make(tmp_path / "data.jsonl").loss(model, whole(task))


def test_measures_by_hand(tmp_path: Path):
    task = make(write(tmp_path / "data.jsonl", *stops(4)))
    task.margins = lambda *_: torch.tensor([2.0, -1.0, 0.5])  # type: ignore[method-assign]
    found = task.evaluate(None, None)  # type: ignore[arg-type]
    means = {name: float(total / count) for name, (total, count) in found.items()}
    losses = [-math.log(1 / (1 + math.exp(-margin))) for margin in (2.0, -1.0, 0.5)]
    assert means == pytest.approx({"loss": sum(losses) / 3, "chosen_rate": 2 / 3, "margin": 0.5})


def test_pairs_share_rows_and_long_ones_are_counted(tmp_path: Path):
    late = ("p" * 70, "never", "learnt")
    data = write(tmp_path / "data.jsonl", *stops(5), ("q", "a" * 80, "b"), late)
    task = make(data, context=64)
    assert task.remarks[2:] == [
        "1 pairs have an answer beyond the context of 64 and were truncated",
        "1 pairs were left out: an answer begins after the context of 64 tokens",
    ]
    for row in (*task.train, *task.val):
        for side in range(2):
            assert sum(len(pair[side].tokens) for pair in row) <= 64
    batch = whole(task, 2)
    assert batch.shape == (4, 64)
    bounds = batch.documents.cu_lengths
    first, second = (
        [pair[0].tokens.tolist() for pair in row] for row in (task.train[i] for i in task.order.indices(2, 0))
    )
    for document, tokens in zip(batch.answers[0].tolist(), first + second, strict=True):
        assert batch.tokens.flatten()[bounds[document] : bounds[document + 1]].tolist() == tokens
    assert batch.to(torch.device("cpu")).answers is not None


def test_wrong_options(tmp_path: Path):
    for field, value in (("beta", 0.0), ("beta", math.inf), ("label_smoothing", 0.5), ("val_fraction", 1.0)):
        with pytest.raises(ValueError, match=f"{field}: got {value}"):
            PreferOptions(**{field: value})
    with pytest.raises(ValueError, match="attention_impl: got 'explicit' for the task prefer; accepted is 'fused'"):
        PreferOptions().check_model(GPTConfig.preset("tiny", attention_impl="explicit"))
    with pytest.raises(ValueError, match=r"data.jsonl, line 1: chosen and rejected are the same"):
        make(write(tmp_path / "data.jsonl", ("a", "b", "b")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small(1).save_pretrained(folder)
    of_bytes(*CHATML).save(folder / "tokenizer.json")
    return folder


def finetune(base: Path, data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {
        "task": "prefer", "model": str(base), "data": data, "out": out, "template": "chatml", "kernels": "reference",
        "dtype": "fp32", "warmup": 2, "sample_tokens": 0, "batch_size": 4, "eval_interval": 10, "eval_windows": 4,
    }  # fmt: skip
    return FinetuneConfig.of(**(options | changes))


@pytest.mark.parametrize("trained", ["lora", "all"])
def test_a_model_comes_to_prefer_answers_with_a_full_stop(trained: str, base: Path, tmp_path: Path, no_peak: None):
    data = write(tmp_path / "data.jsonl", *stops(48))
    options = {"trained": trained, "lr": 1e-2, "beta": 0.3, "steps": 16, "val_fraction": 0.25}
    result = train(finetune(base, data, tmp_path / "run", **options), progress=False)
    assert result.baseline == math.log(2)
    assert result.val_loss_full < 0.4
    rates = records(tmp_path / "run", "val_chosen_rate")
    assert rates[-1] == 1.0  # held-out pairs; before training the rewards are all 0
    assert records(tmp_path / "run", "val_margin")[-1] > 0.5
    assert ((tmp_path / "run" / "model.safetensors").exists()) == (trained == "all")


def test_a_resumed_run_has_the_base_as_its_reference(base: Path, tmp_path: Path, no_peak: None):
    data = write(tmp_path / "data.jsonl", *stops(12))
    options = {"trained": "all", "lr": 3e-3, "batch_size": 2, "eval_interval": 2}
    train(finetune(base, data, tmp_path / "whole", steps=6, **options), progress=False)
    stopped = finetune(base, data, tmp_path / "halted", steps=6, **options)
    with pytest.MonkeyPatch.context() as patch:
        loss = Prefer.loss
        calls = []

        def stopping(self: Prefer, model: Any, batch: PreferBatch) -> tuple[Tensor, Tensor]:
            calls.append(batch)
            if len(calls) == 4:
                raise RuntimeError("stopped here")
            return loss(self, model, batch)

        patch.setattr(Prefer, "loss", stopping)
        with pytest.raises(RuntimeError, match="stopped here"):
            train(stopped, progress=False)
    train(replace(stopped, resume="always"), progress=False)
    for key in ("loss", "val_loss", "val_margin"):
        assert records(tmp_path / "halted", key) == records(tmp_path / "whole", key)
    ours, theirs = (contents(tmp_path / name) for name in ("halted", "whole"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
