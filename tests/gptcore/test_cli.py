"""The command line from end to end, and what it says when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gptcore.runs import cli, main

VERBS = [
    "info",
    "fetch",
    "prepare",
    "tokens",
    "train",
    "finetune",
    "generate",
    "chat",
    "classify",
    "fill",
    "embed",
    "nearest",
    "eval",
    "export",
    "attention-map",
]

KINDS = ["classify", "instruct", "prefer", "text"]


def gptcore(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_from_text_to_text(capsys, tmp_path: Path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"the cat number {i} sat on the mat. " * 60)
    data, out = tmp_path / "data", tmp_path / "run"
    status, shown, _ = gptcore(capsys, "prepare", tmp_path / "*.txt", "--out", data, "--vocab-size", 270)
    assert status == 0
    assert "unigram entropy" in shown
    size = ("--preset", "tiny", "--context", 16, "--batch-size", 4, "--warmup", 5, "--dtype", "fp32")
    common = ("train", "--data", data, "--out", out, *size, "--sample-tokens", 5, "--sample-prompt", "the cat")
    status, shown, _ = gptcore(capsys, *common, "--steps", 60, "--eval-interval", 30)
    assert status == 0
    (kernels,) = [line for line in shown.splitlines() if line.startswith("kernels ")]
    assert ("native (C++, " in kernels) == (not torch.cuda.is_available())
    assert "not used" not in shown  # `gptcore info` says why the others do not run
    assert "peak memory" in " ".join(shown.split())  # lines are wrapped at the terminal's width
    assert "validation loss" in shown
    assert "unigram entropy" in shown
    status, _, error = gptcore(capsys, *common, "--steps", 60)
    assert status == 2
    assert "holds another run" in error
    status, shown, _ = gptcore(capsys, *common, "--steps", 70, "--resume", "always")
    assert status == 0
    generate = ("generate", "--model", out, "--max-new-tokens", 12, "--temperature", 0, "the cat")
    status, shown, _ = gptcore(capsys, *generate)
    assert status == 0
    assert shown.startswith("the cat num")  # it has learnt its one sentence
    assert gptcore(capsys, *generate, "--kernels", "reference")[1] == shown


def test_info_says_what_runs_where_and_why_not(capsys):
    status, shown, _ = gptcore(capsys, "info")
    assert status == 0
    for op in ("layer_norm", "softmax", "attention"):
        assert op in shown
    assert "auto -> " in shown
    assert "native kernels: " in shown


def test_help_is_a_line_for_each_verb(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, _ = gptcore(capsys, "--help")
    assert status == 0
    described = [line.split("•")[1].rstrip(" │").split(maxsplit=1) for line in shown.splitlines() if "•" in line]
    assert [verb for verb, _ in described] == list(cli().VERBS) == VERBS
    assert all(text.endswith(".") for _, text in described)  # whole: nothing is carried over to a next line
    assert len(shown.splitlines()) <= len(VERBS) + 12  # a line each, and the frame


def test_help_is_a_line_for_each_kind_of_fine_tuning(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, _ = gptcore(capsys, "finetune", "--help")
    assert status == 0
    described = [line.split("•")[1].rstrip(" │").split(maxsplit=1) for line in shown.splitlines() if "•" in line]
    assert [kind for kind, _ in described] == KINDS
    assert all(text.endswith(".") for _, text in described)


@pytest.mark.parametrize("verb", [*VERBS, *(f"finetune {kind}" for kind in KINDS)])
def test_each_verbs_help_has_examples_to_copy(capsys, verb: str):
    status, shown, _ = gptcore(capsys, *verb.split(), "--help")
    assert status == 0
    examples = shown.split("For example:\n")[1].split("\n\n")[0].splitlines()
    assert all(f"gptcore {verb}" in line for line in examples)  # a line each


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("there is no such folder", ("generate", "--model", "./nowhere", "hello")),
        ("there is no such folder", ("generate", "--model", "./nowhere", "--kernels", "reference", "hello")),
        ("nowhere", ("prepare", "nowhere/", "--out", "x")),
        ("nowhere", ("train", "--data", "nowhere", "--out", "x")),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, tmp_path: Path, monkeypatch, match: str, arguments: tuple):
    monkeypatch.chdir(tmp_path)
    status, _, error = gptcore(capsys, *arguments)
    assert status == 2
    assert error.startswith("gptcore: error: ")
    assert match in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bad_option_is_named_before_anything_runs(capsys, tmp_path: Path):
    status, out, error = gptcore(capsys, "train", "--data", tmp_path, "--out", tmp_path / "x", "--steps", 0)
    assert status == 2
    assert "steps: got 0; accepted are positive integers" in out + error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["prepare", "fetch", "export", "generate", "train"])
def test_ctrl_c_is_one_line_and_status_130(capsys, tmp_path: Path, monkeypatch, verb: str):
    command = {
        "prepare": ("prepare", "python-docs", "--out", tmp_path / "x"),
        "fetch": ("fetch", "shakespeare"),
        "export": ("export", "--model", "m", "--out", tmp_path / "x"),
        "generate": ("generate", "--model", "m", "text"),
        "train": ("train", "--data", tmp_path, "--out", tmp_path / "x"),
    }[verb]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in (
        "gptcore.data.prepare.prepare",
        "gptcore.assets.fetch",
        "gptcore.weights.locate",
        "gptcore.train.train",
    ):
        monkeypatch.setattr(place, interrupted)
    status, out, error = gptcore(capsys, *command)
    assert (status, out, error) == (130, "", "gptcore: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_preparing_leaves_nothing(tmp_path: Path):
    """A signal to a whole process: no traceback, no folder, not even the one that was to hold it."""
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text\n" for i in range(3000)))
    code = """
import os, signal, sys, time
from gptcore import cli
from gptcore.data import prepare
start = prepare._Bars.start
def starts(self, step, *arguments):
    if step == "Encoding":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # from which the signal wakes
    return start(self, step, *arguments)
prepare._Bars.start = starts
cli.main(sys.argv[1:])
"""
    prepare = ("prepare", tmp_path / "a.txt", "--out", tmp_path / "new/deep", "--vocab-size", "270")
    done = subprocess.run([sys.executable, "-c", code, *map(str, prepare)], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("gptcore: interrupted\n")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_works_without_triton(tmp_path: Path):
    """As on a machine where triton is not installed; and explicit triton says what to do."""
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else find(name, *a)
sys.modules["triton"] = None
import torch, gptcore, gptkernels
model = gptcore.GPT(gptcore.GPTConfig.preset("tiny", vocab_size=50))
model.loss(torch.ones(1, 5).long(), torch.ones(1, 5).long()).backward()
print(gptkernels.report())
try:
    gptkernels.softmax(torch.ones(3), backend="triton")
except gptkernels.BackendUnavailableError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(sys.path), "PATH": ""})  # fmt: skip
    assert "pip install triton" in done.stdout
    assert "refused:" in done.stdout
