"""`prepare`: the split, the counts, when a folder is reused, replaced or refused, and what a failure leaves."""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.data import encode
from gptcore.data import prepare as prepare_module
from gptcore.data.corpus import documents
from gptcore.data.prepare import open_split, prepare
from gptcore.data.report import PrepareReport, read_report
from gptcore.data.token_file import TokenWriter
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer
from tests.gptcore.runs import main

FINGERPRINT = "00112233445566778899aabbccddeeff"


def texts(*sources: str | Path) -> list[str]:
    return ["".join(document.pieces()) for document in documents(sources)]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(sources: object, out_dir: Path, **options: object) -> PrepareReport:
    options = {"vocab_size": 300, "progress": False} | options
    return prepare(sources, out_dir, **options)  # type: ignore[arg-type]


def patch(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:offset] + data + old[offset + len(data) :]


def splits(out_dir: Path) -> list[list[str]]:
    """The documents of the training and the validation split, decoded."""
    tokenizer = Tokenizer.load(out_dir)
    found = []
    for name in ("train", "val"):
        text = tokenizer.decode(open_split(out_dir, name).tokens)
        *whole, rest = text.split(END_OF_TEXT)
        assert rest == ""  # an end-of-text token ends the file
        found.append(whole)
    return found


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of forty different documents."""
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(40):
        words = f"Book {i} tells of the {i}th traveller, who counted {i * i} stars over the old harbour. "
        (folder / f"{i:02}.txt").write_text(words * 5 + "naïve 🙂\n", encoding="utf-8")
    return folder


def test_prepare_writes_shards(library: Path, tmp_path: Path) -> None:
    whole = run(library, tmp_path / "whole")
    report = run(library, tmp_path / "out", shard_tokens=1000)
    assert report.train.shards[:-1] == (1000,) * (report.train.tokens // 1000)
    assert len(report.train.shards) > 2
    assert f"{len(report.train.shards)} shards" in str(report)
    for name, split in ("train", report.train), ("val", report.val):
        assert len(list((tmp_path / "out").glob(f"{name}-*.bin"))) == len(split.shards)
        assert np.array_equal(open_split(tmp_path / "out", name).tokens, open_split(tmp_path / "whole", name).tokens)
    assert (report.train.tokens, report.unigram_entropy) == (whole.train.tokens, whole.unigram_entropy)
    assert read_report(tmp_path / "out") == report
    assert run(library, tmp_path / "out", shard_tokens=1000).reused
    run(library, tmp_path / "out", overwrite=True)  # fewer shards: none of the old ones is left
    assert names_in(tmp_path / "out") == names_in(tmp_path / "whole")


def test_opening_a_split(library: Path, tmp_path: Path) -> None:
    report = run(library, tmp_path / "out", shard_tokens=1000)
    assert len(open_split(str(tmp_path / "out"), "val")) == report.val.tokens
    with pytest.raises(ValueError, match="split must be 'train' or 'val'; got 'test'"):
        open_split(tmp_path / "out", "test")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"is no prepared corpus: it has no corpus\.json"):
        open_split(tmp_path, "train")
    (tmp_path / "out/train-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no token file at .*train-00001\.bin"):
        open_split(tmp_path / "out", "train")


def test_a_corpus_of_version_1(library: Path, tmp_path: Path) -> None:
    new = run(library, tmp_path / "out")
    out = tmp_path / "out"
    state = json.loads((out / "corpus.json").read_text())
    (out / "corpus.json").write_text(json.dumps(state | {"version": 1}))
    for name in ("train", "val"):
        (out / f"{name}-00000.bin").rename(out / f"{name}.bin")
    message = r"corpus\.json has format version 1, and this gptcore reads 2: prepare again"
    with pytest.raises(ValueError, match=message):
        open_split(out, "train")
    with pytest.raises(FileExistsError, match=rf"cannot be used \(.*{message}\); pass overwrite=True"):
        run(library, out)
    assert run(library, out, overwrite=True) == new
    assert "train.bin" not in names_in(out)


def test_every_document_is_whole_and_in_one_split(library: Path, tmp_path: Path) -> None:
    report = run(library, tmp_path / "out", val_fraction=0.3)
    train, val = splits(tmp_path / "out")
    assert sorted(train + val) == sorted(texts(library))
    assert (report.train.documents, report.val.documents) == (len(train), len(val))
    assert 4 <= len(val) <= 20
    for split, found in ((report.train, train), (report.val, val)):
        assert split.bytes == sum(len(text.encode()) for text in found)
    assert names_in(tmp_path / "out") == ["corpus.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"]
    assert names_in(tmp_path) == ["library", "out"]


def test_the_split_depends_on_neither_order_nor_names(library: Path, tmp_path: Path) -> None:
    run(library, tmp_path / "one")
    other = tmp_path / "other"
    other.mkdir()
    for i, path in enumerate(sorted(library.iterdir())):
        (other / f"{100 - i}.md").write_bytes(path.read_bytes())
    run(other, tmp_path / "two")
    assert [sorted(split) for split in splits(tmp_path / "one")] == [
        sorted(split) for split in splits(tmp_path / "two")
    ]


def test_the_same_corpus_gives_the_same_bytes(library: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(library, tmp_path / name)
    for name in names_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:the largest document")
def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 90 + "zyzzyva " * 25)
    run(tmp_path / "a.txt", tmp_path / "out", vocab_size=265, val_fraction=0.088)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode(" the")) < 4
    assert len(tokenizer.encode(" zyzzyva")) == 8


def test_unigram_entropy_follows_its_formula(library: Path, tmp_path: Path) -> None:
    report = run(library, tmp_path / "out")
    train, val = (open_split(tmp_path / "out", name).tokens.tolist() for name in ("train", "val"))
    counts, total = Counter(train), len(train) + report.vocab_size
    expected = -sum(math.log((counts[token] + 1) / total) for token in val) / len(val)
    assert report.unigram_entropy == pytest.approx(expected, rel=1e-12)
    assert 0 < report.unigram_entropy < math.log(report.vocab_size)


def test_long_corpora_are_encoded_in_batches(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(library, tmp_path / "one")
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 700)
    run(library, tmp_path / "two")
    assert (tmp_path / "one/train-00000.bin").read_bytes() == (tmp_path / "two/train-00000.bin").read_bytes()


def test_a_given_tokenizer_is_used(library: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["another text entirely, of its own " * 9], 270)
    tokenizer.save(tmp_path / "mine.json")
    report = run(library, tmp_path / "out", tokenizer=tmp_path / "mine.json")
    assert (report.vocab_size, report.tokenizer_fingerprint) == (270, tokenizer.fingerprint)
    assert open_split(tmp_path / "out", "val").fingerprint == tokenizer.fingerprint
    assert sum(map(len, splits(tmp_path / "out"))) == 40
    assert run(library, tmp_path / "out", tokenizer=tmp_path / "mine.json", vocab_size=999).reused


class OtherTokenizer:
    """A tokenizer of another class, which may not be called from two threads at once and ends texts its own way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._lock, self.threads = tokenizer, threading.Lock(), set[int]()
        self.vocab_size, self.fingerprint = tokenizer.vocab_size + 1, FINGERPRINT
        self.eot_token = tokenizer.vocab_size

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        assert self._lock.acquire(blocking=False)
        self.threads.add(threading.get_ident())
        ids = self._tokenizer.encode_batch(texts)
        self._lock.release()
        return ids

    def save(self, path: Path) -> None:
        self._tokenizer.save(path)


