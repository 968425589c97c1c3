"""Reading a corpus: which files are read, in which order and pieces, and which errors bad sources give."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcore.data import corpus as corpus_module
from gptcore.data.corpus import documents, sources_state, unread_files
from gptcore.data.python_docs import docstrings


def texts(*sources: str | Path) -> list[str]:
    return ["".join(document.pieces()) for document in documents(sources)]


def test_a_folder_is_read_in_order_and_without_other_files(tmp_path: Path) -> None:
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


def test_gzipped_text_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_PIECE_BYTES", 30)
    text = "naïve line\n" * 9
    for name in ("a.txt.gz", "b.MD.GZ", "c.log.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    assert texts(tmp_path) == [text] * 2
    assert texts(tmp_path / "c.log.gz") == [text]
    (tmp_path / "a.txt.gz").write_bytes((tmp_path / "a.txt.gz").read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"a\.txt\.gz is truncated or damaged"):
        texts(tmp_path)
    (tmp_path / "a.txt.gz").write_text("plain")
    with pytest.raises(ValueError, match=r"a\.txt\.gz is truncated or damaged: Not a gzipped file"):
        texts(tmp_path)


def test_unread_files_of_folders_are_counted(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    folder = tmp_path / "folder"
    for name in (
        "a.txt",
        "sub/i.txt",
        "b.html",
        "sub/c.HTML",
        "sub/d.json",
        "sub/e.tar.gz",
        "Makefile",
        ".git/f.html",
        ".g.html",
        "h.csv",
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    elsewhere.mkdir()
    (folder / "link.txt").symlink_to(elsewhere)
    (folder / "sub/loop").symlink_to(folder)
    (folder / "circle.html").symlink_to(folder / "circle.html")
    (folder / "dangling.html").symlink_to(folder / "nowhere")
    counts = {".html": 4, "link to a folder": 2, ".csv": 1, ".gz": 1, ".json": 1, "no ending": 1}
    assert unread_files([folder, folder / "sub"]) == counts
    assert list(unread_files(folder)) == list(counts)
    assert unread_files([folder, folder / "h.csv", folder / "*.html", "python-docs"]) == (
        {".html": 3, "link to a folder": 2, ".gz": 1, ".json": 1, "no ending": 1}
    )
    assert unread_files(folder / "*") == {}
    assert texts(folder) == ["a.txt", "sub/i.txt"]


def test_a_tilde_stands_for_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text("at home")
    assert texts("~/books") == texts("~/books/*.txt") == texts(Path("~/books/a.txt")) == ["at home"]
    assert unread_files("~/books") == {}


def test_a_file_whose_name_is_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    assert texts(tmp_path / "a[1].txt") == ["brackets"]


def test_one_source_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alone")
    assert ["".join(document.pieces()) for document in documents(str(tmp_path / "a.txt"))] == ["alone"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])
@given(text=st.text(alphabet="ab \n\r\té日🙂", max_size=60), size=st.integers(5, 30))
def test_pieces_are_no_longer_than_the_limit_and_lose_nothing(tmp_path: Path, text: str, size: int) -> None:
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


def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(tmp_path: Path) -> None:
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
    with pytest.raises(
        FileNotFoundError,
        match=r"has no text files \(looked for .*\.txt\); it holds \.png: to read other files, name them",
    ):
        list(documents(tmp_path))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        texts(tmp_path)


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "circle.txt").symlink_to(tmp_path / "circle.txt")
    for read in texts, sources_state:
        with pytest.raises(OSError, match=r"circle\.txt"):
            read(tmp_path)


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


def test_the_state_changes_with_the_files(tmp_path: Path) -> None:
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
    assert docstrings(source.encode()) == (f"{long}\n\nIndented.\n\nSecond. {long}\n\nThird. {long} \\d\n")


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
