"""Streams of documents from files of text and of records, folders, globs, datasets and Python's own documentation.

Nothing here holds a file in memory, arrays in JSON apart: a document is a handle that yields its text in pieces.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import os
import platform
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gptcore import _extras, assets
from gptcore.data.readers import (
    HUGGING_FACE,
    RECORD_SUFFIXES,
    dataset_state,
    holds_records,
    open_bytes,
    read_dataset,
    read_records,
    require_packages,
)

PYTHON_DOCS = "python-docs"
"""The name of the built-in corpus. A file or folder of that name is reached as ``./python-docs``."""

# fmt: off
TEXT_SUFFIXES = frozenset([
    ".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs",
    ".sh", ".sql", ".jl", ".lua", ".rb",
])
# fmt: on
"""The files of text that are read when a source is a folder; one that is named itself, or by a glob, may have any."""

_PIECE_BYTES = 1 << 18
_MIN_DOCSTRING = 80
_BOM = b"\xef\xbb\xbf"
_NOT_DOCUMENTATION = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """One text of a corpus: a file, a record, or one module or topic of ``python-docs``.

    ``pieces()`` yields the text from its beginning, in strings of at most 256 KiB, each time it is called.
    """

    name: str
    pieces: Callable[[], Iterator[str]]


def documents(sources: str | Path | Sequence[str | Path], *, field: str = "text") -> Iterator[Document]:
    """The documents of a corpus, in the order of its sources and, within each, sorted by path.

    A source is one of these; a file that several sources name comes once.

    - A file. It is one document, unless its name ends with one of
      :data:`~gptcore.data.readers.RECORD_SUFFIXES`, or with ``.json`` and it holds an array: then each record is one.
      If its name ends with ``.gz``, it is unpacked as it is read.
    - A folder, searched to any depth for files with one of those endings or of :data:`TEXT_SUFFIXES`, ``.gz`` after
      it or not (names that begin with a dot are passed over, links to folders are not followed). What else there is,
      ``.json`` too, since it is settings more often than text, :func:`unread_files` counts.
    - A glob such as ``"books/**/*.txt"``, which matches files of any suffix.
    - ``"python-docs"``: the standard library's docstrings of more than 80 characters, one document per module
      (parsed, not imported; tests are left out), and the articles that Python's ``help()`` shows, one document per
      topic; about 2 MB.
    - A corpus that ``gptcore fetch`` brought, by its name, such as ``"shakespeare"``.
    - ``"hf:NAME"``, ``"hf:NAME:CONFIG"`` or ``"hf:NAME:CONFIG:SPLIT"``: a Hugging Face dataset (its split ``train``
      unless named), a document a row.

    A file of text is read as UTF-8, in pieces that end at line breaks unless one line is longer than a piece; line
    endings are kept, a byte order mark is not. A file that is named like a built-in corpus is reached as ``./NAME``.

    Args:
        sources: one source or several.
        field: the field of records that holds the text.

    Raises (before the first document comes, except for what only reading can show):
        ValueError: if there are no sources, a file is not UTF-8 (when its pieces are read), or a record is bad.
        FileNotFoundError: if a source names nothing, a folder has no such file, or a corpus has not been fetched.
        MissingPackageError: if a library that a source needs is not installed.
        RuntimeError: if a dataset cannot be loaded.
        OSError: if a file or folder cannot be read.
    """
    for source, files in _resolve(sources):
        if source == PYTHON_DOCS:
            yield from _in_memory(_python_texts())
        elif source.startswith(HUGGING_FACE):
            yield from _in_memory(read_dataset(source, field))
        for path in files:
            if holds_records(path):
                yield from _in_memory(read_records(path, field))
            else:
                yield Document(str(path), partial(_read_pieces, path))


def sources_state(sources: str | Path | Sequence[str | Path]) -> str:
    """32 hexadecimal digits that change when a file of the corpus is added, removed, renamed or changed.

    Files are told apart by path, size and time of change, so this is quick however large they are;
    ``python-docs`` by Python's version. Raises as :func:`documents` does.
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
    """What folders hold besides the files that are read: how many files of each ending, the most first.

    Neither names that begin with a dot count, nor files that another source names. Raises as :func:`documents` does.
    """
    read = {os.path.realpath(path) for _, files in _resolve(sources) for path in files}
    unread: dict[Path, str] = {}
    for source in source_list(sources):
        if not _is_named(source) and (folder := _place(source)).is_dir():
            unread |= {path: kind for path, kind in _walk(folder) if kind and os.path.realpath(path) not in read}
    return dict(sorted(Counter(unread.values()).items(), key=lambda item: (-item[1], item[0])))


