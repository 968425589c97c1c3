"""Instruction tuning: what is learnt, packed rows, and a model that answers afterwards."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import GPT, GPTConfig
from gptcore.data.conversations import read_conversations
from gptcore.evaluate.answers import answers, write_answers
from gptcore.generate.chat import Chat
from gptcore.models import from_pretrained
from gptcore.nn import Documents
from gptcore.tasks import TASKS
from gptcore.tasks.instruct import Instruct, InstructOptions
from gptcore.tasks.packing import first_fit, spread
from gptcore.text import Tokenizer, get_tokenizer
from gptcore.train import train
from gptcore.train.finetune_config import FinetuneConfig
from tests.gptcore.runs import contents, records
from tests.gptcore.small_tokenizers import of_bytes

CHATML = ("<|im_start|>", "<|im_end|>")
CAPITALS = {
    "Peru": "Lima", "Cuba": "Havana", "Togo": "Lome", "Iran": "Tehran", "Chad": "N'Djamena", "Oman": "Muscat", "Fiji": "Suva",
    "Mali": "Bamako", "Iraq": "Baghdad", "Laos": "Vientiane",
}  # fmt: skip


def write(path: Path, *conversations: tuple[str, ...]) -> Path:
    """A file of conversations, each of them the user's and the assistant's messages in turn."""
    rows = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}
        for turns in conversations
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def some(count: int) -> list[tuple[str, ...]]:
    """Conversations of different lengths, some of several turns."""
    return [
        ("ab" * (1 + i * 7 % 5), f"{i}" * (1 + i % 9), *(("more?", "yes" * (i % 4)) if i % 4 else ()))
        for i in range(count)
    ]


def make(data: Path, context: int = 64, tokenizer: Tokenizer | None = None, **options: Any) -> Instruct:
    options = {"template": "chatml", "sample_tokens": 0} | options
    return Instruct(InstructOptions(**options), data, context, 0, tokenizer or of_bytes(*CHATML))


def small(task: Instruct, preset: str = "llama-tiny", **changes: Any) -> GPT:
    torch.manual_seed(0)
    vocab_size = task.tokenizer.vocab_size
    return GPT(GPTConfig.preset(preset, vocab_size=vocab_size, kernels="reference", **changes))


def test_targets_of_two_turns_by_hand(tmp_path: Path):
    data = write(tmp_path / "data.jsonl", *[("Hi", "Yes", "And?", "No")] * 2)
    task = make(data, context=200, packing=False)
    batch = task.batch(1, torch.Generator(), slice(None), 0)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    text += "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>"
    ids = task.tokenizer.encode(text, allowed_special="all")
    assert batch.tokens.tolist() == [ids[:-1]]  # the last stop token is learnt, never read
    learnt = [(i, int(target)) for i, target in enumerate(batch.targets[0]) if target != -100]
    assert all(ids[i + 1] == target for i, target in learnt)
    assert task.tokenizer.decode([target for _, target in learnt]) == "Yes<|im_end|>No<|im_end|>"
    assert learnt[0][0] == len(task.format.prompt([{"role": "user", "content": "Hi"}])) - 1


def test_items_go_into_the_first_bin_with_room():
    assert first_fit([[6], [5], [4], [3], [2], [10]], 10, range(6)) == [[0, 2], [1, 3, 4], [5]]
    assert first_fit([[6], [5], [4], [3], [2], [10]], 10, [5, 4, 3, 2, 1, 0]) == [[5], [4, 3, 2], [1], [0]]
    # Room in one part is no use without room in the other.
    assert first_fit([[6, 1], [4, 9], [4, 1], [1, 1]], 10, range(4)) == [[0, 1], [2, 3]]
    assert first_fit([[6, 2], [4, 9], [4, 1]], 10, range(3)) == [[0, 2], [1]]


def test_documents_from_lengths():
    made = Documents.from_lengths([[2, 3], [6], [1]], 6)
    assert made.cu_lengths.tolist() == [0, 2, 5, 6, 12, 13, 18]
    assert made.cu_lengths.dtype == torch.int32
    assert made.max_length == 6
    assert made.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]]
    with pytest.raises(
        ValueError, match=r"rows: got documents of \[4, 3\] tokens; accepted are positive and at most 6"
    ):
        Documents.from_lengths([[4, 3]], 6)
    with pytest.raises(ValueError, match="rows"):
        Documents.from_lengths([[4, 0]], 6)


@pytest.mark.parametrize("preset", ["tiny", "llama-tiny"])  # learned and rotary positions
def test_packed_rows_give_the_loss_and_gradient_of_each_example_alone(preset: str, tmp_path: Path):
    data = write(tmp_path / "data.jsonl", *some(12))
    packed, single = make(data, context=256), make(data, context=256, packing=False)
    assert packed.rows < single.rows / 2
    model = small(packed, preset, context=256)
    examples = [sorted(piece.tokens.tolist() for row in task.train for piece in row) for task in (packed, single)]
    assert examples[0] == examples[1]

    def total(task: Instruct, size: int) -> tuple[float, float, list[torch.Tensor]]:
        nats, count = torch.zeros(()), torch.zeros(())
        for index in range(task.rows // size):
            loss, targets = task.loss(model, task.batch(size, torch.Generator(), slice(None), index))
            nats, count = nats + loss, count + targets
        gradients = torch.autograd.grad(nats, list(model.parameters()))
        return float(nats.detach()), float(count), list(gradients)

    nats, count, gradients = total(single, 1)
    packed_nats, packed_count, packed_gradients = total(packed, packed.rows)
    assert packed_count == count
    assert packed_nats == pytest.approx(nats, rel=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-4)
    # Without the bounds between documents it would be another loss.
    batch = packed.batch(packed.rows, torch.Generator(), slice(None), 0)
    together, _ = packed.loss(model, batch._replace(documents=None))
    assert together.item() != pytest.approx(nats, rel=1e-4)
    several, _, _ = total(single, single.rows)  # padded to the longest of the batch
    assert several == pytest.approx(nats, rel=1e-5)


def test_no_example_is_cut_unless_it_alone_is_longer_than_the_row(tmp_path: Path):
    fits, long, hopeless = ("q" * 9, "a" * 9), ("q" * 9, "b" * 60), ("c" * 70, "never learnt")
    data = write(tmp_path / "data.jsonl", *[fits] * 6, long, hopeless, long)
    task = make(data, context=64)
    pieces = [piece for row in (*task.train, *task.val) for piece in row]
    lengths = sorted(len(piece.tokens) for piece in pieces)
    whole = len(task.format.example(read_conversations(data)[0].messages).ids) - 1
    assert lengths == [whole] * 6 + [64] * 2
    cut = max(pieces, key=lambda piece: len(piece.tokens))
    answer = task.tokenizer.decode(cut.targets[cut.targets != -100].tolist())
    assert answer == "b" * len(answer)  # cut at the end: no stop token
    assert 20 < len(answer) < 60
    assert task.remarks[2:] == [
        "2 conversations are longer than the context of 64 and were truncated",
        "1 conversations were left out: their first answer begins after the context of 64 tokens",
    ]
    assert make(write(tmp_path / "fits.jsonl", *[fits] * 4)).remarks[2:] == []
    with pytest.raises(
        ValueError, match="has 0 examples with a token to learn in a context of 64; accepted are two or more"
    ):
        make(write(tmp_path / "hopeless.jsonl", hopeless, hopeless))
    with pytest.raises(ValueError, match="has 1 examples"):
        make(write(tmp_path / "one.jsonl", fits))


def test_the_same_seed_packs_the_same_rows_and_holds_out_the_same(tmp_path: Path):
    data = write(tmp_path / "data.jsonl", *some(20))

    def rows(seed: int) -> list[list[list[int]]]:
        task = Instruct(InstructOptions(template="alpaca", val_fraction=0.25), data, 128, seed, of_bytes())
        assert sum(map(len, task.val)) == 5
        return [[piece.tokens.tolist() for piece in row] for row in (*task.train, *task.val)]

    assert rows(3) == rows(3) != rows(4)
    three, four = (sorted(tokens for row in rows(seed) for tokens in row) for seed in (3, 4))
    assert three == four


def test_evaluation_covers_the_held_out_rows_once(tmp_path: Path):
    task = make(write(tmp_path / "data.jsonl", *some(40)), val_fraction=0.5)
    assert sum(batch.shape[0] for batch in task.evaluation(3, None)) == len(task.val)
    found = torch.cat([batch.tokens for batch in task.evaluation(3, None)])
    some_rows = torch.cat([batch.tokens for batch in task.evaluation(3, 4)])
    chosen = spread(len(task.val), 4)
    assert len(chosen) == 4
    torch.testing.assert_close(some_rows, found[list(chosen)])


def test_wrong_options_and_bases(tmp_path: Path):
    data = write(tmp_path / "data.jsonl", *some(8))
    for field, value in (("val_fraction", 0.0), ("val_fraction", 1.0), ("sample_tokens", -1)):
        with pytest.raises(ValueError, match=f"{field}: got {value}"):
            InstructOptions(**{field: value})
    explicit = GPTConfig.preset("tiny", attention_impl="explicit")
    with pytest.raises(ValueError, match="packing: got True with attention_impl 'explicit'"):
        InstructOptions().check_model(explicit)
    InstructOptions(packing=False).check_model(explicit)
    with pytest.raises(ValueError, match="task: got instruct for a new model; accepted is gptcore finetune instruct"):
        Instruct(InstructOptions(), data, 64)
    with pytest.raises(ValueError, match="sample_prompt: has 69 tokens; accepted are up to 63"):
        make(data, sample_prompt="q" * 50, sample_tokens=1)
    with pytest.raises(ValueError, match="'chatml' for a tokenizer without the special token"):
        make(data, tokenizer=of_bytes())
    task = make(data)
    small_base = GPT(GPTConfig.preset("tiny", vocab_size=257, kernels="reference"))
    with pytest.raises(
        ValueError, match=re.escape("the token '<|im_end|>' has the id 257, and the base has embeddings for 257")
    ):
        task.build(small_base)
    refusing = of_bytes().with_chat_template("{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match=r"data.jsonl, line 1: chat_template: no"):
        make(data, tokenizer=refusing, template="auto")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without training, whose tokenizer has ChatML's tokens and no template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = of_bytes(*CHATML)
    torch.manual_seed(1)
    config = GPTConfig.preset("llama-tiny", vocab_size=tokenizer.vocab_size, context=128)
    GPT(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def finetune(base: Path, data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {
        "task": "instruct", "model": str(base), "data": data, "out": out, "template": "chatml", "trained": "all",
        "kernels": "reference", "dtype": "fp32", "warmup": 2, "sample_tokens": 0,
    }  # fmt: skip
    return FinetuneConfig.of(**(options | changes))


def test_a_model_learns_answers_and_stops(base: Path, tmp_path: Path, no_peak: None):
    asked = {f"{land}?": f"{city}." for land, city in CAPITALS.items()}
    data = write(tmp_path / "data.jsonl", *[*asked.items()] * 4)
    out = tmp_path / "run"
    options = {"batch_size": 4, "lr": 5e-3, "steps": 150, "eval_interval": 150, "sample_tokens": 12}
    result = train(finetune(base, data, out, sample_prompt="Peru?", **options))
    assert result.val_loss_full < 0.2 < 4 < result.baseline  # the held-out rows are copies of those that were learnt
    tokenizer, model = get_tokenizer(out), from_pretrained(out, kernels="reference")
    assert tokenizer.chat_template is not None
    assert answers(model, tokenizer, list(asked), max_new_tokens=40) == list(asked.values())
    assert answers(model, tokenizer, ["Mali?"] * 2, 3) == ["Bam"] * 2  # no question sees the one before
    assert answers(model, tokenizer, ["Mali?"]) == ["Bamako."]  # by default half of a small context is the answer's
    assert list(Chat(model, tokenizer, temperature=0.0).reply("Mali?"))[-1][-1] == "."
    untrained = answers(from_pretrained(base, kernels="reference"), tokenizer, ["Peru?"], 4)
    write_answers(tmp_path / "answers.md", ["Peru?"], {"base": untrained, "tuned": ["Lima.\nYes."]})
    text = (tmp_path / "answers.md").read_text()
    assert text.startswith("# Answers\n\n## Peru?\n\n**base**\n\n>")
    assert text.endswith("**tuned**\n\n> Lima.\n> Yes.\n")


def test_the_baseline_is_the_held_out_loss_of_the_base(base: Path, tmp_path: Path):
    data = write(tmp_path / "data.jsonl", *some(12))
    task, model = make(data), from_pretrained(base, dropout=0.5).train()
    task.start(model)
    model.eval()
    with torch.no_grad():
        sums = [task.loss(model, batch) for batch in task.evaluation(1, None)]
    expected = sum(float(nats) for nats, _ in sums) / sum(float(count) for _, count in sums)
    assert task.baseline == ("the base's loss", pytest.approx(expected, rel=1e-5))


def test_a_run_resumed_within_an_epoch_sees_the_same_batches(base: Path, tmp_path: Path, no_peak: None):
    data = write(tmp_path / "data.jsonl", *some(30))
    options = {"context": 64, "batch_size": 4, "eval_interval": 5, "steps": 15, "trained": "lora", "eval_windows": 4}
    whole = finetune(base, data, tmp_path / "whole", **options)
    task = Instruct(InstructOptions(template="chatml", sample_tokens=0), data, 64, whole.seed, of_bytes(*CHATML))
    assert 4 * 5 % task.rows  # step 5, of four rows each, does not end an epoch
    assert task.rows < 4 * 15  # another follows
    train(whole, progress=False)
    halted = finetune(base, data, tmp_path / "halted", **options)
    task_class = TASKS["instruct"][1]
    with pytest.MonkeyPatch.context() as patch:
        batch = task_class.batch

        def stopping(self: Instruct, size: int, generator: torch.Generator, rows: slice, index: int) -> Any:
            if index == 7:
                raise RuntimeError("stopped here")
            return batch(self, size, generator, rows, index)

        patch.setattr(task_class, "batch", stopping)
        with pytest.raises(RuntimeError, match="stopped here"):
            train(halted, progress=False)
    train(replace(halted, resume="always"), progress=False)
    for key in ("loss", "val_loss", "val_loss_full"):
        assert records(tmp_path / "halted", key) == records(tmp_path / "whole", key)
    ours, theirs = (contents(tmp_path / name) for name in ("halted", "whole"))
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    write(data, *some(31))
    with pytest.raises(ValueError, match=r"data: .* differs from what the run"):
        train(replace(halted, resume="always", steps=16), progress=False)
