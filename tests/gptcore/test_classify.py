"""Classification fine-tuning: what the task gives the trainer, runs that learn, the test at the end, and `gptcore classify`."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from gptcore import GPT, GPTConfig
from gptcore.evaluate.classification import draw_confusion, figures, figures_table, predict, report_run
from gptcore.models import BERT, BERTConfig, Classifier, from_pretrained
from gptcore.tasks import Classify, ClassifyOptions
from gptcore.tasks.classify import encode_texts
from gptcore.text import get_tokenizer
from gptcore.text.wordpiece import train_wordpiece
from gptcore.train import FinetuneConfig, train
from tests.gptcore.runs import main, records

WORDS = ["red", "blue", "tree", "stone", "river", "cloud", "paper", "glass", "night", "day"]
ALL = slice(None)


@pytest.fixture(scope="module", autouse=True)
def _packages() -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("sklearn")


def toy_texts(count: int = 160) -> list[tuple[str, str]]:
    """Distinct texts of 3 to 12 words; one in four holds the word joy, the others rain: so is the label."""
    draw = random.Random(0)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = ("good", "joy") if len(rows) % 4 == 0 else ("bad", "rain")
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 11))]
        words.insert(draw.randrange(len(words) + 1), label[1])
        rows[" ".join(words)] = label[0]
    return list(rows.items())


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.tsv"
    path.write_text("\n".join(["text\tlabel", *(f"{text}\t{label}" for text, label in toy_texts())]))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([text for text, _ in toy_texts()] * 3, 200)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> dict[str, Path]:
    """A random GPT and a random BERT."""
    folders = {}
    for model, config in ((GPT, GPTConfig), (BERT, BERTConfig)):
        torch.manual_seed(0)
        folder = folders[config.model_type] = tmp_path_factory.mktemp("base")
        model(config.preset("tiny", vocab_size=tokenizer.vocab_size)).save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
    return folders


def make_task(data: Path, tokenizer, context: int = 64, **options) -> Classify:
    return Classify(ClassifyOptions(**options), data, context, 1, tokenizer)


def run_config(toy: Path, base: Path, out: Path, **changes) -> FinetuneConfig:
    small = {"steps": 40, "lr": 3e-3, "eval_interval": 20, "batch_size": 16, "trained": "all", "dtype": "fp32"}
    small |= {"val_fraction": 0.2, "test_fraction": 0.2, "kernels": "reference"}
    return FinetuneConfig.of(task="classify", data=toy, out=out, model=str(base), **(small | changes))


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_a_run_learns_to_tell_texts_apart(kind: str, toy: Path, base: dict[str, Path], tmp_path: Path, no_peak: None):
    out = tmp_path / "run"
    result = train(run_config(toy, base[kind], out), progress=False)
    assert result.values["accuracy"] == 1.0
    assert result.val_loss_full < 0.1 < result.baseline
    assert result.baseline == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=0.01)
    assert records(out, "val_accuracy")[-1] == records(out, "val_accuracy_full")[-1] == 1.0
    found = report_run(out, kernels="reference", progress=False)
    assert (found["accuracy"], found["balanced_accuracy"], found["mistakes"]) == (1.0, 1.0, [])
    assert found["confusion"] == [[24, 0], [0, 8]]  # a fifth of 160 texts, in the proportions of the classes
    assert json.loads((out / "test.json").read_text()) == found
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    # The test's texts had no part in training: they are neither in its rows nor in the evaluation's.
    task = make_task(toy, get_tokenizer(out), val_fraction=0.2, test_fraction=0.2)
    assert not {*task.split.test} & {*task.split.train, *task.split.val}
    model = from_pretrained(out, kernels="reference")
    assert isinstance(model, Classifier)
    assert model.config.labels == ("bad", "good")


def test_reports_of_other_runs_are_refused(tmp_path: Path):
    for values, match in (
        ("task: language_model", "of the task language_model; accepted is a run of classify"),
        ("task: classify\ntest_fraction: 0.0", "with test_fraction 0; accepted is a run that holds out texts"),
    ):
        (tmp_path / "config.yaml").write_text(values)
        with pytest.raises(ValueError, match=match):
            report_run(tmp_path)


def test_batches_hold_texts_with_their_labels(toy: Path, tokenizer):
    """An epoch has each training text once, padded on the right to the longest of its batch."""
    task = make_task(toy, tokenizer)
    label_of = dict(toy_texts())
    assert task.rows == len(task.split.train) == 128
    seen = []
    for index in range(8):
        batch = task.batch(16, torch.Generator(), ALL, index)
        assert batch.tokens.shape == (16, int(batch.lengths.max()))
        for row, length, target in zip(batch.tokens.tolist(), batch.lengths.tolist(), batch.targets.tolist()):
            text = tokenizer.decode(row[1 : length - 1])
            assert row == [*tokenizer.encode_prompt(text), *[0] * (len(row) - length)]
            assert task.classes[target] == label_of[text]
            seen.append(text)
    assert sorted(seen) == sorted(task.texts[i] for i in task.split.train)
    parts = [task.batch(16, torch.Generator(), slice(start, start + 8), 3) for start in (0, 8)]  # of two processes
    whole = task.batch(16, torch.Generator(), ALL, 3)
    for part, all_rows in zip(zip(*parts), whole):  # of one shape, too: the trainer scales their gradients by it
        assert torch.equal(torch.cat(part), all_rows)


def test_evaluation_takes_all_validation_texts_or_some(toy: Path, tokenizer):
    task = make_task(toy, tokenizer, val_fraction=0.2)
    assert sum(len(batch.targets) for batch in task.evaluation(5, None)) == len(task.split.val) == 32
    assert [batch.shape[0] for batch in task.evaluation(5, 12)] == [5, 5, 2]
    assert [batch.tokens.tolist() for batch in task.evaluation(5, 12)] == [
        batch.tokens.tolist() for batch in task.evaluation(5, 12)
    ]


def test_long_texts_are_cut_with_a_count(tmp_path: Path, tokenizer):
    """A cut text keeps the tokens around it, and the beginning."""
    rows = [("red " * 30, "x"), ("red blue", "x"), ("blue " * 8, "x"), *((f"tree {word}", "y") for word in WORDS)]
    path = tmp_path / "long.csv"
    path.write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]))
    task = make_task(path, tokenizer, context=8, val_fraction=0.2, test_fraction=0.2)
    read = [task.texts[i] for i in (*task.split.train, *task.split.val)]
    count = sum(len(text.split()) > 6 for text in read)
    assert f"         {count} texts of training and validation are cut to the context, 8 tokens" in task.remarks
    cls, sep = tokenizer.special_id("cls_token"), tokenizer.special_id("sep_token")
    (long, short), cut = encode_texts(tokenizer, ["red " * 30, "red blue"], 8)
    assert long == [cls, *tokenizer.encode("red " * 6), sep]
    assert short == tokenizer.encode_prompt("red blue")
    assert cut == 1
    with pytest.raises(ValueError, match="context: got 2; accepted are 3 and more"):
        encode_texts(tokenizer, ["red"], 2)


def test_repeated_rows_are_told(tmp_path: Path, tokenizer):
    path = tmp_path / "again.csv"
    rows = [*toy_texts(40), *toy_texts(40)[:3], (toy_texts(40)[1][0], "good")]
    path.write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows)]))
    remarks = make_task(path, tokenizer).remarks
    assert remarks[0] == "data     40 texts: bad 30, good 10; 32 for training, 4 for validation, 4 for the test"
    assert remarks[1] == "         3 rows repeat an earlier one and are left out"
    assert remarks[2] == "         1 rows give an earlier row's text another label and are left out"


def test_balanced_sampling_draws_the_classes_equally(toy: Path, tokenizer):
    task = make_task(toy, tokenizer, balance="sampling")
    large = sum(task.targets[i] == 0 for i in task.split.train)
    assert task.rows == 2 * large
    batches = [task.batch(task.rows // 8, torch.Generator(), ALL, index) for index in range(8)]
    assert Counter(torch.cat([batch.targets for batch in batches]).tolist()) == {0: large, 1: large}
    texts = Counter(tuple(row[row != 0].tolist()) for batch in batches for row in batch.tokens)
    assert set(texts.values()) == {1, 3}  # a text of the small class comes three times, the others once
    assert len(next(task.evaluation(100, None)).targets) == len(task.split.val)  # which stays as it is


def test_class_weights_make_the_classes_count_equally(toy: Path, tokenizer, base: dict[str, Path]):
    """The loss is the mean over the classes of each class's mean loss, when a batch has the data's proportions."""
    plain, weighted = (make_task(toy, tokenizer, balance=balance) for balance in ("none", "weights"))
    assert plain.digest != weighted.digest
    torch.manual_seed(0)
    model = plain.build(from_pretrained(base["gpt"], kernels="reference"))
    torch.nn.init.normal_(model.head_parameters()[0])
    batch = plain.batch(plain.rows or 0, torch.Generator(), ALL, 0)
    losses = model(batch.tokens, lengths=batch.lengths, targets=batch.targets, reduction="none")
    total, count = weighted.loss(model, batch)
    expected = torch.stack([losses[batch.targets == c].mean() for c in (0, 1)]).mean()
    torch.testing.assert_close(total / count, expected)
    total, count = plain.loss(model, batch)
    torch.testing.assert_close(total / count, losses.mean())
    for task in (plain, weighted):  # evaluation counts each text once, to be compared with the class frequencies
        measured = task.evaluate(model, batch)
        torch.testing.assert_close(measured["loss"][0] / measured["loss"][1], losses.mean())
        right = (model(batch.tokens, lengths=batch.lengths).argmax(1) == batch.targets).float()
        torch.testing.assert_close(measured["accuracy"][0] / measured["accuracy"][1], right.mean())


def test_a_classifier_is_trained_further_with_the_same_labels_only(toy: Path, tokenizer, base: dict[str, Path]):
    task = make_task(toy, tokenizer)
    model = task.build(from_pretrained(base["bert"]))
    assert task.build(model) is model
    other = Classifier.around(BERT.from_pretrained(base["bert"]), ["bad", "ugly"])
    with pytest.raises(
        ValueError, match=r"data: has the labels bad, good; accepted are those of the base, .*: bad, ugly"
    ):
        task.build(other)
    small = GPT(GPTConfig.preset("tiny", vocab_size=9))
    with pytest.raises(ValueError, match=r"tokenizer: gives the id \d+; accepted are those of the base, 0 to 8"):
        task.build(small)
    with pytest.raises(ValueError, match="balance: got 'all'; accepted are none, weights, sampling"):
        ClassifyOptions(balance="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task: got classify for a new model; accepted is one to fine-tune"):
        make_task(toy, None)


@pytest.mark.parametrize("trained", ["head", "last-block", "lora"])
def test_only_what_is_chosen_is_trained(trained: str, toy: Path, base: dict[str, Path], tmp_path: Path, no_peak: None):
    """The head always is; the embeddings and the first block are not."""
    out = tmp_path / "run"
    config = run_config(toy, base["gpt"], out, trained=trained, steps=3)
    train(config, progress=False)
    before, after = GPT.from_pretrained(base["gpt"]).state_dict(), from_pretrained(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[f"backbone.{name}"])}
    first = {name for name in before if name.startswith("h.0.")}
    assert "wte.weight" not in changed
    if trained == "head":
        assert not changed
    if trained == "last-block":
        assert changed >= {"h.1.mlp.c_fc.weight", "ln_f.weight"}
        assert not changed & first
    if trained == "lora" and changed:  # merged when it is loaded
        assert changed & first <= {
            f"h.0.{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
    tokenizer = get_tokenizer(out)
    heads = [Classifier.from_pretrained(out).score.weight]
    torch.manual_seed(config.seed)
    heads.append(make_task(toy, tokenizer).build(GPT.from_pretrained(base["gpt"])).score.weight)  # type: ignore[union-attr]
    assert not torch.equal(*heads)


def test_figures_by_hand(tmp_path: Path):
    """Of three b's two are right and one is taken for a; of two a's one is right; c has one text and is missed."""
    targets = [1, 1, 1, 0, 0, 2]
    found = [1, 1, 0, 0, 1, 0]
    chances = torch.full((6, 3), 0.1)
    chances[range(6), found] = 0.8
    texts = [f"text {i}" for i in range(6)]
    result = figures(["a", "b", "c"], texts, targets, chances)
    assert result["confusion"] == [[1, 1, 0], [1, 2, 0], [1, 0, 0]]
    assert result["accuracy"] == pytest.approx(3 / 6)
    assert result["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert result["loss"] == pytest.approx(-(3 * math.log(0.8) + 3 * math.log(0.1)) / 6)
    assert result["most_frequent"] == {"label": "b", "accuracy": 0.5}
    rows = [(one["label"], one["texts"], one["precision"], one["recall"], one["f1"]) for one in result["classes"]]
    expected = [("a", 2, 1 / 3, 1 / 2, 0.4), ("b", 3, 2 / 3, 2 / 3, 2 / 3), ("c", 1, 0, 0, 0)]
    for row, wanted in zip(rows, expected):
        assert row == (*wanted[:2], *(pytest.approx(value) for value in wanted[2:]))
    assert [one["text"] for one in result["mistakes"]] == ["text 2", "text 4", "text 5"]
    assert result["mistakes"][2] == {
        "text": "text 5", "label": "c", "taken_for": "a", "probability": pytest.approx(0.8)
    }  # fmt: skip
    table = figures_table(result, mistakes=1).splitlines()
    assert table[2].split() == ["b", "3", "66.7%", "66.7%", "66.7%"]
    assert table[4] == "6 texts: accuracy 50.0%, balanced accuracy 38.9%, loss 1.263 nats; always 'b' is right in 50.0%"
    assert table[5] == "mistake: b taken for a (80%): text 2"
    draw_confusion(result, tmp_path / "confusion.png")
    missing = figures(["a", "b", "c"], texts[:5], targets[:5], chances[:5])  # no text of class c
    assert missing["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_predictions_do_not_depend_on_the_batch(tokenizer, base: dict[str, Path]):
    torch.manual_seed(0)
    model = Classifier.around(GPT.from_pretrained(base["gpt"], kernels="reference", dropout=0.5), ["no", "yes"]).train()
    torch.nn.init.normal_(model.score.weight)
    texts = [text for text, _ in toy_texts(9)] + ["red " * 100]
    together = predict(model, tokenizer, texts, batch_size=4)
    alone = torch.cat([predict(model, tokenizer, [text]).probabilities for text in texts])
    torch.testing.assert_close(together.probabilities, alone)
    torch.testing.assert_close(together.probabilities.sum(1), torch.ones(10))
    assert together.cut == 1
    assert model.training


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_the_command_line(
    toy: Path, base: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, no_peak: None
):
    """Fine-tunes, shows the test's figures, and labels texts from arguments and files."""
    out = tmp_path / "run"
    options = dataclasses.asdict(run_config(toy, base["gpt"], out))
    flags = [
        f"--{name.replace('_', '-')}={options[name]}" for name in ("lr", "steps", "batch_size", "trained", "kernels")
    ]
    flags += ["--test-fraction", "0.2", "--eval-interval", "40", "--no-tune-allocator"]
    assert (
        run_cli("finetune", "classify", "--data", str(toy), "--model", str(base["gpt"]), "--out", str(out), *flags) == 0
    )
    shown = capsys.readouterr().out
    assert "data     160 texts: bad 120, good 40; 112 for training, 16 for validation, 32 for the test" in shown
    assert "32 texts: accuracy 100.0%, balanced accuracy 100.0%" in shown
    loading = ["classify", "--model", str(out), "--kernels", "reference", "--no-tune-allocator"]
    assert run_cli(*loading, "joy red", "blue rain\nred") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["good", "bad"]
    assert lines[1].endswith("  blue rain red")
    (tmp_path / "texts.txt").write_text("rain tree\nstone joy\n")
    (tmp_path / "texts.csv").write_text('id,body\n1,"rain tree"\n2,"stone, joy"\n')
    labelled = tmp_path / "labelled.csv"
    assert run_cli(*loading, "--file", str(tmp_path / "texts.txt"), "--out", str(labelled)) == 0
    rows = list(csv.DictReader(labelled.open()))
    assert [(row["text"], row["label"]) for row in rows] == [("rain tree", "bad"), ("stone joy", "good")]
    assert float(rows[0]["probability of bad"]) + float(rows[0]["probability of good"]) == pytest.approx(1, abs=1e-5)
    assert rows[1]["probability"] == rows[1]["probability of good"]
    labelled = tmp_path / "labelled.jsonl"
    table = ["--file", str(tmp_path / "texts.csv"), "--text-column", "body"]
    assert run_cli(*loading, *table, "--out", str(labelled)) == 0
    found = [json.loads(line) for line in labelled.read_text().splitlines()]
    assert [(row["text"], row["label"]) for row in found] == [("rain tree", "bad"), ("stone, joy", "good")]
    assert found[0]["probabilities"]["bad"] == found[0]["probability"] > 0.5
    capsys.readouterr()
    (tmp_path / "empty.txt").write_text("rain\n\njoy\n")
    for wrong, message in (
        (["joy", "--file", str(toy)], "texts: got both texts and a file; accepted is one"),
        ([], "texts: got neither texts nor a file; accepted is one"),
        ([" "], "texts: got ' '; accepted are texts that are not empty"),
        (["--file", str(tmp_path / "empty.txt")], "line 2: is empty; accepted is a text in each line"),
        (["joy", "--out", str(tmp_path / "out.txt")], "accepted are names that end with .csv or .jsonl"),
        (["joy", "--batch-size", "0"], "batch_size: got 0; accepted are positive integers"),
        (["joy", "--model", str(base["gpt"])], "describes a gpt; accepted is a classifier"),
    ):
        assert run_cli(*loading, *wrong) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"label_column": "labels"}, r"toy\.tsv, line 2: has no column 'labels'; its columns are 'text', 'label'"),
        ({"data": Path("missing.csv")}, r"data: there is no file missing\.csv"),
        ({"val_fraction": 1.0}, r"val_fraction: got 1\.0; accepted is 0 < val_fraction < 1"),
    ],
)
def test_errors_come_before_anything_is_written(
    changes: dict, match: str, toy: Path, base: dict[str, Path], tmp_path: Path
):
    values = {"task": "classify", "data": toy, "out": tmp_path / "run", "model": str(base["gpt"])}
    config = FinetuneConfig.of(**(values | changes))
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        train(config, progress=False)
    assert not list(tmp_path.rglob("*.*"))
