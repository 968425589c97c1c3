"""Labelled texts: read from every format, split by class, and refused with file and line."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from gptcore.assets import CATALOGUE
from gptcore.data.labelled import read_labelled, read_texts, split
from gptcore.data.table import read_table

TEXTS = ['He said "no, thanks"', "two\tcolumns", "naïve \U0001f600"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", 'label,text\nx,"He said ""no, thanks"""\ny,"two\nlines"\n', ()),
        ("a.csv", '\ufefflabel,text\r\nx,"He said ""no, thanks"""\r\n\r\ny,"two\nlines"\r\n', ()),
        ("a.csv", 'x,"He said ""no, thanks"""\ny,"two\nlines"\n', ("label", "text")),
        (
            "a.jsonl",
            json.dumps({"text": 'He said "no, thanks"', "label": "x"}) + '\n{"text":"two\\nlines","label":"y"}',
            (),
        ),
        (
            "a.json",
            json.dumps([{"label": "x", "text": 'He said "no, thanks"'}, {"label": " y ", "text": "two\nlines"}]),
            (),
        ),
    ],
    ids=["csv", "csv-windows", "csv-no-header", "jsonl", "json"],
)
def test_formats_give_the_same_rows(tmp_path: Path, name: str, content: str, columns: tuple):
    found = read_labelled(write(tmp_path / name, content), columns=columns)
    assert dict(zip(found.texts, found.labels)) == {'He said "no, thanks"': "x", "two\nlines": "y"}
    zipped = write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))
    assert read_labelled(zipped, columns=columns) == found


def test_quotes_mean_nothing_in_a_tsv_file(tmp_path: Path):
    path = write(tmp_path / "a.tsv", 'label\ttext\nx\t"unclosed, and a comma\ny\tsay "hi"\n')
    assert read_labelled(path).texts == ['"unclosed, and a comma', 'say "hi"']