def test_a_tokenizer_of_another_class(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (library / "empty.txt").write_text("")
    inner = Tokenizer.train(["another text entirely, of its own " * 9], 270)
    other = OtherTokenizer(inner)
    monkeypatch.setattr(prepare_module, "get_tokenizer", lambda _: other)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 300)
    report = run(library, tmp_path / "out", tokenizer="other")
    assert report.tokenizer_fingerprint == open_split(tmp_path / "out", "val").fingerprint == FINGERPRINT
    assert len(other.threads) == 1
    read = []
    for name in ("train", "val"):
        ids = open_split(tmp_path / "out", name).tokens
        ends = np.flatnonzero(ids == 270)
        assert ends[-1] == len(ids) - 1
        read += [inner.decode(part[part != 270]) for part in np.split(ids, ends[:-1] + 1)]
    assert sorted(["", *read]) == sorted(texts(library))


@settings(deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from([END_OF_TEXT, f"a {END_OF_TEXT}b\r\n\n  c", ""]))
def test_encode_array_gives_the_ids_of_encode(text: str) -> None:
    tokenizer = Tokenizer.train(["an endless text of the end, and then the end " * 3], 270)
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == tokenizer.encode(text) == tokenizer.encode_batch([text])[0]


def test_the_report_can_be_read_back_and_printed(library: Path, tmp_path: Path) -> None:
    report = run([library], tmp_path / "out")
    assert read_report(tmp_path / "out") == report
    stored = json.loads((tmp_path / "out/corpus.json").read_text())
    assert (
        stored["bytes_per_token"]
        == report.bytes_per_token
        == pytest.approx((report.train.bytes + report.val.bytes) / (report.train.tokens + report.val.tokens))
    )
    assert f"{report.train.tokens:,} tokens" in str(report)
    assert f"{report.unigram_entropy:.4f} nats" in str(report)


