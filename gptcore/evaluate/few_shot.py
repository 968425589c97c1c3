"""Zero-, one- and few-shot evaluation: how well a model answers questions after none, one or some examples in its prompt.

The model is not trained on the task. Whatever it can do, next-word prediction has taught it (Brown et al., "Language Models
are Few-Shot Learners", arXiv 2005.14165).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gptcore.generate import Request, Score, encode_pair, generate_text, log_likelihoods

if TYPE_CHECKING:
    from gptcore.models import GPT
    from gptcore.text import PretrainedTokenizer, Tokenizer

Metric = Literal["candidates", "exact"]
"""How an answer is judged. "candidates": right if the right candidate is the likeliest. "exact": right if the text that the
model generates is the answer."""

_DRAWS = 2000
"""Bootstrap samples of an interval."""
_GENERATION_BATCH = 32
"""Questions whose answers are generated together."""


class PromptTooLongError(ValueError):
    """No question of a task fits into the model's context with its examples."""


@dataclass(frozen=True)
class Question:
    """A question of a task."""

    text: str
    """What stands in the prompt in place of ``{question}``."""
    answer: str
    candidates: tuple[str, ...] = ()
    """Answers to choose from, with the right one; none for a question whose answer can only be generated."""


@dataclass(frozen=True)
class FewShotTask:
    """Questions of one kind, and how to ask them."""

    name: str
    about: str
    """A line for people."""
    prompt: str
    """The text of a question, with ``{question}`` in it. A space and the answer follow."""
    questions: tuple[Question, ...]
    metric: Metric
    separator: str = "\n\n"
    """Stands between two examples, and between the last example and the question."""

    def text_of(self, question: Question, examples: Sequence[Question] = ()) -> str:
        """Returns the prompt that asks a question after these examples, up to the answer, without the space before it."""
        parts = [f"{self.prompt.replace('{question}', shown.text)} {shown.answer}" for shown in examples]
        return self.separator.join([*parts, self.prompt.replace("{question}", question.text)])


@dataclass(frozen=True)
class Answer:
    """What a model answered to a question."""

    question: str
    answer: str
    """The right answer."""
    given: str
    """The candidate that the model finds likeliest, or the text that it generated."""
    right: bool


@dataclass(frozen=True)
class Result:
    """The accuracy of a model in a task, after one number of examples."""

    task: str
    shots: int
    metric: Metric
    normalised: bool
    """Whether log-likelihoods were divided by the number of tokens."""
    seeds: tuple[int, ...]
    """The seeds that chose the examples. Without examples there is nothing to choose, and one run."""
    questions: int
    too_long: int
    """Questions that did not fit into the model's context with their examples. They do not count."""
    accuracy: float
    """The share of right answers, the mean over the seeds."""
    low: float
    high: float
    """The bounds of the 95 % interval; see `bootstrap_interval`."""
    chance: float
    """The accuracy of a guess."""
    seed_accuracy: tuple[float, ...]
    """The accuracy with each seed."""
    seconds: float
    answers: tuple[tuple[Answer, ...], ...]
    """For each seed the answer to each question."""


def evaluate(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    task: FewShotTask,
    shots: int,
    *,
    seeds: int = 3,
    limit: int | None = None,
    metric: Metric | None = None,
    normalise: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> Result:
    """Returns a model's accuracy in a task.

    The same questions are asked whatever the number of examples, the seed and the model. The examples of a seed are the same
    for all questions, except that a question is never among its own examples. They come from the questions that are not
    asked as far as there are any.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        tokenizer: the model's tokenizer.
        task: the questions.
        shots: the number of examples in a prompt.
        seeds: how many choices of examples are tried: those of the seeds 0, 1, ...
        limit: the most questions to ask, chosen at random and always the same; None: all.
        metric: "candidates" or "exact" instead of the task's own.
        normalise: compare the candidates' log-likelihoods divided by their numbers of tokens, which does not favour short
            candidates.
        advance: called with the number of answers that were added, for a progress bar; see `count_answers`.

    Raises:
        ValueError: numbers out of range, or "candidates" for a task without any.
        PromptTooLongError: no question fits into the model's context.
    """
    metric = metric or task.metric
    check(task, shots, seeds=seeds, limit=limit, metric=metric, normalise=normalise)
    began = time.monotonic()
    asked, others = _asked(task, limit)
    used = tuple(range(seeds if shots else 1))
    texts = [[task.text_of(q, chosen) for q, chosen in zip(asked, _examples(asked, others, shots, s))] for s in used]
    room = model.config.context
    if metric == "exact":
        most = max(len(encode_pair(tokenizer, task.text_of(q), f" {q.answer}")[1]) for q in asked)
        room -= (new := most + 2)  # room to go on after an answer, which makes it wrong
        lengths = [[len(tokenizer.encode_prompt(text)) for text in row] for row in texts]
        requests = []
    else:
        new = 0
        requests = [[_request(tokenizer, text, q) for text, q in zip(row, asked)] for row in texts]
        lengths = [[request.longest for request in row] for row in requests]
    fitting = [i for i in range(len(asked)) if all(row[i] <= room for row in lengths)]
    if not fitting:
        shortest = min(min(row) for row in lengths)
        raise PromptTooLongError(
            f"shots: got {shots}, with which the shortest prompt of {task.name} has {shortest} tokens; accepted are up to "
            f"{room}, the model's context{' less the longest answer' if new else ''}"
        )
    advance((len(asked) - len(fitting)) * len(used))
    kept = [asked[i] for i in fitting]
    answers = []
    for s in used:
        if metric == "exact":
            given = _generated(model, tokenizer, [texts[s][i] for i in fitting], new, advance)
            right = [_same(text, question.answer) for text, question in zip(given, kept)]
        else:
            scored = log_likelihoods(model, [requests[s][i] for i in fitting], advance=advance)
            given = [_likeliest(q.candidates, scores, normalise) for q, scores in zip(kept, scored)]
            right = [text == question.answer for text, question in zip(given, kept)]
        answers.append(tuple(Answer(q.text, q.answer, text, ok) for q, text, ok in zip(kept, given, right)))
    correct = np.array([[answer.right for answer in row] for row in answers])
    low, high = bootstrap_interval(correct)
    chance = float(np.mean([1 / len(q.candidates) for q in kept])) if metric == "candidates" else 0.0
    return Result(
        task=task.name, shots=shots, metric=metric, normalised=normalise, seeds=used, questions=len(kept),
        too_long=len(asked) - len(kept), accuracy=float(correct.mean()), low=low, high=high, chance=chance,
        seed_accuracy=tuple(correct.mean(1).tolist()), seconds=time.monotonic() - began, answers=tuple(answers),
    )  # fmt: skip


def check(
    task: FewShotTask, shots: int, *, seeds: int, limit: int | None, metric: Metric | None, normalise: bool
) -> None:
    """Raises ValueError for a number out of range, or a metric that does not fit the task."""
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}; accepted are 1 and more")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}; accepted are 1 and more")
    different = len({question.text for question in task.questions})
    if not 0 <= shots < different:
        raise ValueError(
            f"shots: got {shots}; accepted are 0 to {different - 1}, one less than the different questions of {task.name}"
        )
    metric = metric or task.metric
    if metric == "candidates" and not all(question.candidates for question in task.questions):
        raise ValueError(f'metric: got "candidates" for {task.name}, which has none; accepted is "exact"')
    if normalise and metric == "exact":
        raise ValueError(f'normalise: got it for {task.name}, whose answers are generated; accepted with "candidates"')


