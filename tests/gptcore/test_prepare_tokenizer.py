"""Preparing with a Hugging Face `tokenizer.json`: all text becomes tokens, the same on every run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcore.data.prepare import open_split, prepare
from gptcore.data.report import read_report
from gptcore.text.pretrained import byte_level_bpe
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer

TEXT = "".join(f"line {i} of a text that is longer than any limit, naïve 🙂\n" for i in range(400))
PADDING = {
    "strategy": {"Fixed": 4096},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
TRUNCATION = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
# A post-processor that puts a token before each text.
AROUND = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [299], "tokens": [END_OF_TEXT]}},
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """A Hugging Face tokenizer.json with 300 tokens."""
    mine = Tokenizer.train([TEXT], 300)
    inner = byte_level_bpe(mine._pattern, mine._tokens_in_order(), {END_OF_TEXT: 299})
    return json.loads(inner.to_str())


def save(folder: Path, state: dict[str, Any], changes: dict[str, Any]) -> Path:
    state = state | {name: value for name, value in changes.items() if name != "dropout"}
    state["model"] = state["model"] | ({"dropout": changes["dropout"]} if "dropout" in changes else {})
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


@pytest.mark.filterwarnings("ignore:the largest document")
@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": TRUNCATION, "padding": PADDING},
        {"padding": PADDING},
        {"dropout": 0.5},
        {"post_processor": AROUND},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_truncation_padding_dropout_and_added_tokens_are_ignored(
    tmp_path: Path, plain: dict[str, Any], changes: dict[str, Any]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    reports = []
    for name, extra in ("one", {}), ("two", changes):
        folder = save(tmp_path / name, plain, extra)
        reports.append(prepare(tmp_path / "a.txt", tmp_path / f"{name}-data", tokenizer=folder, progress=False))
        tokens = [open_split(tmp_path / f"{name}-data", split).tokens for split in ("train", "val")]
        texts = [get_tokenizer(folder).decode(part) for part in tokens]
        assert "".join(text.removesuffix(END_OF_TEXT) for text in texts) == TEXT
    assert (reports[0].train, reports[0].val) == (reports[1].train, reports[1].val)
    assert reports[1].train.bytes + reports[1].val.bytes == len(TEXT.encode())
    for split in ("train", "val"):
        same = [open_split(tmp_path / f"{name}-data", split).tokens for name in ("one", "two")]
        assert np.array_equal(*same)
    if "post_processor" not in changes:  # it changes how prompts are encoded, so the fingerprint has it
        assert reports[0].tokenizer_fingerprint == reports[1].tokenizer_fingerprint


def test_truncation_in_a_file_of_an_earlier_version_is_ignored(tmp_path: Path, plain: dict[str, Any]) -> None:
    """Earlier versions saved truncation and padding into the folder of a run."""
    from gptcore.text.pretrained import _fingerprint

    tokenizer = get_tokenizer(save(tmp_path / "theirs", plain, {}))
    tokenizer.save(tmp_path / "tokenizer.json")
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["tokenizer"] |= {"truncation": TRUNCATION, "padding": PADDING}
    (tmp_path / "damaged.json").write_text(json.dumps(state))
    state["fingerprint"] = _fingerprint(state["tokenizer"], tokenizer.eot_token)
    (tmp_path / "old.json").write_text(json.dumps(state))
    old = get_tokenizer(tmp_path / "old.json")
    assert old.encode(TEXT) == tokenizer.encode(TEXT)
    assert old.fingerprint == tokenizer.fingerprint
    with pytest.raises(
        ValueError, match=r"damaged\.json is a damaged tokenizer file: its contents have the fingerprint"
    ):
        get_tokenizer(tmp_path / "damaged.json")


@pytest.mark.filterwarnings("ignore:the largest document")
def test_a_tokenizer_that_loses_text_is_reported(tmp_path: Path) -> None:
    """The tokenizer knows letters only: other characters are dropped, or become <unk>."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers

    letters = {chr(i): i - 97 for i in range(97, 123)} | {" ": 26, "\n": 27, END_OF_TEXT: 28, "<unk>": 29}
    for unknown in None, "<unk>":
        library = Library(models.BPE(letters, [], unk_token=unknown))
        library.normalizer = normalizers.Sequence(
            [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
        )
        library.save(str(tmp_path / "tokenizer.json"))
        for text, lost in ("letters Ünd AŻŹ\n" * 40, 0.0), ("aaa ж 1\n" * 40, 0.4):
            (tmp_path / "a.txt").write_text(text, encoding="utf-8")
            out = tmp_path / f"{unknown}{lost}"
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                report = prepare(tmp_path / "a.txt", out, tokenizer=tmp_path, progress=False)
            said = f"the tokenizer loses {lost:.0%} of the characters"
            assert report.lost_text == read_report(out).lost_text == pytest.approx(lost)
            assert (said in str(report)) == (said in str([str(w.message) for w in warned])) == (lost > 0)
