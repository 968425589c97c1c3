"""Sources of many documents each: JSON Lines, arrays in JSON, Parquet, Hugging Face datasets. One record is one document.

A record's text is one of its fields, and must be a string. The first that is not stops the reading with an error
that names the file, the line or row, and what came: nothing is passed over.
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
"""The endings of files that hold records; others hold one text, unless they are an array in JSON."""
HUGGING_FACE = "hf:"
"""What the name of a Hugging Face dataset begins with: ``hf:NAME``, ``hf:NAME:CONFIG`` or ``hf:NAME:CONFIG:SPLIT``."""
RECORD_BYTES = 64 << 20
"""The longest line of JSON and the longest text of a record, in bytes: longer ones are an error."""

_ROWS = 256  # read at a time
_PEEK = 1 << 10
_BOM = b"\xef\xbb\xbf"


def holds_records(path: Path) -> bool:
    """Whether a file is read as records: by the end of its name or, for ``.json``, if it begins as an array does."""
    if _is_json(path):
        with open_bytes(path) as file:
            return file.read(_PEEK).removeprefix(_BOM).lstrip().startswith(b"[")
    return path.name.lower().endswith(RECORD_SUFFIXES)


@contextmanager
def open_bytes(path: Path) -> Iterator[BufferedIOBase]:
    """A file's bytes, unpacked if its name ends with ``.gz``.

    Raises ``ValueError`` if what is unpacked in the block is damaged, ``OSError`` if the file cannot be read.
    """
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error


def require_packages(path: Path) -> None:
    """Raises ``MissingPackageError`` if the file cannot be read for want of a package, without reading it."""
    if path.name.lower().endswith(".parquet"):
        _extras.load("pyarrow", str(path))


def read_records(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """The ``(name, text)`` of each record of a file; the name tells the line, or the row, from 1.

    Raises:
        ValueError: if the file is damaged, has no such field, or a record's is no string.
        MissingPackageError: if the file is Parquet and pyarrow is not installed.
        OSError: if the file cannot be read.
    """
    if path.name.lower().endswith(".parquet"):
        return _read_parquet(path, field)
    if _is_json(path):
        return _read_json_array(path, field)
    return _read_json_lines(path, field)


def read_dataset(source: str, field: str) -> Iterator[tuple[str, str]]:
    """The ``(name, text)`` of each row of a Hugging Face dataset. Raises as :func:`read_records` does."""
    dataset = _load_dataset(source)
    if field not in dataset.column_names:
        raise ValueError(f"{source} has no field {field!r}; its fields are {', '.join(dataset.column_names)}")
    row = 0
    for batch in dataset.select_columns(field).iter(_ROWS):
        for text in batch[field]:
            row += 1
            name = f"{source}, row {row}"
            yield name, _text(text, name, field)


def dataset_state(source: str) -> str:
    """What changes when the stored copy of a Hugging Face dataset does."""
    dataset = _load_dataset(source)
    files = sorted(Path(file["filename"]) for file in dataset.cache_files)
    stamps = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return " ".join([source, str(dataset.num_rows), *stamps])


def _is_json(path: Path) -> bool:
    return path.name.lower().endswith((".json", ".json.gz"))


def _read_json_array(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """The records of one array. All are in memory at a time: JSON Lines are for more than that holds."""
    with open_bytes(path) as file:
        records = _parse(file.read(), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a JSON array of objects; got {_kind(records)}")
    for number, record in enumerate(records, 1):
        name = f"{path}, record {number}"
        yield name, _text_of(record, name, field)


def _read_json_lines(path: Path, field: str) -> Iterator[tuple[str, str]]:
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(RECORD_BYTES + 1):
            number += 1
            name = f"{path}, line {number}"
            if len(line) > RECORD_BYTES:
                raise ValueError(f"{name}: is longer than {RECORD_BYTES} bytes, the most that a record may have")
            line = line.rstrip(b"\r\n")  # so that the place of an error lies in it
            if not line.strip():
                continue
            yield name, _text_of(_parse(line, name), name, field)


def _parse(line: bytes, name: str) -> Any:
    try:
        return json.loads(line.removeprefix(_BOM).decode())
    except UnicodeDecodeError as error:
        where = f"byte 0x{error.object[error.start]:02x} at offset {error.start} ({error.reason})"
        raise ValueError(f"{name}: is not valid UTF-8: {where}") from error
    except (ValueError, RecursionError) as error:
        said = f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{name}: is not valid JSON: {said}") from error


def _text_of(record: Any, name: str, field: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{name}: must be a JSON object; got {_kind(record)}")
    if field not in record:
        raise ValueError(f"{name}: has no field {field!r}; its fields are {', '.join(record) or 'none'}")
    return _text(record[field], name, field)


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    pa, parquet = (_extras.load(module, str(path)) for module in ("pyarrow", "pyarrow.parquet"))
    row = 0
    try:
        with parquet.ParquetFile(path, memory_map=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(f"{path} has no field {field!r}; its fields are {', '.join(names) or 'none'}")
            for batch in file.iter_batches(_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    name = f"{path}, row {row}"
                    yield name, _text(_value(value, name), name, field)
    except (pa.ArrowException, OSError) as error:  # for a damaged page it is an OSError, without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is truncated or damaged: {' '.join(str(error).split())}") from error


def _value(scalar: Any, name: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is not valid UTF-8: {error.reason} at offset {error.start}") from error


def _load_dataset(source: str) -> Any:
    """A dataset as a table that is mapped into memory. The first time, it is downloaded."""
    datasets = _extras.load("datasets", source)
    name, config, split = [*source.removeprefix(HUGGING_FACE).split(":", 2), "", ""][:3]  # a split may be train[:9]
    if not name:
        raise ValueError(f"source: got {source!r}; accepted are hf:NAME, hf:NAME:CONFIG and hf:NAME:CONFIG:SPLIT")
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # of a hub, a network, a dozen file formats: there is no common class
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"{source}: could not be loaded: {said}") from error


def _text(value: Any, name: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: the field {field!r} must be a string; got {_kind(value)}")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
        what = f"half of a surrogate pair (U+{ord(value[error.start]):04X}) at character {error.start}"
        raise ValueError(f"{name}: the field {field!r} is no text: it holds {what}") from error
    if size > RECORD_BYTES:
        raise ValueError(f"{name}: the field {field!r} has {size} bytes; a record may have {RECORD_BYTES}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