def count_answers(task: FewShotTask, shots: int, *, seeds: int, limit: int | None) -> int:
    """The number of answers that `evaluate` will ask for."""
    return min(len(task.questions), limit or len(task.questions)) * (seeds if shots else 1)


def bootstrap_interval(correct: NDArray[np.bool_], draws: int = _DRAWS, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of `correct` ``(seeds, questions)``.

    Each draw takes as many questions, and as many seeds, as there are, each with replacement. The bounds are the 2.5th and
    97.5th percentiles of the draws' means. So the interval covers that other questions might have been asked, and other
    examples shown.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979; of rows and columns at once: Owen, "The
    pigeonhole bootstrap", arXiv 0712.1111.
    """
    seeds, questions = correct.shape
    generator = np.random.default_rng(seed)
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)  # (draws, seeds)
    question_counts = generator.multinomial(questions, np.full(questions, 1 / questions), size=draws)
    means = ((seed_counts @ correct) * question_counts).sum(1) / (seeds * questions)  # (draws,)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _asked(task: FewShotTask, limit: int | None) -> tuple[list[Question], list[Question]]:
    """The questions to ask, and the others."""
    questions = list(task.questions)
    random.Random(0).shuffle(questions)
    count = len(questions) if limit is None else limit
    return questions[:count], questions[count:]


def _examples(asked: list[Question], others: list[Question], shots: int, seed: int) -> list[list[Question]]:
    """The examples for each question that is asked.

    Where all questions have the same candidates, as in a classification, the examples show each of them equally often:
    a model tends to repeat the answer that its prompt has most of (Zhao et al., "Calibrate Before Use", arXiv 2102.09690).
    """
    generator = random.Random(seed)
    pool = [*generator.sample(others, len(others)), *generator.sample(asked, len(asked))]
    if len({question.candidates for question in pool}) == 1 and pool[0].candidates:
        labels = generator.sample(pool[0].candidates, len(pool[0].candidates))
        each = [[question for question in pool if question.answer == label] for label in labels]
        pool = [question for turn in zip_longest(*each) for question in turn if question is not None]
    chosen: dict[str, Question] = {}  # by text: a list may hold a question twice
    for question in pool:
        if len(chosen) > shots:
            break
        chosen.setdefault(question.text, question)
    return [[shown for text, shown in chosen.items() if text != question.text][:shots] for question in asked]


def _request(tokenizer: Tokenizer | PretrainedTokenizer, text: str, question: Question) -> Request:
    pairs = [encode_pair(tokenizer, text, f" {candidate}") for candidate in question.candidates]
    return Request(pairs[0][0], [candidate for _, candidate in pairs])


def _likeliest(candidates: Sequence[str], scores: Sequence[Score], normalise: bool) -> str:
    values = [score.log_likelihood / (score.tokens if normalise else 1) for score in scores]
    return candidates[values.index(max(values))]


def _generated(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    texts: list[str],
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> list[str]:
    """What greedy decoding adds to each text before the end of the line, without spaces around it."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # texts of similar length together: less padding
    given = [""] * len(texts)
    for start in range(0, len(order), _GENERATION_BATCH):
        batch = order[start : start + _GENERATION_BATCH]
        found = generate_text(model, tokenizer, [texts[i] for i in batch], max_new_tokens, stop=["\n"], temperature=0.0)
        for i, text in zip(batch, found):
            given[i] = text.strip()
        advance(len(batch))
    return given


def _same(given: str, answer: str) -> bool:
    """Upper and lower case, and a full stop at the end, make no difference."""
    return given.removesuffix(".").casefold() == answer.removesuffix(".").casefold()
