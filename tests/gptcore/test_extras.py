"""Each verb that needs a missing optional package says what to install, before it reads or writes anything."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from gptcore import GPT, GPTConfig, _extras
from gptcore.data.prepare import prepare
from gptcore.text.pretrained import PretrainedTokenizer, byte_level_bpe
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.gptcore.runs import main

WITH_A_MODEL = {
    "info": (),
    "generate": ("--model",),
    "chat": ("--model",),
    "attention-map": ("--out", "new", "--model"),
    "export": ("--out", "new", "--model"),
}
TEXT = {"generate": ("text",), "attention-map": ("text",)}


def with_a_model(model: str, *verbs: str) -> list[tuple[str, ...]]:
    return [(verb, *WITH_A_MODEL[verb], model, *TEXT.get(verb, ())) for verb in verbs or WITH_A_MODEL]


CASES = [
    *[("gguf", case) for case in with_a_model("model.gguf")],
    ("gguf", ("prepare", "text.txt", "--out", "new", "--tokenizer", "model.gguf")),
    *[("tokenizers", case) for case in with_a_model("weights", "generate", "chat", "attention-map", "export")],
    *[("tokenizers", case) for case in with_a_model("model.gguf", "generate", "export")],
    *[("tokenizers", case) for case in with_a_model("somebody/model", "generate", "export")],
    ("tokenizers", ("export", "--model", "run", "--out", "new")),
    ("tokenizers", ("prepare", "text.txt", "--out", "new", "--tokenizer", "weights")),
    ("tokenizers", ("train", "--data", "data", "--out", "new", "--preset", "tiny")),
    *[("huggingface_hub", case) for case in with_a_model("somebody/model")],
    ("pyarrow", ("prepare", "text.txt", "rows.parquet", "--out", "new/deep")),
    ("datasets", ("prepare", "text.txt", "hf:somebody/texts", "--out", "new/deep")),
    ("tensorboard", ("train", "--data", "data", "--out", "new", "--tensorboard")),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind. The files that need an optional package are invalid: the error must come first."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("some text to train a tokenizer on, and one more. " * 40)
    for name in ("model.gguf", "rows.parquet"):
        (folder / name).write_bytes(b"no such thing")
    (folder / "weights").mkdir()
    (folder / "weights/tokenizer.json").write_text(json.dumps({"model": {"type": "no such thing"}}))
    (folder / "run").mkdir()
    mine = Tokenizer.train([(folder / "text.txt").read_text()], 260)
    mine.save(folder / "run/tokenizer.json")
    inner = byte_level_bpe(mine._pattern, mine._tokens_in_order(), {END_OF_TEXT: 259})
    PretrainedTokenizer(inner, "theirs").save(folder / "theirs.json")
    prepare(folder / "text.txt", folder / "data", tokenizer=folder / "theirs.json", progress=False)
    return folder


@pytest.mark.parametrize(
    ("package", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    place: Path,
    package: str,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, package, None)
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        main(list(arguments))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(
        rf"gptcore: error: .*needs the package {package}, which is not installed; "
        rf"pip install 'gptcore\[{_extras.EXTRAS[package]}\]'\n",
        shown.err,
    )
    assert sorted(place.rglob("*")) == before


def test_a_package_that_is_broken_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gguf.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(
        ImportError, match=r"^x: needs .* gguf, which cannot be imported \(No module named 'no_such_module'"
    ):
        _extras.load("gguf", "x")


def test_each_extra_installs_its_packages() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package, extra in _extras.EXTRAS.items():
        distribution = {"sklearn": "scikit-learn"}.get(package, package.replace("_", "-"))
        assert re.search(rf'^{extra} = \[.*"{distribution}>=', project, re.MULTILINE), package


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no merge"), OSError("no space left on device")])
@pytest.mark.parametrize("out", ["new/deep", "empty"])
def test_a_failed_export_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], out: str
) -> None:
    GPT(GPTConfig.preset("tiny", vocab_size=260, n_layer=1, width=16, n_head=1)).save_pretrained(tmp_path / "run")
    (tmp_path / "run/tokenizer.json").write_bytes((place / "run/tokenizer.json").read_bytes())
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Tokenizer, "save_huggingface", fail)  # the export writes this last
    command = ["export", "--model", str(tmp_path / "run"), "--out"]
    with pytest.raises(SystemExit, match="130" if error is KeyboardInterrupt else "2"):
        main([*command, str(tmp_path / out)])
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="0"):
        main([*command, str(tmp_path / out)])
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {path.name for path in (tmp_path / out).iterdir()}
