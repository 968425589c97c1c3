"""Sources with many documents per file: JSON Lines, JSON arrays, Parquet, Hugging Face datasets; fetched texts by name."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gptcore import assets
from gptcore.data import corpus as corpus_module
from gptcore.data import prepare as prepare_module
from gptcore.data import readers
from gptcore.data.corpus import documents, sources_state
from gptcore.data.prepare import open_split, prepare
from gptcore.data.report import read_report
from gptcore.data.split import plan_split
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.gptcore.runs import main

TEXTS = ["first\nof two lines\r\n", "naïve 🙂", "", 'a "quoted" text', "last\u2028line"]

Write = Callable[[Path, str, Sequence[Any]], Path]
"""``write(folder, field, values)`` makes a file of records, each with one field of that name."""


def texts(sources: object, **options: str) -> list[str]:
    return ["".join(document.pieces()) for document in documents(sources, **options)]  # type: ignore[arg-type]


def names(sources: object, **options: str) -> list[str]:
    return [document.name for document in documents(sources, **options)]  # type: ignore[arg-type]


def write_lines(path: Path, lines: bytes) -> Path:
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
    path.write_bytes(lines)
    return path


def json_lines(name: str) -> Write:
    def write(folder: Path, field: str, values: Sequence[Any]) -> Path:
        lines = (json.dumps({"id": i, field: value}) for i, value in enumerate(values))
        return write_lines(folder / name, "\n".join(lines).encode())

    return write


def write_parquet(folder: Path, field: str, values: Sequence[Any]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": list(range(len(values))), field: values})
    parquet.write_table(table, folder / "data.parquet", row_group_size=2)
    return folder / "data.parquet"


WRITERS = pytest.mark.parametrize(
    "write", [json_lines("data.jsonl"), json_lines("DATA.JSONL.gz"), write_parquet], ids=["jsonl", "gz", "parquet"]
)


# --- Files that are read


@WRITERS
def test_each_record_is_a_document(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, "body", TEXTS)
    assert texts(path, field="body") == TEXTS
    unit = "row" if path.suffix == ".parquet" else "line"
    assert names(path, field="body") == [f"{path}, {unit} {i}" for i in range(1, 6)]


@WRITERS
def test_a_document_can_be_read_twice_and_after_the_next(tmp_path: Path, write: Write) -> None:
    found = list(documents(write(tmp_path, "text", TEXTS)))
    assert [["".join(document.pieces()) for document in found] for _ in range(2)] == [TEXTS, TEXTS]


def test_parquet_is_read_over_batches_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_ROWS_PER_READ", 3)
    values = [f"text {i}" for i in range(20)]
    path = write_parquet(tmp_path, "text", values)
    assert texts(path) == values
    assert names(path)[-1].endswith("data.parquet, row 20")


def test_a_gzip_file_of_several_members(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    assert texts(path) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.ndjson", "b.NDJSON.gz"])
def test_other_names_for_json_lines(tmp_path: Path, name: str) -> None:
    path = json_lines(name)(tmp_path, "text", TEXTS)
    assert texts(path) == texts(tmp_path) == TEXTS


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \n"])
@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz"])
def test_an_array_in_json_is_its_records(tmp_path: Path, name: str, before: bytes) -> None:
    array = json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)], indent=1)
    path = write_lines(tmp_path / name, before + array.encode())
    assert texts(path) == texts(tmp_path / "*.[jJ]*") == TEXTS
    assert names(path)[4] == f"{path}, record 5"


def test_other_json_is_one_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.json", b'{"text": "one"}')
    assert texts(path) == ['{"text": "one"}']


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (b'[{"text": "a"}, {"text": 1}]', "record 2: the field 'text' must be a string; got int 1"),
        (b'[{"text": "a"}, {}]', "record 2: has no field 'text'; its fields are none"),
        (b'[{"text": "a"}, 3]', "record 2: must be a JSON object; got int 3"),
        (b'[{"text": "a"}', "is not valid JSON: Expecting ',' delimiter at character 14"),
        (b'[{"text": "\xff"}]', "is not valid UTF-8: byte 0xff at offset 11"),
    ],
)
def test_a_bad_array_in_json_is_named(tmp_path: Path, array: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.json(, |: ){message}"):
        texts(write_lines(tmp_path / "a.json", array))


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "two"}\n')
    assert texts(path) == ["one", "two"]
    assert names(path)[1].endswith("line 4")


def test_a_folder_mixes_texts_and_records(tmp_path: Path) -> None:
    json_lines("b.jsonl")(tmp_path, "text", ["one", "two"])
    write_parquet(tmp_path, "text", ["three"])
    (tmp_path / "a.txt").write_text("zero")
    (tmp_path / "a.json").write_text("no source")
    assert texts(tmp_path) == ["zero", "one", "two", "three"]
    assert texts([tmp_path / "*.jsonl", tmp_path / "b.jsonl"]) == ["one", "two"]


def test_a_long_record_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_PIECE_BYTES", 40)
    text = "line é\n" * 9 + "x" * 35
    [document] = documents(json_lines("a.jsonl")(tmp_path, "text", [text]))
    pieces = list(document.pieces())
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= 40 for piece in pieces)
    assert pieces[0] == "line é\n"


# --- Files that give an error


@WRITERS
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None, "c"], "2: the field 'text' must be a string; got null"),
        ([1, 2, 3], "1: the field 'text' must be a string; got int 1"),
        ([["a"], ["b"]], r"1: the field 'text' must be a string; got list \['a'\]"),
        ([{"a": "x" * 99}], "1: the field 'text' must be a string; got dict {'a': 'x*[.]{3}$"),
    ],
)
def test_a_field_that_is_no_string(tmp_path: Path, write: Write, values: list[Any], message: str) -> None:
    path = write(tmp_path, "text", values)
    with pytest.raises(ValueError, match=rf"{path.name}, (line|row) {message}"):
        texts(path)


@WRITERS
def test_a_missing_field_says_which_there_are(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path, "body", ["a"])
    with pytest.raises(ValueError, match=rf"{path.name}.* has no field 'text'; its fields are id, body$"):
        texts(path)


@WRITERS
def test_a_record_that_is_too_long(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 60)
    path = write(tmp_path, "text", ["short", "é" * 40, "short"])  # fewer than 60 characters, more bytes
    with pytest.raises(
        ValueError, match=rf"{path.name}, (line|row) 2: .*(80 bytes; a record may have 60|longer than 60)"
    ):
        texts(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', r"is not valid UTF-8: byte 0xe9 at offset 13 \(invalid continuation byte\)"),
        (b'{"text": "a"', "is not valid JSON: Expecting ',' delimiter at character 12$"),
        (b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
        (b'["text"]', r"must be a JSON object; got list \['text'\]"),
        (b"{}", "has no field 'text'; its fields are none"),
        (
            b'{"text": "ab\\ud83d"}',
            r"the field 'text' is no text: it holds half of a surrogate pair \(U\+D83D\) at char.* 2",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    path = write_lines(tmp_path / name, b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(ValueError, match=rf"{name}, line 2: {message}"):
        texts(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:-8] + b"\0" * 8, lambda data: data[:12] + b"\xff" + data[13:]]
)
def test_a_damaged_gzip_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = json_lines("a.jsonl.gz")(tmp_path, "text", TEXTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is truncated or damaged: "):
        texts(path)


def test_a_file_that_is_no_gzip_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is truncated or damaged: Not a gzipped file"):
        texts(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not Parquet at all",
        lambda data: data[:-20],
        lambda data: (
            b"PAR1".ljust(start := len(data) - 8 - int.from_bytes(data[-8:-4], "little"), b"\xff") + data[start:]
        ),
    ],
    ids=["empty", "other", "truncated", "pages"],
)
def test_a_damaged_parquet_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_parquet(tmp_path, "text", TEXTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"data\.parquet is truncated or damaged: .") as caught:
        list(documents(path, field="text"))
    assert "\n" not in str(caught.value)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    raw = pa.array([b"good", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())  # not checked by pyarrow
    parquet.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: is not valid UTF-8: .* at offset 3"):
        texts(tmp_path)


# --- Hugging Face datasets


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset in a local folder, as a source; the datasets library itself loads it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "stored"
    folder.mkdir()
    json_lines("train.jsonl")(folder, "text", TEXTS)
    json_lines("test.jsonl")(folder, "text", ["of the test"])
    return f"hf:{folder}"


def test_a_dataset_is_its_rows(stored: str) -> None:
    assert texts(stored) == TEXTS
    assert names(stored)[4] == f"{stored}, row 5"
    assert texts(f"{stored}::test") == ["of the test"]
    assert texts(f"{stored}:default:test") == ["of the test"]


def test_the_state_of_a_dataset_changes_with_its_local_copy(stored: str) -> None:
    before = sources_state(stored)
    assert sources_state(stored) == before != sources_state(f"{stored}::test")
    json_lines("train.jsonl")(Path(stored[3:]), "text", [text.upper() for text in TEXTS])
    assert texts(stored)[3] == TEXTS[3].upper()
    assert sources_state(stored) != before


@pytest.mark.parametrize(
    ("suffix", "field", "error", "message"),
    [
        ("", "body", ValueError, "has no field 'body'; its fields are id, text"),
        ("", "id", ValueError, "row 1: the field 'id' must be a string; got int 0"),
        ("::nothing", "text", RuntimeError, "could not be loaded: Unknown split"),
        ("/nowhere", "text", RuntimeError, "could not be loaded: ."),
        (":default:a:b", "text", RuntimeError, "could not be loaded: ."),
    ],
)
def test_datasets_that_cannot_be_read(
    stored: str, suffix: str, field: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=message) as caught:
        texts(stored + suffix, field=field)
    assert stored + suffix in str(caught.value)


def test_name_config_and_split_are_passed_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"other": [1, 2], "text": ["one", None]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hf:a/b", "hf:a/b:en", "hf:a/b:en:test[:10%]"):
        with pytest.raises(ValueError, match="row 2: the field 'text' must be a string; got null"):
            texts(source)
    assert asked == [("a/b", None, "train"), ("a/b", "en", "train"), ("a/b", "en", "test[:10%]")]
    with pytest.raises(ValueError, match="got 'hf:'; accepted are hf:NAME, hf:NAME:CONFIG and hf:NAME:CONFIG:SPLIT"):
        texts("hf:")


@pytest.mark.parametrize(("source", "missing"), [("hf:a/b", "datasets"), ("data.parquet", "pyarrow")])
def test_a_library_that_is_not_installed(
    tmp_path: Path, source: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path, "text", TEXTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(ImportError, match=rf"^{source}: .*; pip install 'gptcore\[data\]'$"):
        texts(source)


# --- Fetched texts


def test_fetched_texts_are_sources_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcore.assets.download.cache_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="'shakespeare' has not been fetched; run: gptcore fetch shakespeare"):
        texts("shakespeare")
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare/.sha256").write_text(assets.CATALOGUE["shakespeare"].sha256)
    (tmp_path / "shakespeare/1_gut.txt").write_text("To be")
    assert texts("shakespeare") == ["To be"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("a file; what is fetched under this name is not text")
    assert texts("digits") == [(tmp_path / "digits").read_text()]


# --- prepare


@WRITERS
def test_prepare_takes_records(tmp_path: Path, write: Write) -> None:
    values = [f"record {i} of many, counted {i * i} times" for i in range(60)]
    path = write(tmp_path, "body", ["", *values, ""])
    options = {"vocab_size": 270, "field": "body", "progress": False}
    report = prepare(path, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert report.empty_documents == 2
    assert "2 documents without text were left out" in str(report)
    assert (report.train.documents + report.val.documents) == 60
    assert read_report(tmp_path / "out") == report
    tokenizer = Tokenizer.load(tmp_path / "out")
    found = [tokenizer.decode(open_split(tmp_path / "out", name).tokens) for name in ("train", "val")]
    assert sorted("".join(found).split(END_OF_TEXT)) == sorted([*values, ""])
    assert prepare(path, tmp_path / "out", **options).reused  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="field='body', not 'text'"):
        prepare(path, tmp_path / "out", vocab_size=270, progress=False)


def test_records_are_split_as_files_with_the_same_texts_are(tmp_path: Path) -> None:
    values = [f"document {i}, the {i}th" for i in range(60)]
    (tmp_path / "files").mkdir()
    for i, value in enumerate(values):
        (tmp_path / f"files/{i:02}.txt").write_text(value)
    reports = [
        prepare(source, tmp_path / f"out{i}", vocab_size=270, progress=False)
        for i, source in enumerate([tmp_path / "files", json_lines("a.jsonl")(tmp_path, "text", values)])
    ]
    assert (reports[0].train, reports[0].val) == (reports[1].train, reports[1].val)
    for name in ("train-00000.bin", "val-00000.bin", "tokenizer.json"):
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes()


def test_planning_the_split_keeps_no_text_in_memory(tmp_path: Path) -> None:
    path = json_lines("a.jsonl")(tmp_path, "text", [f"{i}" * 20_000 for i in range(300)])  # 17 MB
    tracemalloc.start()
    split = plan_split(documents(path), 0.1, lambda _: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(split.sides), split.empty) == (300, 0)
    assert peak < 2_000_000


def test_an_error_if_the_number_of_records_changes_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = json_lines("a.jsonl")(tmp_path, "text", [f"document {i}" for i in range(9)])

    def then_shrink(*arguments: Any) -> Any:
        found = plan_split(*arguments)
        json_lines("a.jsonl")(tmp_path, "text", ["document 0", "document 1"])
        return found

    monkeypatch.setattr(prepare_module, "plan_split", then_shrink)
    with pytest.raises(RuntimeError, match="the sources changed while they were being read; run it again"):
        prepare(path, tmp_path / "out", vocab_size=270, progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl"]


def test_the_command_takes_a_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = json_lines("a.jsonl")(tmp_path, "body", [f"document {i}, the {i}th" for i in range(40)])
    arguments = ["prepare", str(path), "--out", str(tmp_path / "out"), "--vocab-size", "260"]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"gptcore: error: {path}, line 1: has no field 'text'; its fields are id, body"
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--field", "body"])
    assert read_report(tmp_path / "out").train.documents > 20
