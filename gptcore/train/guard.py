"""Guards that keep errors in printing, drawing, sampling and TensorBoard from ending a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Guard:
    """``with guard("the picture"):`` turns an exception in its block into a warning, once for each name."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                _warn(f"gptcore: warning: {what} failed ({reason}); the run goes on without it")


class GuardedStream:
    """A text stream that writes "?" for characters that its encoding lacks, and turns errors into a warning."""

    def __init__(self, stream: TextIO, guard: Guard) -> None:
        self._stream, self._guard = stream, guard

    def write(self, text: str) -> int:
        with self._guard("printing"):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._guard("printing"):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:  # rich asks for isatty, encoding, fileno
        return getattr(self._stream, name)


def drop_unwritten() -> None:
    """Discards what the standard streams cannot write: otherwise the interpreter exits with status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
        except (AttributeError, ValueError):  # no stream, or a closed one
            continue


def _warn(text: str) -> None:
    """Prints a line on the first standard stream that still works."""
    for stream in (sys.stderr, sys.stdout):
        with suppress(Exception):
            print(text, file=stream, flush=True)
            return
