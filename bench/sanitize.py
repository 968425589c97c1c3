"""Runs the native kernels on every operation's cases under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
from gptkernels import _native
from gptkernels.testing import SPECS, check_op

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1")


def _check(level: str) -> int:
    """The child process: checks every case with the kernels of that level of instructions."""
    chosen = next(candidate for candidate in (_native.EMULATED_AMX, *_native.LEVELS) if candidate.name == level)
    if reason := _native.load(chosen, FLAGS):
        raise SystemExit(reason)
    _native.multiplies = lambda dtype: False  # use our matrix products also where PyTorch's would be faster
    count = 0
    for spec in SPECS:
        for case in spec.cases:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                check_op(spec, case, dtype, "native")
                count += 1
        print(f"{spec.name}: clean", flush=True)
    print(f"{count} cases at level {level}: no invalid access, no undefined behaviour")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitize", description=__doc__, epilog="example: python -m bench.sanitize --level avx2"
    )
    names = [level.name for level in (*_native.supported(), _native.EMULATED_AMX)]
    parser.add_argument("--level", choices=names, default=names[0], help=f"level of instructions (default: {names[0]})")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _check(options.level)
    # The sanitizer must be loaded before any other library. It watches malloc, not Python's own pools; leaks are not checked.
    compiler = os.environ.get("CXX", "c++")
    runtime = [
        subprocess.run([compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "stdc++")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "bench.sanitize", "--child", "--level", options.level]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
