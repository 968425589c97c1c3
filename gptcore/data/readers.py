"""Reads sources that hold many documents: JSON Lines, JSON arrays, Parquet files and Hugging Face datasets.

Each record (a line, an array element or a row) is one document. Its text is one of its fields, which must be a string.
A record without such a field stops the reading with an error that names the file, the record and the value; no record
is skipped.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from gptcore import _extras

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".parquet")
"""A file whose name ends with one of these holds records; so does a ``.json`` file that holds an array."""
HUGGING_FACE = "hf:"
"""The prefix of Hugging Face datasets: ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME:CONFIG:SPLIT``."""
MAX_RECORD_BYTES = 64 << 20
"""The longest line of JSON, and the longest text of a record. A longer one is an error."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""The UTF-8 byte order mark, which some programs put before a text. It is not part of the text."""

_ROWS_PER_READ = 256
_PEEK_BYTES = 1 << 10


def holds_records(path: Path) -> bool:
    """Whether a file holds records. The name tells, except for ``.json``: there the file must begin with ``[``."""
    if _is_json(path):
        with open_bytes(path) as file:
            return file.read(_PEEK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
    return path.name.lower().endswith(RECORD_SUFFIXES)


@contextmanager
def open_bytes(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file for reading bytes, and decompress it if its name ends with ``.gz``.

    Raises ``ValueError`` if the compressed data that the block reads is damaged, ``OSError`` if the file cannot be read.
    """
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error


def require_packages(path: Path) -> None:
    """Raise ``MissingPackageError`` if the package that reads this kind of file is not installed. Reads nothing."""
    if path.name.lower().endswith(".parquet"):
        _extras.load("pyarrow", str(path))


def read_records(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` for each record of a file. The name ends with the number of the line or row, from 1.

    Raises:
        ValueError: if the file is damaged, or a record's ``field`` is missing or is no string.
        MissingPackageError: if the file is Parquet and pyarrow is not installed.
        OSError: if the file cannot be read.
    """
    if path.name.lower().endswith(".parquet"):
        return _read_parquet(path, field)
    return ((name, text_of(record, name, field)) for name, record in read_objects(path))


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(name, object)`` for each object of a file: one a line, or for ``.json`` the elements of an array.

    The name ends with the number of the line or element, from 1, for errors. Empty lines are left out.

    Raises:
        ValueError: if the file is damaged, or holds something else than objects.
        OSError: if the file cannot be read.
    """
    for name, record in _read_json_array(path) if _is_json(path) else _read_json_lines(path):
        if not isinstance(record, dict):
            raise ValueError(f"{name}: must be a JSON object; got {shown(record)}")
        yield name, record


def read_dataset(source: str, field: str) -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)`` for each row of a Hugging Face dataset. Raises as :func:`read_records` does."""
    dataset = _load_dataset(source)
    if field not in dataset.column_names:
        raise ValueError(f"{source} has no field {field!r}; its fields are {', '.join(dataset.column_names)}")
    row = 0
    for batch in dataset.select_columns(field).iter(_ROWS_PER_READ):
        for text in batch[field]:
            row += 1
            name = f"{source}, row {row}"
            yield name, _checked_text(text, name, field)


def dataset_state(source: str) -> str:
    """A string that changes when the local copy of a Hugging Face dataset changes."""
    dataset = _load_dataset(source)
    files = sorted(Path(file["filename"]) for file in dataset.cache_files)
    stamps = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return " ".join([source, str(dataset.num_rows), *stamps])


def _is_json(path: Path) -> bool:
    return path.name.lower().endswith((".json", ".json.gz"))


def _read_json_array(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of one array. The whole array is in memory; a larger corpus should be JSON Lines."""
    with open_bytes(path) as file:
        records = _parse_json(file.read(), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a JSON array of objects; got {shown(records)}")
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            name = f"{path}, line {number}"
            if len(line) > MAX_RECORD_BYTES:
                raise ValueError(f"{name}: is longer than {MAX_RECORD_BYTES} bytes, the most that a record may have")
            line = line.rstrip(b"\r\n")  # an error at the end of the line has a position in the line, not after it
            if not line.strip():
                continue
            yield name, _parse_json(line, name)


def _parse_json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data.removeprefix(BYTE_ORDER_MARK).decode())
    except UnicodeDecodeError as error:
        where = f"byte 0x{error.object[error.start]:02x} at offset {error.start} ({error.reason})"
        raise ValueError(f"{name}: is not valid UTF-8: {where}") from error
    except (ValueError, RecursionError) as error:
        cause = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{name}: is not valid JSON: {cause}") from error


def text_of(record: dict[str, Any], name: str, field: str) -> str:
    """The text in a field of a record.

    Raises:
        ValueError: if the field is missing or holds no text; begins with `name`.
    """
    if field not in record:
        raise ValueError(f"{name}: has no field {field!r}; its fields are {', '.join(record) or 'none'}")
    return _checked_text(record[field], name, field)


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    pa, parquet = (_extras.load(module, str(path)) for module in ("pyarrow", "pyarrow.parquet"))
    row = 0
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(f"{path} has no field {field!r}; its fields are {', '.join(names) or 'none'}")
            for batch in file.iter_batches(_ROWS_PER_READ, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    name = f"{path}, row {row}"
                    yield name, _checked_text(_parquet_value(value, name), name, field)
    except (pa.ArrowException, OSError) as error:  # pyarrow reports a damaged page as an OSError without errno
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is truncated or damaged: {' '.join(str(error).split())}") from error


def _parquet_value(scalar: Any, name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is not valid UTF-8: {error.reason} at offset {error.start}") from error


def _load_dataset(source: str) -> Any:
    """The dataset's table, mapped into memory. The first call downloads it."""
    datasets = _extras.load("datasets", source)
    # Split twice at most: a split such as train[:9] holds a colon itself.
    name, config, split = [*source.removeprefix(HUGGING_FACE).split(":", 2), "", ""][:3]
    if not name:
        raise ValueError(f"source: got {source!r}; accepted are hf:NAME, hf:NAME:CONFIG and hf:NAME:CONFIG:SPLIT")
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub, the network and a dozen file formats share no base class
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"{source}: could not be loaded: {cause}") from error


def _checked_text(value: Any, name: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: the field {field!r} must be a string; got {shown(value)}")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
        what = f"half of a surrogate pair (U+{ord(value[error.start]):04X}) at character {error.start}"
        raise ValueError(f"{name}: the field {field!r} is no text: it holds {what}") from error
    if size > MAX_RECORD_BYTES:
        raise ValueError(f"{name}: the field {field!r} has {size} bytes; a record may have {MAX_RECORD_BYTES}")
    return value


def shown(value: Any) -> str:
    """The type and the beginning of a value, for an error."""
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
