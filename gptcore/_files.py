"""Atomic writing: a crash, an error or Ctrl-C never leaves an incomplete file."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO


def temporary_sibling(path: Path) -> Path:
    """Return an unused hidden name beside ``path``, so that a rename to ``path`` stays on one file system and is atomic.

    Raises ``FileNotFoundError`` if the folder that should hold ``path`` does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def publish(file: BinaryIO, path: Path) -> None:
    """Sync the finished temporary ``file`` to the disk, close it, and rename it to ``path``."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync renames in ``folder`` to the disk, on systems that can sync a folder (Windows cannot)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes ``path`` only if the block ends without an exception."""
    temporary = temporary_sibling(path)
    try:
        with temporary.open("xb") as file:
            yield file
            publish(file, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Sync the finished folder ``temporary`` and its files to the disk, and rename it to ``path``.

    An existing folder at ``path`` is moved aside first, moved back if the rename fails, and deleted last.
    """
    for file in sorted(temporary.rglob("*")):
        if file.is_dir():
            sync_folder(file)
        else:
            with file.open("rb") as written:
                os.fsync(written.fileno())
    sync_folder(temporary)
    aside = temporary_sibling(path) if path.exists() else None
    if aside:
        path.rename(aside)
    try:
        temporary.rename(path)
    except BaseException:
        if aside:
            aside.rename(path)
        raise
    sync_folder(path.parent)
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def folder_writer(path: Path) -> Iterator[Path]:
    """Make a temporary folder that becomes ``path`` only if the block ends without an exception.

    Otherwise it is deleted, with the parent folders that were made for it.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        temporary.mkdir()
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # another program may have put something there
                parent.rmdir()
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder. A crash leaves either all of it or nothing under its name."""
    aside = temporary_sibling(path)
    path.rename(aside)
    shutil.rmtree(aside)


def link_or_copy(source: Path, target: Path) -> None:
    """Put the file ``source`` at ``target`` atomically: as a hard link if the file system has them, else as a copy."""
    temporary = temporary_sibling(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure to a file, atomically: as SVG if the name ends in .svg, else as PNG."""
    from matplotlib import rc_context

    drawn = BytesIO()
    if path.suffix == ".svg":
        # Text stays text, and the same figure gives the same file.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gptcore"}):
            figure.savefig(drawn, format="svg", metadata={"Date": None})
    else:
        figure.savefig(drawn, format="png", dpi=120)
    with atomic_writer(path) as file:
        file.write(drawn.getvalue())
