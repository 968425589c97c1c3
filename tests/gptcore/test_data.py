"""From text to token files: what is read, written and refused, and what an interruption leaves."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcore.data import corpus as corpus_module
from gptcore.data import prepare as prepare_module
from gptcore.data.corpus import documents, sources_state
from gptcore.data.prepare import PrepareReport, open_split, prepare, read_report
from gptcore.data.token_file import ShardWriter, TokenFile, TokenWriter
from gptcore.tokenizer import END_OF_TEXT, Tokenizer

FINGERPRINT = "00112233445566778899aabbccddeeff"
HEADER = 40


def write_tokens(path: Path, tokens: list[int], vocab_size: int = 1000) -> TokenFile:
    with TokenWriter(path, vocab_size=vocab_size, fingerprint=FINGERPRINT) as writer:
        writer.write(tokens)
    return TokenFile.open(path)


def texts(*sources: str | Path) -> list[str]:
    return ["".join(document.pieces()) for document in documents(sources)]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(sources: object, out_dir: Path, **options: object) -> PrepareReport:
    options = {"vocab_size": 300, "progress": False} | options
    return prepare(sources, out_dir, **options)  # type: ignore[arg-type]


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


# --- Token files


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    vocab_size=st.sampled_from([1, 300, 65536, 65537, 2**32 - 1]),
    chunks=st.lists(st.lists(st.integers(0, 2**32)), max_size=5),
)
def test_token_file_round_trip(tmp_path: Path, vocab_size: int, chunks: list[list[int]]) -> None:
    chunks = [[token % vocab_size for token in chunk] for chunk in chunks]
    path = tmp_path / "tokens.bin"
    with TokenWriter(path, vocab_size=vocab_size, fingerprint=FINGERPRINT) as writer:
        for chunk in chunks:
            writer.write(chunk)
    file = TokenFile.open(path)
    expected = [token for chunk in chunks for token in chunk]
    assert file.tokens.tolist() == expected
    assert len(file) == writer.count == len(expected)
    assert (file.vocab_size, file.fingerprint) == (vocab_size, FINGERPRINT)
    assert file.tokens.dtype == ("<u2" if vocab_size <= 65536 else "<u4")


def test_the_bytes_of_a_token_file(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t.bin", [1, 258], vocab_size=300)
    expected = struct.pack("<8sHHIQ16sHH", b"gpttoken", 1, 2, 300, 2, bytes.fromhex(FINGERPRINT), 1, 258)
    assert (tmp_path / "t.bin").read_bytes() == expected


def test_an_exception_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, [1, 2, 3])

    def interrupted() -> None:
        with TokenWriter(path, vocab_size=9, fingerprint=FINGERPRINT) as writer:
            writer.write([4, 5])
            assert len(names_in(tmp_path)) == 2  # the temporary file is beside it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == ["t.bin"]
    assert TokenFile.open(path).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([0, 9], ValueError, r"token id 9 is not in the vocabulary \(0 to 8\)"),
        ([-1], ValueError, "token id -1 is not"),
        ([0.5], TypeError, "must be integers; got float64"),
        ([[1, 2]], ValueError, r"must be 1-D; got the shape \(1, 2\)"),
    ],
)
def test_bad_tokens_are_refused_and_no_file_is_left(
    tmp_path: Path, tokens: list[int], error: type[Exception], message: str
) -> None:
    with (
        pytest.raises(error, match=message),
        TokenWriter(tmp_path / "t.bin", vocab_size=9, fingerprint=FINGERPRINT) as writer,
    ):
        writer.write(tokens)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("vocab_size", [0, -1, 2**32])
def test_writer_refuses_a_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size must be in 1 to .*got {vocab_size}"):
        TokenWriter(tmp_path / "t.bin", vocab_size=vocab_size, fingerprint=FINGERPRINT)


@pytest.mark.parametrize("fingerprint", ["", "abcd", "z" * 32])
def test_writer_refuses_a_fingerprint(tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(ValueError, match="fingerprint must be 32 hexadecimal digits"):
        TokenWriter(tmp_path / "t.bin", vocab_size=9, fingerprint=fingerprint)


def patch(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:offset] + data + old[offset + len(data) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda old: old[:-1], "is truncated: 3 tokens make 46 bytes, but it has 45"),
        (lambda old: old[:HEADER], "is truncated: 3 tokens make 46 bytes, but it has 40"),
        (lambda old: old + b"\0\0", "is damaged: 3 tokens make 46 bytes, but it has 48"),
        (lambda old: old[:20], "is truncated: its header has 20 bytes of 40"),
        (lambda old: b"", "is not a token file"),
        (patch(0, b"\x93NUMPY"), "is not a token file: it begins with b'.x93NUMPYen'"),
        (patch(8, b"\x02"), "has format version 2; this gptcore reads 1"),
        (patch(10, b"\x03"), "is damaged: it says 3 bytes per token"),
        (patch(10, b"\x04"), "is truncated: 3 tokens make 52 bytes"),
        (patch(16, b"\xff" * 8), "is truncated: 18446744073709551615 tokens"),
    ],
)
def test_opening_a_damaged_token_file(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, [1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        TokenFile.open(path)
    assert str(path) in str(caught.value)


def test_opening_a_missing_token_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no token file at .*t\.bin"):
        TokenFile.open(tmp_path / "t.bin")


def test_batches_are_windows_and_their_successors(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t.bin", [7 * i for i in range(12)])
    x, y = file.batch(400, 9, torch.Generator().manual_seed(1))
    assert x.dtype == y.dtype == torch.int64
    starts = x[:, :1] // 7
    assert torch.equal(x, 7 * (starts + torch.arange(9)))
    assert torch.equal(y, x + 7)
    assert set(starts.flatten().tolist()) == {0, 1, 2}  # each possible start, the last one included


def test_batches_repeat_with_the_generator(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "t.bin", list(range(500)))
    first, again, other = (file.batch(8, 16, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_windows_cover_the_file_once(tmp_path: Path, batch_size: int) -> None:
    file = write_tokens(tmp_path / "t.bin", list(range(23)))
    batches = list(file.windows(4, batch_size))
    x, y = (torch.cat(part) for part in zip(*batches))
    assert torch.equal(x, torch.arange(20).reshape(5, 4))
    assert torch.equal(y, torch.arange(1, 21).reshape(5, 4))
    assert all(len(part) == batch_size for part, _ in batches[:-1])


@pytest.mark.parametrize("use", [lambda file: file.batch(1, 8), lambda file: file.windows(8)])
def test_a_file_shorter_than_a_window(tmp_path: Path, use: Callable[[TokenFile], object]) -> None:
    file = write_tokens(tmp_path / "t.bin", list(range(8)))
    with pytest.raises(ValueError, match="has 8 tokens; context=8 needs at least 9"):
        use(file)
    longer = write_tokens(tmp_path / "u.bin", list(range(9)))
    assert longer.batch(1, 8)[0].tolist() == [list(range(8))]
    assert [x.tolist() for x, _ in longer.windows(8)] == [[list(range(8))]]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda file: file.batch(0, 2), "batch_size must be at least 1; got 0"),
        (lambda file: file.batch(1, 0), "context must be at least 1; got 0"),
        (lambda file: file.windows(0), "context must be at least 1; got 0"),
        (lambda file: file.windows(2, -1), "batch_size must be at least 1; got -1"),
    ],
)
def test_windows_of_no_size(tmp_path: Path, use: Callable[[TokenFile], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(write_tokens(tmp_path / "t.bin", [1, 2, 3]))


def test_a_token_past_the_vocabulary_is_found_when_used(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokens(path, [1, 2, 3], vocab_size=10)
    path.write_bytes(patch(HEADER + 4, b"\x0a")(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged: it holds token id 10; its vocabulary has 10"):
        TokenFile.open(path).batch(4, 2)


# --- Shards


def write_shards(folder: Path, counts: list[int], shard_tokens: int, name: str = "t") -> ShardWriter:
    """Shards of the ids 0, 1, 2, ..., written in pieces of so many."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, name, shard_tokens, vocab_size=1000, fingerprint=FINGERPRINT) as writer:
        start = 0
        for count in counts:
            writer.write(np.arange(start, start + count))
            start += count
    return writer


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 30), max_size=6), shard_tokens=st.integers(1, 40))
def test_shards_are_one_text_cut_anywhere(counts: list[int], shard_tokens: int) -> None:
    total = sum(counts)
    with tempfile.TemporaryDirectory() as name:
        shards = write_shards(Path(name), counts, shard_tokens).shards
        full, rest = divmod(total, shard_tokens)
        assert shards == tuple([shard_tokens] * full + [rest] * (rest > 0 or total == 0))
        assert names_in(Path(name)) == [f"t-{i:05}.bin" for i in range(len(shards))]
        file = TokenFile.open_shards(name, "t", shards)
        assert len(file) == total
        assert file.tokens.tolist() == list(range(total))
        for start in range(0, total, 7):
            for stop in (start, start + 1, (start + total) // 2, total):
                assert file.read(start, stop).tolist() == list(range(start, stop))


@pytest.mark.parametrize("shard_tokens", [1, 4, 5, 22, 23, 24])
def test_windows_and_batches_do_not_see_the_borders(tmp_path: Path, shard_tokens: int) -> None:
    whole = write_tokens(tmp_path / "t.bin", list(range(23)))
    file = TokenFile.open_shards(tmp_path, "t", write_shards(tmp_path, [23], shard_tokens).shards)
    for batch_size in (1, 3):
        for (x, y), (want_x, want_y) in zip(file.windows(4, batch_size), whole.windows(4, batch_size), strict=True):
            assert torch.equal(x, want_x)
            assert torch.equal(y, want_y)
    for rows in (slice(None), slice(2, 5)):
        drawn, wanted = (f.batch(64, 6, torch.Generator().manual_seed(5), rows) for f in (file, whole))
        assert torch.equal(drawn[0], wanted[0])
        assert torch.equal(drawn[1], wanted[1])
    with pytest.raises(ValueError, match="has 23 tokens; context=23 needs at least 24"):
        file.batch(1, 23)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (Path.unlink, FileNotFoundError, r"there is no token file at .*t-00001\.bin"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), ValueError, r"t-00001\.bin is truncated: 4 tokens"),
        (lambda path: write_tokens(path, [1, 2, 3]), ValueError, r"t-00001\.bin has 3 tokens; it must have 4"),
        (
            lambda path: write_tokens(path, [1] * 4, 999),
            ValueError,
            r"t-00001\.bin was .* another tokenizer than .*00000",
        ),
    ],
)
def test_a_bad_shard_is_named(
    tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    shards = write_shards(tmp_path, [10], 4).shards
    spoil(tmp_path / "t-00001.bin")
    with pytest.raises(error, match=message):
        TokenFile.open_shards(tmp_path, "t", shards)


def test_an_exception_keeps_whole_shards_alone(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "t", 4, vocab_size=9, fingerprint=FINGERPRINT) as writer:
            writer.write(np.arange(6))
            writer.write(np.array([9]))

    with pytest.raises(ValueError, match="token id 9 is not in the vocabulary"):
        interrupted()
    assert names_in(tmp_path) == ["t-00000.bin"]
    assert TokenFile.open(tmp_path / "t-00000.bin").tokens.tolist() == [0, 1, 2, 3]


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


# --- The corpus


def test_a_folder_is_read_in_order_and_only_its_texts(tmp_path: Path) -> None:
    for name in ("b.txt", "a.MD", "sub/c.py", "d.png", ".hidden.txt", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.MD", "b.txt", "sub/c.py"]


def test_globs_and_files_take_any_suffix_and_each_file_comes_once(tmp_path: Path) -> None:
    for name in ("a.log", "b.log", "c.txt", "deep/er/d.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.log") == ["a.log", "b.log"]
    assert texts(tmp_path / "**/*.log") == ["a.log", "b.log", "deep/er/d.log"]
    assert texts(tmp_path / "b.log", tmp_path / "*.log", tmp_path) == ["b.log", "a.log", "c.txt"]


def test_a_file_whose_name_is_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    assert texts(tmp_path / "a[1].txt") == ["brackets"]


def test_one_source_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alone")
    assert ["".join(document.pieces()) for document in documents(str(tmp_path / "a.txt"))] == ["alone"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])
@given(text=st.text(alphabet="ab \n\r\té日🙂", max_size=60), size=st.integers(5, 30))
def test_pieces_are_bounded_and_lose_nothing(tmp_path: Path, text: str, size: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus_module, "_PIECE_BYTES", size)
        [document] = documents(path)
        pieces = list(document.pieces())
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= size for piece in pieces)
    for piece in pieces[:-1]:  # only a line that is longer than a piece is cut
        assert piece.endswith("\n") or "\n" not in piece