def test_the_report_counts_unread_files(library: Path, tmp_path: Path) -> None:
    for name in ("a.html", "[bold]b.html", ":smile:.JSON"):
        (library / name).write_text("not read")
    report = run(library, tmp_path / "out")
    assert report.unread_files == read_report(tmp_path / "out").unread_files == {".html": 2, ".json": 1}
    assert "  not read in folders: 2 .html, 1 .json (to read them, name the files or give a glob)\n" in str(report)
    assert "not read" not in str(run(library / "*.txt", tmp_path / "named"))


def test_a_tilde_stands_for_the_home_folder(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Tokenizer.train(["another text entirely, of its own " * 9], 270).save(tmp_path / "mine.json")
    report = run("~/library", Path("~/out"), tokenizer="~/mine.json")
    assert (report.vocab_size, report.out_dir) == (270, tmp_path / "out")


def test_preparing_again_does_nothing(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(library, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    def never(*_: object, **__: object) -> Iterator[object]:
        raise AssertionError("the corpus was read again")

    monkeypatch.setattr(prepare_module, "documents", never)
    again = run(library, tmp_path / "out")
    assert again.reused
    assert not first.reused
    assert "already prepared" in str(again)
    assert (again.train, again.val, again.unigram_entropy) == (first.train, first.val, first.unigram_entropy)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 280}, "vocab_size=300, not 280"),
        ({"val_fraction": 0.5}, "val_fraction=0.1, not 0.5"),
        ({"shard_tokens": 99}, "shard_tokens=100000000, not 99"),
    ],
)
def test_another_corpus_is_replaced_only_when_asked(
    library: Path, tmp_path: Path, options: dict[str, float], message: str
) -> None:
    first = run(library, tmp_path / "out")
    with pytest.raises(FileExistsError, match=rf"{message}; pass overwrite=True"):
        run(library, tmp_path / "out", **options)
    assert read_report(tmp_path / "out") == first
    second = run(library, tmp_path / "out", overwrite=True, **options)
    assert read_report(tmp_path / "out") == second != first
    assert names_in(tmp_path) == ["library", "out"]


def test_changed_sources_are_noticed(library: Path, tmp_path: Path) -> None:
    run(library, tmp_path / "out")
    (library / "new.txt").write_text("one more")
    with pytest.raises(FileExistsError, match="other sources, or these before they changed; pass overwrite=True"):
        run(library, tmp_path / "out")


