"""What few-shot evaluation found: a table, a JSON file and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore._files import atomic_writer, save_figure
from gptcore.evaluate.few_shot import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from gptcore.models import GPT


@dataclass(frozen=True)
class Finding:
    """A result with the model that it belongs to."""

    model: str
    kernels: str
    dtype: str
    device: str
    result: Result


def describe_run(model: GPT) -> dict[str, str]:
    """Returns the fields `kernels`, `dtype` and `device` of a finding: how a model ran."""
    import gptkernels

    weight = next(model.parameters())
    kernels: str = model.config.kernels
    if kernels == "auto":  # what it chose for most of the work
        rows = [row for row in gptkernels.report().rows if row.device.split(":")[0] == weight.device.type]
        kernels = next((f"auto ({row.auto})" for row in rows if row.op == "attention"), kernels)
    return {"kernels": kernels, "dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type}


def table(findings: Sequence[Finding]) -> Table:
    """Returns a table for the screen, a line for each result."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    several = len({finding.model for finding in findings}) > 1
    for name in ("task", *(["model"] if several else []), "examples"):
        made.add_column(name, justify="right" if name == "examples" else "left")
    for name in ("accuracy", "95 % interval", "chance", "questions", "seeds", "seconds"):
        made.add_column(name, justify="right")
    for finding in findings:
        r = finding.result
        questions = f"{r.questions} ({r.too_long} more were too long)" if r.too_long else f"{r.questions}"
        made.add_row(
            r.task, *([finding.model] if several else []), f"{r.shots}", f"{r.accuracy:.1%}",
            f"{r.low:.1%} to {r.high:.1%}", f"{r.chance:.1%}", questions, f"{len(r.seeds)}", f"{r.seconds:.1f}",
        )  # fmt: skip
    return made


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """Writes every figure with all that it depends on: model, kernels, task, examples, seeds, questions."""
    records: list[dict[str, Any]] = []
    for finding in findings:
        record = {k: v for k, v in dataclasses.asdict(finding).items() if k != "result"}
        result = dataclasses.asdict(finding.result)
        del result["answers"]
        records.append(record | result)
    with atomic_writer(path) as file:
        file.write(json.dumps({"results": records}, indent=1, ensure_ascii=False).encode() + b"\n")


def write_answers(findings: Sequence[Finding], path: Path) -> None:
    """Writes what was answered, a line of JSON for each question, number of examples, seed and model."""
    with atomic_writer(path) as file:
        for finding in findings:
            result = finding.result
            for seed, answers in zip(result.seeds, result.answers):
                common = {"model": finding.model, "task": result.task, "shots": result.shots, "seed": seed}
                for answer in answers:
                    line = json.dumps(common | dataclasses.asdict(answer), ensure_ascii=False)
                    file.write(line.encode() + b"\n")


def draw(findings: Sequence[Finding], path: Path) -> None:
    """Draws accuracy by number of examples: a panel for each task, a line for each model, with intervals and chance.

    Args:
        findings: the results.
        path: a PNG; it appears complete or not at all.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(finding.result.task for finding in findings))
    models = list(dict.fromkeys(finding.model for finding in findings))
    shots = sorted({finding.result.shots for finding in findings})
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.6 * rows + 0.8), layout="constrained")
    panels: list[Axes] = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    place = {count: i for i, count in enumerate(shots)}  # evenly spaced: 0, 1, 5, 20 are no linear scale
    for panel, task in zip(panels, tasks):
        here = [finding for finding in findings if finding.result.task == task]
        for number, model in enumerate(models):
            results = sorted((f.result for f in here if f.model == model), key=lambda r: r.shots)
            if not results:
                continue
            shift = 0.06 * (number - (len(models) - 1) / 2)  # the intervals of two models stay apart
            x = [place[r.shots] + shift for r in results]
            errors = [[r.accuracy - r.low for r in results], [r.high - r.accuracy for r in results]]
            y = [r.accuracy for r in results]
            panel.errorbar(x, y, yerr=errors, color=f"C{number}", marker="o", capsize=3, label=model)
        chance = sum(f.result.chance for f in here) / len(here)
        panel.axhline(chance, color="0.5", linestyle="--", linewidth=1, label="chance")
        metric = {"candidates": "choice", "exact": "generated"}[here[0].result.metric]
        panel.set_title(f"{task} ({metric})", fontsize=9)
        panel.set_xticks(range(len(shots)), [str(count) for count in shots])
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
        panel.tick_params(labelbottom=True)
    figure.supxlabel("examples in the prompt", fontsize=9)
    figure.supylabel("accuracy, with the 95 % interval", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), fontsize=8)
    save_figure(figure, path)