def test_a_byte_order_mark_is_not_text_and_line_ends_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
    assert texts(tmp_path) == ["one\r\ntwo\n", ""]


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"caf\xc3\xa9\n" * 100_000, b"x" * 600_000])
@pytest.mark.parametrize(("wrong", "at"), [(b"\xff", 0), (b"ok \xe9t\xe9", 3), (b"\xf0\x9f\x99", 0)])
def test_invalid_utf8_is_found_at_its_offset(tmp_path: Path, before: bytes, wrong: bytes, at: int) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(before + wrong)
    message = rf"latin\.txt is not valid UTF-8: byte 0x{wrong[at]:02x} at offset {len(before) + at} "
    with pytest.raises(ValueError, match=message):
        texts(path)


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([], ValueError, "sources must name a file.*got none"),
        (["no/such/file.txt"], FileNotFoundError, "source 'no/such/file.txt' is no file and no folder"),
        (["*.nothing"], FileNotFoundError, "as a glob it matches no file"),
    ],
)
def test_sources_that_name_nothing(sources: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(documents(sources))


def test_a_folder_without_texts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has no text files \(looked for .*\.txt"):
        list(documents(tmp_path))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        texts(tmp_path)


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        list(documents(tmp_path))


def test_state_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = sources_state(tmp_path)
    assert sources_state([tmp_path, tmp_path / "a.txt"]) == before
    (tmp_path / "b.txt").write_text("b")
    more = sources_state(tmp_path)
    (tmp_path / "b.txt").write_text("bb")
    assert len({before, more, sources_state(tmp_path), sources_state("python-docs")}) == 4


def test_docstrings_are_read_in_order_without_the_short_ones() -> None:
    long = "Counts the stars that can be seen over the harbour on a clear night, without a glass."
    source = f'''
import does_not_exist
class Sky:
    """{long}

        Indented."""
    def short(self):
        """Too short."""
    async def count(self):
        """Second. {long}"""
def last():
    """Third. {long} \\d"""
'''
    assert corpus_module._docstrings(source.encode()) == (
        f"{long}\n\nIndented.\n\nSecond. {long}\n\nThird. {long} \\d\n"
    )


def test_python_docs_are_prose_in_a_fixed_order() -> None:
    found = list(documents("python-docs"))
    names = [document.name for document in found]
    modules = [name for name in names if "topics/" not in name]
    assert names == sorted(modules) + sorted(set(names) - set(modules))
    assert len(set(names)) == len(names)
    assert "python-docs:argparse.py" in names
    assert "python-docs:topics/lambda" in names
    assert not [name for name in names if {"test", "tests", "idle_test"} & set(name[12:].split("/")[:-1])]
    size = sum(len(piece.encode()) for document in found for piece in document.pieces())
    assert 1_500_000 < size < 4_000_000
    json_text = "".join(found[names.index("python-docs:json/__init__.py")].pieces())
    assert json_text.startswith("JSON (JavaScript Object Notation) <")
    assert "Serialize ``obj`` to a JSON formatted ``str``." in json_text


# --- prepare


def test_every_document_is_in_one_split_whole(library: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_no_split_is_empty(library: Path, tmp_path: Path, count: int, val_fraction: float) -> None:
    run(sorted(library.iterdir())[:count], tmp_path / "out", val_fraction=val_fraction)
    train, val = splits(tmp_path / "out")
    assert sorted([len(train), len(val)]) == [1, count - 1]


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_document_is_cut_by_position(tmp_path: Path, copies: int) -> None:
    text = "".join(f"line {i} of the only document, é\n" for i in range(50_000))  # several pieces
    (tmp_path / "text").mkdir()
    for i in range(copies):
        (tmp_path / "text" / f"{i}.txt").write_text(text, encoding="utf-8")
    report = run(tmp_path / "text", tmp_path / "out", val_fraction=0.25)
    train, val = splits(tmp_path / "out")
    cut = len(text) - round(len(text) * 0.25)
    assert (train, val) == ([text[:cut]] * copies, [text[cut:]] * copies)
    assert report.train.bytes + report.val.bytes == copies * len(text.encode())


@pytest.mark.filterwarnings("ignore:the corpus has too few pairs")
def test_the_shortest_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    run(tmp_path / "a.txt", tmp_path / "out")
    assert splits(tmp_path / "out") == [["a"], ["b"]]


@pytest.mark.parametrize(("text", "message"), [("", "corpus is empty"), ("a", "too short to split: it has 1 char")])
def test_a_corpus_of_next_to_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.txt", tmp_path / "out")
    assert names_in(tmp_path) == ["a.txt"]


def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 90 + "zyzzyva " * 25)
    run(tmp_path / "a.txt", tmp_path / "out", vocab_size=265, val_fraction=0.088)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert len(tokenizer.encode(" the")) < 4
    assert len(tokenizer.encode(" zyzzyva")) == 8


def test_unigram_entropy_is_its_formula(library: Path, tmp_path: Path) -> None:
    report = run(library, tmp_path / "out")
    train, val = (open_split(tmp_path / "out", name).tokens.tolist() for name in ("train", "val"))
    counts, total = Counter(train), len(train) + report.vocab_size
    expected = -sum(math.log((counts[token] + 1) / total) for token in val) / len(val)
    assert report.unigram_entropy == pytest.approx(expected, rel=1e-12)
    assert 0 < report.unigram_entropy < math.log(report.vocab_size)


def test_long_corpora_are_encoded_in_batches(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(library, tmp_path / "one")
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 700)
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
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 300)
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
def test_an_array_is_the_encoding(text: str) -> None:
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

    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 1)  # a write for each document
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


def test_sources_that_change_meanwhile(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert names_in(tmp_path) == ["library", "new"]
    assert names_in(tmp_path / "new") == []


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