def other_tokenizer() -> bytes:
    """The file of a tokenizer that no test's corpus has."""
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(["zyzzyva " * 9], 258).save(Path(folder) / "tokenizer.json")
        return (Path(folder) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000.bin", lambda data: data[:-2], "train-00000.bin is truncated"),
        ("val-00000.bin", lambda data: b"", "val-00000.bin is not a token file"),
        ("val-00000.bin", patch(24, b"\0"), "val-00000.bin was made with another tokenizer than corpus.json says"),
        ("tokenizer.json", lambda _: other_tokenizer(), "tokenizer.json is another tokenizer than corpus.json says"),
        ("tokenizer.json", lambda data: data[:99], "is not a tokenizer file, or is truncated"),
        ("corpus.json", lambda data: data[:99], "corpus.json is truncated or damaged"),
        ("corpus.json", lambda data: b"{}", "is not the report of a prepared corpus"),
        ("corpus.json", lambda data: data.replace(b'"train"', b'"trian"'), "corpus.json is damaged"),
        (
            "corpus.json",
            lambda data: data.replace(b'"tokens": ', b'"tokens": 1'),
            "damaged: .*shards of .* do not make",
        ),
    ],
)
def test_a_damaged_corpus_is_not_reused(
    library: Path, tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    first = run(library, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileExistsError, match=rf"holds a corpus that cannot be used \(.*{message}"):
        run(library, tmp_path / "out")
    assert run(library, tmp_path / "out", overwrite=True) == first


def test_a_missing_part_is_damage(library: Path, tmp_path: Path) -> None:
    run(library, tmp_path / "out")
    (tmp_path / "out/val-00000.bin").unlink()
    with pytest.raises(FileExistsError, match=r"cannot be used \(there is no token file at .*val-00000\.bin"):
        run(library, tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_things_is_left_alone(library: Path, tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds something else \(thesis\.doc\); choose another folder"):
        run(library, out, overwrite=overwrite)
    (out / "thesis.doc").rename(tmp_path / "thesis.doc")
    run(library, out)  # an empty folder is free to use
    (tmp_path / "thesis.doc").rename(out / "thesis.doc")
    with pytest.raises(FileExistsError, match=r"holds something else \(thesis\.doc\)"):
        run(library, out, overwrite=overwrite)
    assert (out / "thesis.doc").read_text() == "precious"


def test_out_dir_that_is_a_file(library: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file; give the name of a new folder"):
        run(library, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_leaves_what_was_there(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    overwrite: bool,
) -> None:
    before = run(library, tmp_path / "out") if overwrite else None
    write, calls = TokenWriter.write, []

    def interrupted(self: TokenWriter, tokens: np.ndarray) -> None:
        calls.append(len(tokens))
        if len(calls) == 20:
            raise error
        write(self, tokens)

    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 1)  # a write for each document
    monkeypatch.setattr(TokenWriter, "write", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)):
        run(library, tmp_path / "out", vocab_size=280, overwrite=overwrite)
    assert len(calls) == 20
    assert names_in(tmp_path) == (["library", "out"] if overwrite else ["library"])
    if overwrite:
        assert read_report(tmp_path / "out") == before
        monkeypatch.undo()
        assert run(library, tmp_path / "out").reused


def test_a_failed_swap_puts_the_old_corpus_back(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(library, tmp_path / "out")
    rename, calls = Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("rename failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="rename failed"):
        run(library, tmp_path / "out", vocab_size=280, overwrite=True)
    assert names_in(tmp_path) == ["library", "out"]
    assert read_report(tmp_path / "out") == before


def test_an_error_if_sources_change_while_they_are_read(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(sources: list[str], *, field: str) -> Iterator[object]:
        yield from documents(sources, field=field)
        (library / "late.txt").write_text("late")

    monkeypatch.setattr(prepare_module, "documents", changing)
    with pytest.raises(RuntimeError, match="changed while they were being read"):
        run(library, tmp_path / "out")
    assert names_in(tmp_path) == ["library"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"val_fraction": 0.0}, ValueError, "val_fraction must be greater than 0 and less than 1; got 0.0"),
        ({"val_fraction": 1.0}, ValueError, "got 1.0"),
        ({"val_fraction": float("nan")}, ValueError, "got nan"),
        ({"shard_tokens": 0}, ValueError, "shard_tokens must be at least 1; got 0"),
        ({"vocab_size": 256}, ValueError, "vocab_size must be at least 257; got 256"),
        ({"tokenizer": "gpt5"}, FileNotFoundError, "tokenizer must be 'gpt2'.*got 'gpt5'"),
    ],
)
def test_settings_out_of_range(
    library: Path, tmp_path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(library, tmp_path / "out", **options)
    assert names_in(tmp_path) == ["library"]


def test_an_invalid_file_stops_it_before_anything_is_written(library: Path, tmp_path: Path) -> None:
    (library / "zz.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"zz\.txt is not valid UTF-8: byte 0xe9 at offset 3"):
        run(library, tmp_path / "new" / "out")
    assert names_in(tmp_path) == ["library"]


def test_progress_goes_to_standard_error(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(library, tmp_path / "out", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    for step in ("Reading", "Training the tokenizer", "Encoding"):
        assert step in shown.err
    run(library, tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""


def test_read_report_of_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no prepared corpus: it has no corpus\.json"):
        read_report(tmp_path)


def test_file_names_with_any_bytes_and_signs_are_shown_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[bold]:smile: $$"
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))  # no UTF-8
    path.write_text("some text of no great length\n" * 40)
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            main(["prepare", str(path), "--out", str(tmp_path / "out"), "--vocab-size", "258"])
        assert f"{folder}/caf?.txt\n" in capsys.readouterr().out
    assert read_report(tmp_path / "out").sources == (str(path),)
