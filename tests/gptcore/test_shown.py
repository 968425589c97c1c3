"""The output of generate and chat, on terminals, in pipes and when they are interrupted, and their exit status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptcore import GPT, GPTConfig
from gptcore.generate.chat import converse
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import Tokenizer
from tests.gptcore.runs import main
from tests.gptcore.small_tokenizers import byte_level

ODD = "[bold] $$x$$ :end: [/] {0} %s \\n na\u00efve \U0001f600"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GPT(GPTConfig.preset("tiny", vocab_size=257)).save_pretrained(path)
    Tokenizer.train(["a"], 257).save(path / "tokenizer.json")
    return str(path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def generate(folder: str, *arguments: str) -> int:
    return run("generate", "--model", folder, "--kernels", "reference", "--max-new-tokens", "3", *arguments)


def test_a_prompt_is_shown_as_it_is(folder: str, capsys: pytest.CaptureFixture[str]):
    assert generate(folder, ODD) == 0
    assert capsys.readouterr().out.startswith(ODD)
    assert generate(folder, ODD, "a") == 0
    assert capsys.readouterr().out.startswith(ODD)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_that_lacks_a_character(encoding: str, folder: str, monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert generate(folder, ODD, "--temperature", "0") == 0
    assert written.getvalue().startswith(ODD.encode(encoding, "replace"))
    assert written.getvalue().endswith(b"\n")


def test_half_characters_on_the_command_line(folder: str, capsys: pytest.CaptureFixture[str]):
    assert generate(folder, "a\udcffb") == 0  # as Python hands on a byte that is not UTF-8
    assert capsys.readouterr().out.startswith("a?b")


def test_a_reader_that_has_gone_is_no_error(
    folder: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """`gptcore generate ... | head -1`"""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    assert generate(folder, "a") == 141
    sys.stdout.close()  # what was not written does not come up again
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "gptcore: interrupted\n"),
        (RuntimeError("no memory"), 2, "gptcore: error: no memory\n"),
    ],
    ids=["Ctrl-C", "an error"],
)
def test_a_stream_that_breaks_off_ends_its_line(
    error: BaseException,
    status: int,
    said: str,
    folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def broken(*arguments: object, **options: object) -> Iterator[str]:
        yield " and"
        raise error

    monkeypatch.setattr("gptcore.generate.stream_text", broken)
    assert generate(folder, "a") == status
    assert capsys.readouterr() == ("a and\n", said)


def test_stop_strings_leave_the_prompt(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    stops: list[object] = []

    def stream(*arguments: object, stop: tuple[str, ...], **options: object) -> Iterator[str]:
        stops.append(stop)
        return iter(())

    monkeypatch.setattr("gptcore.generate.stream_text", stream)
    assert generate(folder, "--stop", ".", "the text") == 0
    assert generate(folder, "--stop", ".", "--stop", ";", "the text", "--stop=---") == 0
    assert stops == [(".",), (".", ";", "---")]
    assert capsys.readouterr().out == "the text\n" * 2


def test_layers_and_heads_leave_the_text(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = str(tmp_path / "map.png")
    options = ("attention-map", "--model", folder, "--out", out, "--kernels", "reference")
    assert run(*options, "--layers", "1", "--heads", "0", "the text") == 0
    assert capsys.readouterr().out == f"{out}: 1 layers, 1 heads, 8 tokens\n"
    assert run(*options, "--layers", "1", "--layers", "0", "the text") == 0
    assert capsys.readouterr().out == f"{out}: 2 layers, 2 heads, 8 tokens\n"


def test_options_out_of_range_are_named(folder: str, capsys: pytest.CaptureFixture[str]):
    for options, named in ((("--temperature", "1e-40"), "temperature: got 1e-40; accepted are 0"),
                           (("--seed", "99999999999999999999"), "seed: got 99999999999999999999; accepted are")):  # fmt: skip
        assert generate(folder, *options, "a") == 2
        shown = "".join(capsys.readouterr())
        assert named in " ".join(shown.replace("\u2502", " ").split())


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a chat template: bytes, and a token that ends a turn."""
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}a:"
    tokenizer = PretrainedTokenizer(
        byte_level("</s>"), "x", special_tokens_map={"eos_token": "</s>"}, chat_template=template
    )
    path = tmp_path_factory.mktemp("talker")
    tokenizer.save(path / "tokenizer.json")
    torch.manual_seed(0)
    GPT(GPTConfig.preset("tiny", vocab_size=257)).save_pretrained(path)
    return str(path)


def chat(talker: str) -> int:
    return run("chat", "--model", talker, "--kernels", "reference", "--max-new-tokens", "5", "--temperature", "0")


def test_a_conversation_over_a_pipe_takes_any_bytes(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\n/quit\n"), encoding="utf-8"))
    assert chat(talker) == 0
    out, error = capsys.readouterr()
    assert out.endswith("\n")
    assert error == ""


@pytest.mark.parametrize(("end", "status"), [(EOFError, 0), (KeyboardInterrupt, 130)], ids=["Ctrl-D", "Ctrl-C"])
def test_a_conversation_that_ends_at_its_prompt_leaves_the_line(
    end: type, status: int, talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def ask(prompt: str) -> str:
        print(prompt, end="")
        raise end

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert chat(talker) == status
    assert capsys.readouterr().out == "you> \n"


class Broken:
    """A conversation whose reply raises an error in the middle."""

    forgotten = 0

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def reply(self, text: str) -> Iterator[str]:
        yield "well"
        raise self.error


def test_a_reply_that_breaks_off_ends_its_line():
    for error, expected in (
        (KeyboardInterrupt(), "well\n(interrupted)\n"),
        (ValueError("too long"), "well(too long)\n"),
    ):
        shown: list[str] = []
        says = iter(["hi", "/quit"])
        converse(Broken(error), says.__next__, shown.append)  # type: ignore[arg-type]
        assert "".join(shown) == expected
    shown = []
    with pytest.raises(RuntimeError):
        converse(Broken(RuntimeError("out of memory")), lambda: "hi", shown.append)  # type: ignore[arg-type]
    assert "".join(shown) == "well\n"
