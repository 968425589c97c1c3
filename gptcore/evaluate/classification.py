"""Evaluates a classifier: the probabilities of texts, and figures, table and picture of a test."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gptcore import _extras
from gptcore._files import atomic_writer, save_figure
from gptcore.generate import pad_right
from gptcore.models import Classifier
from gptcore.nn.mode import evaluation_mode
from gptcore.tasks import Classify, ClassifyOptions
from gptcore.tasks.classify import encode_texts
from gptcore.text import get_tokenizer

if TYPE_CHECKING:
    from gptcore.text import PretrainedTokenizer, Tokenizer

FIGURES = "test.json"
PICTURE = "confusion.png"
_MAX_NUMBERS = 20
"""The picture of a confusion matrix of more classes has no numbers in its cells: they would not fit."""


class Predictions(NamedTuple):
    """What a classifier says of some texts."""

    probabilities: Tensor
    """``(N, classes)`` float32 on the CPU, in the order of the texts."""
    cut: int
    """Texts that are longer than the context: the model read their first tokens only."""

    @property
    def classes(self) -> list[int]:
        """The most probable class of each text."""
        return self.probabilities.argmax(dim=1).tolist()


@torch.no_grad()
def predict(
    model: Classifier,
    tokenizer: Tokenizer | PretrainedTokenizer,
    texts: Sequence[str],
    batch_size: int = 32,
    progress: bool = False,
) -> Predictions:
    """Returns the probability of each class for each text.

    Args:
        model: runs in evaluation mode; its mode is restored afterwards.
        tokenizer: the model's tokenizer.
        texts: one text or more.
        batch_size: number of texts that run together.
        progress: show a bar on the standard error.

    Raises:
        ValueError: no texts, or one that gives no tokens.
    """
    from rich.console import Console
    from rich.progress import track

    if not texts:
        raise ValueError("texts: got none; accepted are one or more")
    rows, cut = encode_texts(tokenizer, texts, model.config.context)
    device = next(model.parameters()).device
    probabilities = torch.empty(len(rows), len(model.config.labels))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # texts of similar length together: less padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shown = track(batches, "classify", console=Console(stderr=True), disable=not progress, transient=True)
    with evaluation_mode(model):
        for chosen in shown:
            tokens, lengths = pad_right([rows[i] for i in chosen])
            logits = model(tokens.to(device), lengths=lengths.to(device))  # (B, classes)
            probabilities[chosen] = logits.softmax(dim=1).cpu()
    return Predictions(probabilities, cut)


def report_run(run: str | Path, *, batch_size: int = 32, progress: bool = True, **loading: Any) -> dict[str, Any]:
    """Evaluates a finished run of ``gptcore finetune classify`` on its test texts, which it has not seen.

    Writes ``test.json`` with all figures and ``confusion.png`` into the run's folder.

    Args:
        run: the run's folder; the data that it was made with must still be there.
        batch_size: number of texts that run together.
        progress: show a bar on the standard error.
        loading: options of `Classifier.from_pretrained`, such as `dtype` and `kernels`; and `device`, "cpu" if left out.

    Returns:
        The figures; see `figures`.

    Raises:
        ValueError: a run of another task, or without texts for a test.
        WeightsError, FileNotFoundError: a file of the run, or its data, is missing or damaged.
    """
    import yaml

    run = Path(run).expanduser()
    values = yaml.safe_load((run / "config.yaml").read_text())
    if values.get("task") != ClassifyOptions.name:
        raise ValueError(
            f"run: got {run}, of the task {values.get('task')}; accepted is a run of {ClassifyOptions.name}"
        )
    if not values["test_fraction"]:
        raise ValueError(f"run: got {run}, with test_fraction 0; accepted is a run that holds out texts for a test")
    options = ClassifyOptions(**{field.name: values[field.name] for field in dataclasses.fields(ClassifyOptions)})
    device = loading.pop("device", "cpu")
    model = Classifier.from_pretrained(run, **loading).to(device)
    tokenizer = get_tokenizer(run)
    task = Classify(options, Path(values["data"]), model.config.context, values["seed"], tokenizer)
    texts = [task.texts[i] for i in task.split.test]
    targets = [task.targets[i] for i in task.split.test]
    found = predict(model, tokenizer, texts, batch_size, progress)
    result = figures(model.config.labels, texts, targets, found.probabilities)
    with atomic_writer(run / FIGURES) as file:
        file.write(json.dumps(result, indent=2, ensure_ascii=False).encode())
    draw_confusion(result, run / PICTURE)
    return result


def figures(
    labels: Sequence[str], texts: Sequence[str], targets: Sequence[int], probabilities: Tensor
) -> dict[str, Any]:
    """Returns all figures of a test, as plain values for JSON.

    ``accuracy``, ``balanced_accuracy`` (the mean of the classes' recalls) and ``loss`` (nats per text); of each class
    ``precision``, ``recall``, ``f1`` and the number of its texts; ``confusion``, where row i, column j counts the texts of
    class i that are taken for class j; ``most_frequent``, the accuracy of always answering the most frequent class; and
    ``mistakes``, the most confident first.

    Args:
        labels: the names of the classes.
        texts: the texts, for the list of mistakes.
        targets: the right class of each text.
        probabilities: ``(N, classes)``, of each class for each text.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    metrics = _extras.load("sklearn.metrics", "the figures of a test")
    found = probabilities.argmax(dim=1).tolist()
    every = range(len(labels))
    present = sorted(set(targets))  # a class without a text in the test has no recall
    precision, recall, f1, counts = metrics.precision_recall_fscore_support(
        targets, found, labels=list(every), zero_division=0.0
    )
    index, count = Counter(targets).most_common(1)[0]
    right = probabilities.gather(1, torch.tensor(targets)[:, None])[:, 0]
    wrong = sorted((i for i in range(len(texts)) if found[i] != targets[i]), key=lambda i: float(right[i]))
    return {
        "texts": len(texts),
        "accuracy": float(metrics.accuracy_score(targets, found)),
        "balanced_accuracy": float(metrics.recall_score(targets, found, labels=present, average="macro")),
        "loss": float(-right.clamp(min=1e-38).log().mean()),
        "most_frequent": {"label": labels[index], "accuracy": count / len(texts)},
        "classes": [
            {
                "label": labels[i],
                "texts": int(counts[i]),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
            }
            for i in every
        ],
        "confusion": metrics.confusion_matrix(targets, found, labels=list(every)).tolist(),
        "mistakes": [
            {
                "text": texts[i],
                "label": labels[targets[i]],
                "taken_for": labels[found[i]],
                "probability": float(probabilities[i, found[i]]),
            }
            for i in wrong
        ],
    }


def figures_table(result: dict[str, Any], mistakes: int = 3) -> str:
    """A table of a test's `figures` for people to read, with up to `mistakes` of its mistakes."""
    classes = result["classes"]
    width = max(len("class"), *(len(one["label"]) for one in classes))
    lines = [f"{'class':<{width}}  {'texts':>7}  precision  recall      F1"]
    for one in classes:
        shares = f"{one['precision']:>9.1%}  {one['recall']:>6.1%}  {one['f1']:>6.1%}"
        lines.append(f"{one['label']:<{width}}  {one['texts']:>7,}  {shares}")
    often = result["most_frequent"]
    lines.append(
        f"{result['texts']:,} texts: accuracy {result['accuracy']:.1%}, balanced accuracy {result['balanced_accuracy']:.1%}, "
        f"loss {result['loss']:.3f} nats; always {often['label']!r} is right in {often['accuracy']:.1%}"
    )
    for one in result["mistakes"][:mistakes]:
        text = " ".join(one["text"].split())
        short = text if len(text) <= 70 else text[:67] + "..."
        lines.append(f"mistake: {one['label']} taken for {one['taken_for']} ({one['probability']:.0%}): {short}")
    return "\n".join(lines)


def draw_confusion(result: dict[str, Any], out: Path) -> None:
    """Draws the confusion matrix of a test's `figures` and writes the picture. The colours are shares of a row."""
    from matplotlib.figure import Figure

    labels = [one["label"] for one in result["classes"]]
    counts = torch.tensor(result["confusion"], dtype=torch.float32)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(2.2 + 0.7 * len(labels), 14)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_xlabel("class that the model found")
    axes.set_ylabel("right class")
    if len(labels) <= _MAX_NUMBERS:
        for row, line in enumerate(result["confusion"]):
            for column, count in enumerate(line):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    axes.set_title(f"accuracy {result['accuracy']:.1%}, balanced {result['balanced_accuracy']:.1%}", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the right class's texts")
    save_figure(figure, out)
