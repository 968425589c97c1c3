"""Reads tables: CSV, TSV and JSON files, and fetched data that is a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptcore import assets
from gptcore.data.readers import BYTE_ORDER_MARK, open_bytes, read_objects

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_JSON = (".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*_SEPARATORS, *_JSON)
"""A file whose name ends with one of these, or with one and ``.gz``, is a table."""


def read_table(source: str | Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ``(name, row)`` for each row of a table; `row` holds the columns by name, as text unless the file is JSON.

    `name` ends with the row's line, for errors. Empty lines are left out. In a CSV file a field in double quotes may hold
    commas and line breaks; in a TSV file quotes mean nothing.

    Args:
        source: a file whose name ends with one of `TABLE_SUFFIXES`, ``.gz`` after it or not, or the name of labelled text
            that ``gptcore fetch`` brought. A file with the name of fetched data is reached as ``./NAME``.
        columns: the names of the columns, in order, for a CSV or TSV file that has no header; without them the first line
            is the header.

    Raises:
        ValueError: a source that is no table, a file without rows, a row with more or fewer fields than there are columns,
            text that is not UTF-8, damaged JSON; names the file and the line.
        FileNotFoundError: there is no such file, or the data has not been fetched.
        OSError: the file cannot be read.
    """
    path, encoding, separator, header = Path(source).expanduser(), "utf-8", None, not columns
    if (entry := assets.CATALOGUE.get(str(source))) is not None:
        if entry.table is None:
            tables = [name for name, other in assets.CATALOGUE.items() if other.table]
            raise ValueError(f"data: {entry.name} is no table of labelled text; accepted are {', '.join(tables)}")
        if (folder := assets.find(entry.name)) is None:
            raise FileNotFoundError(f"data: {entry.name} has not been fetched; run: gptcore fetch {entry.name}")
        path, table = folder / entry.files[0], entry.table
        encoding, separator, header, columns = table.encoding, table.separator, table.header, columns or table.columns
    elif not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}")
    else:
        suffix = Path(path.name.lower().removesuffix(".gz")).suffix
        if suffix not in TABLE_SUFFIXES:
            raise ValueError(f"data: got {path}; accepted are names that end with {', '.join(TABLE_SUFFIXES)}")
        separator = _SEPARATORS.get(suffix)
    if separator is not None:
        return _read_separated(path, separator, tuple(columns), header, encoding)
    if columns:
        raise ValueError(f"columns: got {', '.join(columns)} for {path}, whose objects name their fields")
    return read_objects(path)


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file, without their ends.

    Raises:
        ValueError: an empty line, or text that is not UTF-8; names the file and the line.
        OSError: the file cannot be read.
    """
    for number, line in enumerate(_lines(path, "utf-8"), 1):
        if not (text := line.rstrip("\r\n")).strip():
            raise ValueError(f"{path}, line {number}: is empty; accepted is a text in each line")
        yield text


def _read_separated(
    path: Path, separator: str, columns: tuple[str, ...], header: bool, encoding: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    reader = csv.reader(_lines(path, encoding), delimiter=separator, quoting=quoting, strict=True)
    first, line = True, 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        name, line = f"{path}, line {line}", reader.line_num + 1
        if row is None:
            return
        if not row:
            continue
        if first:
            first = False
            if header:
                columns = columns or tuple(row)
                if len(set(columns)) < len(columns):
                    raise ValueError(f"{name}: must name each column once; got {', '.join(map(repr, columns))}")
                continue
            if tuple(row) == columns:
                raise ValueError(f"columns: got {', '.join(columns)}, which {name} names too; leave the option out")
        if len(row) != len(columns):
            raise ValueError(f"{name}: must have {len(columns)} fields ({', '.join(columns)}); got {len(row)}")
        yield name, dict(zip(columns, row))


def _lines(path: Path, encoding: str) -> Iterator[str]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode(encoding)
            except UnicodeDecodeError as error:
                where = f"byte 0x{error.object[error.start]:02x} at offset {error.start} ({error.reason})"
                raise ValueError(f"{path}, line {number}: is not valid UTF-8: {where}") from error
