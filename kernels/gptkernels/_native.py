"""Builds and loads the native extension: the operations' ``native.cpp`` files, compiled together for this CPU.

A level is a set of instructions. `load` takes the best one that this CPU has: from the wheel when it was built ahead of
time, else from the cache, else it compiles it, once. The cache's key holds everything that the machine code depends on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
PREBUILT = PACKAGE / "_prebuilt"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)


@dataclass(frozen=True)
class Level:
    """Instructions that a build may use, and what `torch.cpu.get_capabilities` must say for it to run."""

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]


def _capability(name: str) -> tuple[str, ...]:
    # What at::vec reads to choose its vectors.
    return f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"


_AVX512 = (
    "-mavx2",
    "-mfma",
    "-mf16c",
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
    *_capability("AVX512"),
)
_AVX512_NEEDS = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")

# Best first.
LEVELS = (
    Level(
        "amx",
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (*_AVX512_NEEDS, "avx512_bf16", "amx_tile", "amx_bf16"),
    ),
    Level("avx512_bf16", (*_AVX512, "-mavx512bf16"), (*_AVX512_NEEDS, "avx512_bf16")),
    Level("avx512", _AVX512, _AVX512_NEEDS),
    Level("avx2", ("-mavx2", "-mfma", "-mf16c", *_capability("AVX2")), ("avx2", "fma3", "f16c")),
    Level("portable", _capability("DEFAULT"), ()),
)
# The AMX code with its tiles in software, for tests on machines without them; never chosen.
EMULATED_AMX = Level(
    "amx_emulated", (*_AVX512, "-mavx512bf16", "-DGPTKERNELS_EMULATE_AMX"), (*_AVX512_NEEDS, "avx512_bf16")
)

_loaded: Level | None = None
_failure: str | None = None


def loaded() -> str | None:
    """Name of the level that runs in this process; None before the first use."""
    return _loaded.name if _loaded else None


def _tiles_permitted() -> bool:
    """Asks Linux for the AMX registers, which a process gets only on request."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def supported() -> tuple[Level, ...]:
    """The levels that this CPU runs, best first; ``ATEN_CPU_CAPABILITY`` (default, avx2) limits them as it does PyTorch."""
    capabilities = torch.cpu.get_capabilities()
    limit = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    excluded = {"default": ("avx512", "avx2", "amx"), "avx2": ("avx512", "amx")}.get(limit, ())
    return tuple(
        level
        for level in LEVELS
        if all(capabilities.get(need, False) for need in level.needs)
        and not level.name.startswith(excluded)
        and (level.name != "amx" or _tiles_permitted())
    )


def sources() -> dict[str, Path]:
    """The extension's files by their path in a build; those that take longest to compile first."""
    found = {path.parent.name + ".cpp": path for path in PACKAGE.glob("*/native.cpp")}
    headers = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.glob("*/*.h")}
    by_size = sorted(found.items(), key=lambda item: -item[1].stat().st_size)
    return {**dict(by_size), **headers}


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def cache_folder() -> Path:
    """Where compiled extensions are kept: in ``TORCH_EXTENSIONS_DIR`` when set, else in the user's cache folder."""
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gptkernels"


