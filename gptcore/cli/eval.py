"""``gptcore eval``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import UseAppendAction

from gptcore.cli._options import Loading

if TYPE_CHECKING:
    from gptcore.evaluate.few_shot import FewShotTask
    from gptcore.evaluate.few_shot_report import Finding


@dataclass(frozen=True, kw_only=True)
class Eval(Loading):
    """Ask a model questions, after no example, one, or some.

    It shows what the model can do without training for it.

    The examples stand in the prompt, before the question. An answer is right if the model finds it likelier than the other
    candidates, or, in tasks without candidates, if it generates it. The interval says how far the accuracy could lie from the
    one shown if other questions were asked and other examples chosen.

    A task of your own is a file with an object on each line:
      {"question": "What does a cow drink?", "answer": "water", "candidates": ["water", "milk", "tea"]}

    Without candidates the answer is generated.

    For example:
      gptcore eval --list
      gptcore fetch country-capitals && gptcore eval --model smollm2-135m-instruct --task capitals --limit 100
      gptcore eval --model smollm2-135m-instruct --model runs/demo --task arithmetic --shots 0,1,5,20 --out few-shot
      gptcore eval --model runs/demo --task questions.jsonl --shots 0,3 --normalise
    """

    model: UseAppendAction[tuple[str, ...]] = ()  # pyright: ignore[reportIncompatibleVariableOverride]
    """What gptcore generate --model takes; repeat it to compare several."""
    tasks: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="task")] = ()
    """A built-in task or a JSON Lines file; repeat it for several."""
    shots: str = "0,1,5"
    """Numbers of examples, with commas between them."""
    seeds: int = 3
    """How many choices of examples to try for each number; the accuracy is their mean."""
    limit: int | None = 100
    """The most questions to ask, chosen at random and always the same; None for all."""
    metric: Literal["task", "candidates", "exact"] = "task"
    """candidates: the right one must be the likeliest. exact: the generated text must be the answer, up to the end of its line,
    case and a full stop. task: what the task itself names."""
    normalise: bool = False
    """Divide each candidate's log-likelihood by its number of tokens: long candidates are then not at a disadvantage."""
    out: Path | None = None
    """Folder for results.json (every figure), answers.jsonl (every answer) and accuracy.png; nothing is written if left out."""
    plot: Path | None = None
    """File for the plot of accuracy by number of examples, .png or .svg; accuracy.png in the folder out if left out."""
    list: bool = False
    """List the built-in tasks."""

    def run(self) -> int:
        from rich.console import Console

        from gptcore.evaluate import few_shot_report as report
        from gptcore.evaluate.few_shot import check
        from gptcore.evaluate.few_shot_tasks import load_task, task_list

        if self.list:
            print(task_list())
            return 0
        # Everything that can be wrong with the options is found before a model is loaded.
        for name, chosen in (("model", self.model), ("task", self.tasks)):
            if not chosen or len(set(chosen)) < len(chosen):
                problem = f"{max(chosen, key=chosen.count)} twice" if chosen else "none"
                raise ValueError(f"{name}: got {problem}; accepted are one or more, all different")
        if self.adapter is not None and len(self.model) > 1:
            raise ValueError(
                "adapter: got one with several models; accepted is one with one model (a run loads its own)"
            )
        shots = _numbers(self.shots)
        metric = None if self.metric == "task" else self.metric
        tasks = [load_task(name) for name in self.tasks]
        if len({task.name for task in tasks}) < len(tasks):
            raise ValueError("task: got two files of the same name; accepted are different names")
        for task in tasks:
            for count in shots:
                check(task, count, seeds=self.seeds, limit=self.limit, metric=metric, normalise=self.normalise)
        plot = self.plot or (self.out / "accuracy.png" if self.out else None)
        if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"plot: got {plot}; accepted is a .png or .svg file")
        for folder in (self.out, plot.parent if plot else None):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        findings = []
        for name in self.model:
            findings += self._measure(name, tasks, shots)
        if not findings:
            raise ValueError(
                f"shots: got {self.shots}; accepted are numbers with which a question fits into the context"
            )
        console, table = Console(), report.table(findings)
        if not console.is_terminal:  # a file or a pipe has no width
            console.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.print(table)
        if self.out is not None:
            report.write_json(findings, self.out / "results.json")
            report.write_answers(findings, self.out / "answers.jsonl")
            print(f"{self.out}: results.json, answers.jsonl")
        if plot is not None:
            report.draw(findings, plot)
            print(f"{plot}: accuracy by number of examples")
        return 0

    def _measure(self, name: str, tasks: Sequence[FewShotTask], shots: Sequence[int]) -> Iterator[Finding]:
        """Yields what one model reaches in each task with each number of examples."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from gptcore.evaluate.few_shot import PromptTooLongError, count_answers, evaluate
        from gptcore.evaluate.few_shot_report import Finding, describe_run
        from gptcore.models import GPT

        options = {"seeds": self.seeds, "limit": self.limit}
        model, tokenizer = dataclasses.replace(self, model=name).load(GPT)
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            total = sum(count_answers(task, count, **options) for task in tasks for count in shots)
            bar = progress.add_task(name, total=total)
            for task in tasks:
                for count in shots:
                    progress.update(bar, description=f"{name}, {task.name}, {count} examples")
                    try:
                        result = evaluate(
                            model, tokenizer, task, count, metric=None if self.metric == "task" else self.metric,
                            normalise=self.normalise, advance=lambda answers: progress.advance(bar, answers), **options,
                        )  # fmt: skip
                    except PromptTooLongError as error:  # the model's other results are not lost
                        progress.advance(bar, count_answers(task, count, **options))
                        print(f"gptcore: warning: {name}, {task.name}: left out: {error}", file=sys.stderr)
                        continue
                    yield Finding(name, **describe_run(model), result=result)


def _numbers(text: str) -> list[int]:
    """The numbers in a list such as "0,1,5", in order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"shots: got {text!r}; accepted are numbers from 0 with commas between them, such as 0,1,5")
    return sorted({int(part) for part in parts})
