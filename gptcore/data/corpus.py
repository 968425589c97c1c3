"""Reads a corpus: a stream of documents from files, folders, globs, datasets and Python's own documentation.

A :class:`Document` yields its text in pieces, so that a corpus may be larger than memory. Only JSON arrays are read
whole.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gptcore import _extras, assets
from gptcore.data.python_docs import PYTHON_DOCS, python_texts
from gptcore.data.readers import (
    BYTE_ORDER_MARK,
    HUGGING_FACE,
    RECORD_SUFFIXES,
    dataset_state,
    holds_records,
    open_bytes,
    read_dataset,
    read_records,
    require_packages,
)

# fmt: off
TEXT_SUFFIXES = frozenset([
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs",
    ".sh", ".sql", ".jl", ".lua", ".rb",
])
# fmt: on
"""A folder's files with these endings are read as text. A file that is named, or that a glob matches, may have any."""

_PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class Document:
    """One text of a corpus: a file, a record, or one module or topic of ``python-docs``.

    Each call of ``pieces()`` yields the whole text again, in strings of at most 256 KiB.
    """

    name: str
    pieces: Callable[[], Iterator[str]]


def documents(sources: str | Path | Sequence[str | Path], *, field: str = "text") -> Iterator[Document]:
    """Yield the documents of a corpus, in the order of its sources; within a source, sorted by path.

    A source is one of the following. A file that several sources name is read once.

    - A file. A file of records (its name ends with one of :data:`~gptcore.data.readers.RECORD_SUFFIXES`, or with
      ``.json`` and it holds an array) gives one document per record; any other file is one document. A name that ends
      with ``.gz`` is decompressed.
    - A folder. All its files, at any depth, that hold records or end with one of :data:`TEXT_SUFFIXES` are read,
      compressed with gzip or not. Not read are names that begin with a dot, links to folders, and other files,
      ``.json`` among them because it mostly holds settings; :func:`unread_files` counts these.
    - A glob such as ``"books/**/*.txt"``. It matches files with any ending.
    - ``"python-docs"``: the documentation that comes with Python (:mod:`gptcore.data.python_docs`), one document per
      module and per help topic.
    - The name of a corpus that ``gptcore fetch`` downloaded, such as ``"shakespeare"``.
    - ``"hf:NAME"``, ``"hf:NAME:CONFIG"`` or ``"hf:NAME:CONFIG:SPLIT"``: a Hugging Face dataset, one document per row.
      The split is ``train`` unless it is named.

    Text files are UTF-8. Their pieces end at line breaks, unless a line is longer than a piece. Line endings are kept,
    and a byte order mark is dropped. A file with the name of a corpus is reached as ``./NAME``.

    Args:
        sources: one source or several.
        field: the field of records that holds the text.

    Raises:
        ValueError: if there are no sources, a file is not UTF-8, or a record is bad. The last two are raised when the
            text is read, all other errors before the first document.
        FileNotFoundError: if a source names nothing, a folder has no such file, or a corpus has not been fetched.
        MissingPackageError: if a package that a source needs is not installed.
        RuntimeError: if a dataset cannot be loaded.
        OSError: if a file or folder cannot be read.
    """
    for source, files in _resolve(sources):
        if source == PYTHON_DOCS:
            yield from _in_memory(python_texts())
        elif source.startswith(HUGGING_FACE):
            yield from _in_memory(read_dataset(source, field))
        for path in files:
            if holds_records(path):
                yield from _in_memory(read_records(path, field))
            else:
                yield Document(str(path), partial(_read_pieces, path))


def sources_state(sources: str | Path | Sequence[str | Path]) -> str:
    """A hash, 32 hexadecimal digits, that changes when a file of the corpus is added, removed, renamed or changed.

    Files are compared by path, size and modification time, so this is quick for files of any size; ``python-docs`` is
    compared by Python's version. Raises as :func:`documents` does.
    """
    entries = []
    for source, files in _resolve(sources):
        if source == PYTHON_DOCS:
            entries.append(f"{PYTHON_DOCS} {platform.python_version()}")
        elif source.startswith(HUGGING_FACE):
            entries.append(dataset_state(source))
        for path in files:
            status = path.stat()
            entries.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(entries)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def unread_files(sources: str | Path | Sequence[str | Path]) -> dict[str, int]:
    """Count by ending the files that are not read although they lie in a source's folder, the most frequent first.

    Names that begin with a dot do not count. Raises as :func:`documents` does.
    """
    read = {os.path.realpath(path) for _, files in _resolve(sources) for path in files}
    unread: dict[Path, str] = {}
    for source in source_list(sources):
        if _stands_for_files(source) and (folder := _source_path(source)).is_dir():
            unread |= {path: kind for path, kind in _walk(folder) if kind and os.path.realpath(path) not in read}
    return dict(sorted(Counter(unread.values()).items(), key=lambda item: (-item[1], item[0])))