def test_columns_are_chosen_by_name_and_labels_become_text(tmp_path: Path):
    rows = [{"body": "a", "stars": 1, "id": 7}, {"body": "b", "stars": 5}, {"body": "c", "stars": True}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found = read_labelled(path, text_column="body", label_column="stars")
    assert found.labels == ["1", "5", "true"]
    assert read_texts(path, text_column="body") == ["a", "b", "c"]


def test_repeated_texts_are_used_once(tmp_path: Path):
    path = write(tmp_path / "a.tsv", "text\tlabel\na\t1\nb\t0\na\t1\na\t0\nb\t0\n")
    found = read_labelled(path)
    assert (found.texts, found.labels) == (["a", "b"], ["1", "0"])
    assert (found.repeated, found.contradicted) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "options", "match"),
    [
        ("a.csv", "a,text\nx,y\n", {}, r"a\.csv, line 2: has no column 'label'; its columns are 'a', 'text'"),
        ("a.csv", "label,body\nx,y\n", {}, r"a\.csv, line 2: has no column 'text'; its columns are 'label', 'body'"),
        ("a.jsonl", '{"text": "x"}', {}, r"a\.jsonl, line 1: has no column 'label'; its columns are 'text'"),
        ("a.csv", "text,text\nx,y\n", {}, r"line 1: must name each column once; got 'text', 'text'"),
        ("a.csv", "text,label\nx,y\nz\n", {}, r"a\.csv, line 3: must have 2 fields \(text, label\); got 1"),
        ("a.csv", 'text,label\n"x\ny",1\n"z,1\n', {}, r"a\.csv, line 4: unexpected end of data"),
        ("a.tsv", "text\tlabel\nx\ty\tz\n", {}, r"a\.tsv, line 2: must have 2 fields \(text, label\); got 3"),
        ("a.csv", "text,label\nx,y\n  ,y\n", {}, r"a\.csv, line 3: 'text' is empty; accepted are texts"),
        ("a.csv", "text,label\nx, \n", {}, r"a\.csv, line 2: 'label' is empty; accepted are labels"),
        ("a.csv", b"text,label\nx,y\nna\xefve,y\n", {}, r"a\.csv, line 3: is not valid UTF-8: byte 0xef at offset 2"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text":', {}, r"a\.jsonl, line 2: is not valid JSON"),
        ("a.jsonl", '["x"]', {}, r"a\.jsonl, line 1: must be a JSON object; got list"),
        ("a.jsonl", '{"text": 1, "label": "y"}', {}, r"line 1: the field 'text' must be a string; got int 1"),
        (
            "a.jsonl",
            '{"text": "x", "label": 0.5}',
            {},
            r"line 1: 'label' must be a string, an integer, true or false; got float",
        ),
        ("a.csv", "text,label\nx,y\nz,y\n", {}, r"all 2 texts of .*a\.csv have the label 'y'; accepted are two labels"),
        ("a.csv", "text,label\n", {}, r"a\.csv holds no rows"),
        ("a.txt", "x", {}, r"got .*a\.txt; accepted are names that end with \.csv, \.tsv"),
        (
            "a.csv",
            "text,label\nx,y\n",
            {"columns": ["text", "label"]},
            r"columns: got text, label, which .*line 1 names too",
        ),
        (
            "a.jsonl",
            "{}",
            {"columns": ["text", "label"]},
            r"columns: got text, label for .*whose objects name their fields",
        ),
        ("a.csv", "text,label\nx,y\n", {"label_column": "text"}, r"label_column: got 'text', the column of the texts"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, content: str | bytes, options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        read_labelled(write(tmp_path / name, content), **options)


def test_fetched_data_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A list with tabs and without a header, and a CSV file in which other bytes than UTF-8 are."""
    monkeypatch.setattr("gptcore.assets.download.cache_folder", lambda: tmp_path)

    def fetched(name: str, content: bytes) -> None:
        (tmp_path / name).mkdir()
        write(tmp_path / name / CATALOGUE[name].files[0], content)
        write(tmp_path / name / ".sha256", CATALOGUE[name].sha256)

    with pytest.raises(FileNotFoundError, match="sms-spam has not been fetched; run: gptcore fetch sms-spam"):
        read_table("sms-spam")
    with pytest.raises(ValueError, match=r"shakespeare is no table of labelled text; accepted are sms-spam, sentiment"):
        read_table("shakespeare")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path / "missing.csv")
    fetched("sms-spam", b'ham\tSay "hi\nspam\tcall now, free\n')
    found = read_labelled(Path("sms-spam"))
    assert dict(zip(found.texts, found.labels)) == {'Say "hi': "ham", "call now, free": "spam"}
    fetched("sentiment", b'sentiment,confidence,text\r\nneutral,0.5,"one, two\xd5"\r\npositive,1,three\r\n')
    found = read_labelled("sentiment")
    assert dict(zip(found.texts, found.labels)) == {"one, two\xd5": "neutral", "three": "positive"}


def test_a_split_keeps_the_proportions_of_the_classes():
    pytest.importorskip("sklearn")
    labels = ["rare"] * 20 + ["common"] * 180
    parts = split(labels, 0.2, 0.1, seed=3)
    assert sorted([*parts.train, *parts.val, *parts.test]) == list(range(200))
    counts = [Counter(labels[i] for i in part) for part in parts]
    assert counts == [{"common": 126, "rare": 14}, {"common": 36, "rare": 4}, {"common": 18, "rare": 2}]
    assert split(labels, 0.2, 0.1, seed=3) == parts
    assert split(labels, 0.2, 0.1, seed=4) != parts
    assert split(labels, 0.2, 0.1, seed=-1).train  # any seed of a run
    whole = split(labels, 0.2, 0.0, seed=3)
    assert (len(whole.train), len(whole.val), whole.test) == (160, 40, [])


@pytest.mark.parametrize(
    ("labels", "fractions", "match"),
    [
        ("aabb", (0.0, 0.5), r"val_fraction: got 0\.0; accepted is 0 < val_fraction < 1"),
        ("aabb", (0.5, 1.5), r"test_fraction: got 1\.5; accepted is 0 <= test_fraction < 1"),
        ("aabb", (0.5, 0.5), r"val_fraction, test_fraction: got 0\.5 and 0\.5; accepted are sums under 1"),
        ("aaaaabb", (0.3, 0.3), r"the label 'b' has 2 distinct texts; accepted are 3 or more"),
        (
            "a" * 20 + "bbb",
            (0.3, 0.02),
            r"test_fraction: got 0\.02 of 23 texts, which is 0; accepted are .* 2 texts or more",
        ),
        (
            "aaabbbccc",
            (0.4, 0.4),
            r"which leave 1 of 9 texts for training; accepted are fractions that leave 3 or more",
        ),
    ],
)
def test_bad_splits(labels: str, fractions: tuple, match: str):
    with pytest.raises(ValueError, match=match):
        split(list(labels), *fractions, seed=0)