def _key(level: Level, flags: tuple[str, ...]) -> str:
    """Names what the machine code depends on. PyTorch's version is no part of it: the code uses its stable interface only."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else "none"
    digest = hashlib.sha256()
    parts = [*flags, version, platform.machine(), platform.libc_ver()[1]]
    for name, path in sorted(sources().items()):
        parts += [name, path.read_text()]
    digest.update("\0".join(parts).encode())
    return f"{level.name}-{digest.hexdigest()[:20]}"


def prebuilt(level: Level) -> Path:
    """Where an ahead-of-time build of `level` lies. It serves every PyTorch from the oldest supported on (csrc/tensor.h)."""
    return PREBUILT / f"native_{level.name}.so"


def why_not() -> str | None:
    """None when the extension is loaded, lies ready or can be compiled; else what is missing and what to do."""
    if _loaded:
        return None
    if _failure:
        return _failure
    return _missing()


@functools.cache
def _missing() -> str | None:
    if any(prebuilt(level).exists() for level in supported()):
        return None
    if sys.platform != "linux":
        return f"the native CPU kernels are built on Linux only; this is {sys.platform}"
    if _compiler() is None:
        wanted = os.environ.get("CXX", "c++")
        return (
            f"there is no C++ compiler ({wanted} is not on PATH): "
            "install one (apt install g++, dnf install gcc-c++) or set CXX"
        )
    if _ninja() is None:
        return "ninja is not installed (pip install ninja)"
    return None


def _ninja() -> str | None:
    """The folder that holds the ninja command."""
    try:
        import ninja

        return str(ninja.BIN_DIR)
    except ImportError:
        found = shutil.which("ninja")
        return found and str(Path(found).parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds `path` as a lock that the kernel releases when this process ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(level: Level, flags: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compiles into a folder of its own, loads, and moves the finished library into `folder` in one step."""
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=folder, prefix=f"building-{name}-") as temporary:
        build = Path(temporary)
        for target, source in sources().items():
            (build / target).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, build / target)
        path, extra = os.environ["PATH"], _ninja()
        os.environ["PATH"] = f"{extra}{os.pathsep}{path}"
        try:
            cpp_extension.load(
                "gptkernels_native",
                [str(build / target) for target in sources() if target.endswith(".cpp")],
                extra_cflags=list(flags),
                extra_ldflags=[flag for flag in flags if flag.startswith("-fsanitize")],
                extra_include_paths=[str(build)],
                build_directory=str(build),
                is_python_module=False,  # loads it with torch.ops.load_library
            )
        finally:
            os.environ["PATH"] = path
        library = folder / f"{name}.so"
        (build / "gptkernels_native.so").replace(library)
    return library


def _best() -> Level:
    """The best level that lies ready from an ahead-of-time build, else the best that can be compiled."""
    ready = [level for level in supported() if prebuilt(level).exists()]
    return (ready or supported())[0]


def _load_or_compile(level: Level, extra_flags: tuple[str, ...]) -> None:
    ready = prebuilt(level)
    if ready.exists() and not extra_flags:
        torch.ops.load_library(ready)
        return
    flags = (*FLAGS, *level.flags, *extra_flags)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = _key(level, flags)
    library = folder / f"{name}.so"
    if not library.exists():
        with _locked(folder / f"{name}.lock"):
            if not library.exists():
                for left in folder.glob(f"building-{name}-*"):  # by a process that was killed: the lock is ours now
                    shutil.rmtree(left, ignore_errors=True)
                print(
                    f"gptkernels: compiling the native CPU kernels for this machine ({level.name}): "
                    f"half a minute to a minute, once; kept in {folder}",
                    file=sys.stderr,
                    flush=True,
                )
                start = time.perf_counter()
                _compile(level, flags, folder, name)
                print(f"gptkernels: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                return
    try:
        torch.ops.load_library(library)
    except OSError:
        library.unlink(missing_ok=True)  # a damaged file: the next start compiles it again
        raise


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    return torch.ops.gptkernels_native.multiplies(dtype)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch's own matrix products of `dtype` are fast on this CPU; the extension must be loaded."""
    return _multiplies(dtype)


def load(level: Level | None = None, extra_flags: tuple[str, ...] = ()) -> str | None:
    """Loads the extension, compiling it when it is nowhere ready; a reason why not instead of an exception.

    `level` (for tests) takes another than the best one, `extra_flags` a build of its own (sanitizers). One extension is
    loaded in a process, and stays.
    """
    global _loaded, _failure
    if _loaded is None and _failure is None and (_failure := why_not()) is None:
        chosen = level or _best()
        try:
            _load_or_compile(chosen, extra_flags)
            _loaded = chosen
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            _failure = f"the native CPU kernels could not be built or loaded: {error}"
    return _failure


# torch.compiler.assume_constant_result does just this, but imports the compiler: seconds, at `import gptkernels`. The mark
# is on a plain function: the compiler traces through functools.cache, mark or not.
multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]