def source_list(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """The sources as a list of strings. Raises ``ValueError`` if there are none."""
    if isinstance(sources, str | Path):
        sources = [sources]
    if not sources:
        raise ValueError(f"sources must name a file, a folder, a glob, a dataset or {PYTHON_DOCS!r}; got none")
    return [str(source) for source in sources]


def _resolve(sources: str | Path | Sequence[str | Path]) -> list[tuple[str, list[Path]]]:
    """Each source once, with its files that no earlier source named."""
    seen: set[str] = set()
    resolved = []
    for source in dict.fromkeys(source_list(sources)):
        new = []
        if source.startswith(HUGGING_FACE):
            _extras.load("datasets", source)
        for path in _files(source) if _stands_for_files(source) else []:
            if (real := os.path.realpath(path)) not in seen:  # Path.resolve fails on links in a circle
                seen.add(real)
                new.append(path)
                require_packages(path)
        resolved.append((source, new))
    return resolved


def _stands_for_files(source: str) -> bool:
    """Whether a source names files, unlike ``python-docs`` and Hugging Face datasets."""
    return source != PYTHON_DOCS and not source.startswith(HUGGING_FACE)


def _source_path(source: str) -> Path:
    """The path that a source names: itself, or the folder of a fetched corpus."""
    if (entry := assets.CATALOGUE.get(source)) is not None and entry.kind == "text":
        fetched = assets.find(source)
        if fetched is None:
            raise FileNotFoundError(f"source {source!r} has not been fetched; run: gptcore fetch {source}")
        return fetched
    return Path(source).expanduser()


def _files(source: str) -> list[Path]:
    """The files of a source that is a file, a folder, a glob or a fetched corpus, sorted."""
    path = _source_path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = list(_walk(path))
        found = sorted(file for file, unread in files if not unread)
        if not found:
            accepted = ", ".join(sorted([*TEXT_SUFFIXES, *RECORD_SUFFIXES]))
            held = ", ".join(sorted({unread for _, unread in files})) or "nothing"
            raise FileNotFoundError(
                f"the folder {source!r} has no text files (looked for {accepted}); it holds {held}: "
                "to read other files, name them or give a glob that matches them"
            )
        return found
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = sorted(Path(match) for match in matches if Path(match).is_file())
    if not found:
        raise FileNotFoundError(
            f"source {source!r} is no file and no folder, and as a glob it matches no file; "
            f"accepted are files, folders, globs, {PYTHON_DOCS!r}, names of fetched texts and {HUGGING_FACE}NAME"
        )
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield ``(file, kind)`` for each file of a folder. The kind of a file that is read is "", of others their ending."""

    def stop(error: OSError) -> None:
        raise error  # a folder that cannot be listed must not silently shrink the corpus

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((path, "link to a folder") for name in folders if (path := Path(parent, name)).is_symlink())
        for name in names:
            lower = name.lower()
            is_text = Path(lower.removesuffix(".gz")).suffix in TEXT_SUFFIXES
            if not name.startswith("."):
                is_read = is_text or lower.endswith(RECORD_SUFFIXES)
                yield Path(parent, name), "" if is_read else Path(lower).suffix or "no ending"


def _read_pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file, in pieces."""
    buffer = b""
    offset = 0  # where the buffer begins in the file, in bytes
    with open_bytes(path) as file:
        while block := file.read(_PIECE_BYTES - len(buffer)):
            buffer += block
            if len(buffer) < _PIECE_BYTES:  # a short read, or the end of the file
                continue
            end = _piece_end(buffer)
            yield from _decode(path, buffer[:end], offset)
            offset += end
            buffer = buffer[end:]
    yield from _decode(path, buffer, offset)


def _piece_end(block: bytes) -> int:
    """Where to end a piece: after the last line break or, if there is none, before the last character."""
    end = block.rfind(b"\n") + 1
    if end:
        return end
    for end in range(len(block) - 1, len(block) - 5, -1):
        if block[end] & 0xC0 != 0x80:  # not a UTF-8 continuation byte: a character begins here
            return end
    return len(block)  # the block is not UTF-8: decoding raises the error


def _decode(path: Path, block: bytes, offset: int) -> Iterator[str]:
    """Yield the text of a block that begins at ``offset`` in the file, unless it is empty."""
    if offset == 0 and block.startswith(BYTE_ORDER_MARK):
        block = block[len(BYTE_ORDER_MARK) :]
        offset = len(BYTE_ORDER_MARK)
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise ValueError(
            f"{path} is not valid UTF-8: byte 0x{block[error.start]:02x} at offset {position} ({error.reason}); "
            "convert the file to UTF-8, or leave it out"
        ) from error
    if text:
        yield text


def _in_memory(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Yield a document for each ``(name, text)``."""
    for name, text in texts:
        yield Document(name, partial(_text_pieces, text))


def _text_pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces."""
    start, longest = 0, _PIECE_BYTES // 4  # a character has at most 4 bytes
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1 or start + longest
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