def source_list(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """One source or several as a list of strings. Raises ``ValueError`` if there are none."""
    if isinstance(sources, str | Path):
        sources = [sources]
    if not sources:
        raise ValueError(f"sources must name a file, a folder, a glob, a dataset or {PYTHON_DOCS!r}; got none")
    return [str(source) for source in sources]


def _resolve(sources: str | Path | Sequence[str | Path]) -> list[tuple[str, list[Path]]]:
    """Each source, once, with the files it stands for that no earlier source named."""
    seen: set[str] = set()
    resolved = []
    for source in dict.fromkeys(source_list(sources)):
        new = []
        if source.startswith(HUGGING_FACE):
            _extras.load("datasets", source)
        for path in [] if _is_named(source) else _files(source):
            if (real := os.path.realpath(path)) not in seen:  # Path.resolve stumbles over links in a circle
                seen.add(real)
                new.append(path)
                require_packages(path)
        resolved.append((source, new))
    return resolved


def _is_named(source: str) -> bool:
    """Whether a source is ``python-docs`` or a dataset, which are no files."""
    return source == PYTHON_DOCS or source.startswith(HUGGING_FACE)


def _place(source: str) -> Path:
    if (entry := assets.CATALOGUE.get(source)) is not None and entry.kind == "text":
        fetched = assets.find(source)
        if fetched is None:
            raise FileNotFoundError(f"source {source!r} has not been fetched; run: gptcore fetch {source}")
        return fetched
    return Path(source).expanduser()


def _files(source: str) -> list[Path]:
    """The files that a source other than ``python-docs`` and datasets stands for, sorted."""
    path = _place(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = list(_walk(path))
        found = sorted(file for file, unread in files if not unread)
        if not found:
            looked_for = ", ".join(sorted([*TEXT_SUFFIXES, *RECORD_SUFFIXES]))
            held = ", ".join(sorted({unread for _, unread in files})) or "nothing"
            raise FileNotFoundError(
                f"the folder {source!r} has no text files (looked for {looked_for}); it holds {held}: "
                "name the files, or a glob that matches them, to read others"
            )
        return found
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = sorted(Path(match) for match in matches if Path(match).is_file())
    if not found:
        raise FileNotFoundError(
            f"source {source!r} is no file and no folder, and as a glob it matches no file; "
            f"sources are files, folders, globs, {PYTHON_DOCS!r}, names of fetched texts and {HUGGING_FACE}NAME"
        )
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of a folder; of those that are not read with what they are counted as, otherwise with nothing."""

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
    offset = 0  # of the first byte of `rest` in the file
    rest = b""
    with open_bytes(path) as file:
        while block := file.read(_PIECE_BYTES - len(rest)):
            rest += block
            if len(rest) < _PIECE_BYTES:  # a short read: more may come, and the end is handled below
                continue
            cut = _cut(rest)
            yield from _decode(path, rest[:cut], offset)
            offset += cut
            rest = rest[cut:]
    yield from _decode(path, rest, offset)


def _cut(block: bytes) -> int:
    """Where to end a piece: after the last line break or, in one long line, before the last character."""
    cut = block.rfind(b"\n") + 1
    if cut:
        return cut
    for cut in range(len(block) - 1, len(block) - 5, -1):
        if block[cut] & 0xC0 != 0x80:  # not a continuation byte: a character begins here
            return cut
    return len(block)  # not UTF-8, which decoding will say


def _decode(path: Path, block: bytes, offset: int) -> Iterator[str]:
    """The text of a block of a file that begins ``offset`` bytes into it; nothing if there is none."""
    if offset == 0 and block.startswith(_BOM):
        block = block[len(_BOM) :]
        offset = len(_BOM)
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise ValueError(
            f"{path} is not valid UTF-8: byte 0x{block[error.start]:02x} at offset {where} ({error.reason}); "
            "convert the file to UTF-8, or leave it out"
        ) from error
    if text:
        yield text


def _in_memory(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Documents of texts that are held in memory, one at a time: ``(name, text)`` of each."""
    for name, text in texts:
        yield Document(name, partial(_text_pieces, text))


def _text_pieces(text: str) -> Iterator[str]:
    start, most = 0, _PIECE_BYTES // 4  # characters of at most 4 bytes
    while len(text) - start > most:
        cut = text.rfind("\n", start, start + most) + 1 or start + most
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _python_texts() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    modules = (path.relative_to(root) for path in root.rglob("*.py"))
    for module in sorted(path.as_posix() for path in modules if not _NOT_DOCUMENTATION & set(path.parts[:-1])):
        text = _docstrings((root / module).read_bytes())
        if text:
            yield f"{PYTHON_DOCS}:{module}", text
    for topic, article in sorted(topics.items()):
        yield f"{PYTHON_DOCS}:topics/{topic}", article.strip() + "\n"


def _docstrings(source: bytes) -> str:
    """The docstrings of a module and of the classes and functions in it, in the order they are written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold escapes that today's compiler warns of
        tree = ast.parse(source)
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found = []
    for node in ast.walk(tree):
        if isinstance(node, documented):
            text = ast.get_docstring(node)  # cleaned by inspect.cleandoc
            if text is not None and len(text) > _MIN_DOCSTRING:
                found.append((getattr(node, "lineno", 0), text.strip() + "\n"))
    return "\n".join(text for _, text in sorted(found))
