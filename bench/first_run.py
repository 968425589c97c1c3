"""Tests and times the Triton kernels on a GPU that is available for ten minutes: ``python -m bench.first_run --out FOLDER``.

The most valuable steps come first. Each step is a process with a time limit. A step that fails or exceeds its limit does not
stop the later ones; a step is skipped if too little time is left. Results are in the folder as soon as they exist:

- log.txt: what every step printed, with times
- summary.txt: figures, failed tests and the outcome of each step on one page, which is also printed
- <gpu>.json: the figures (``python -m bench.gpu --show``)
- attention.ncu-rep, counters.txt, counters.csv: hardware counters
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from bench.gpu_table import short_table

ROOT = Path(__file__).parents[1]
PAGE, FAILURES = 11_000, 20  # the most characters of the summary, and the most failed tests that it lists
GRACE = 5.0  # seconds between SIGTERM and SIGKILL
RESERVE = 4.0  # seconds of the budget that are kept for the summary


@dataclass(frozen=True)
class Step:
    """A process to run: Python with `arguments`, into which `command` fills {out}, {commit} and {minutes} (the step's limit)."""

    name: str
    cap: float
    """Its time limit in seconds."""
    need: float
    """Skip it if fewer seconds than this are left."""
    arguments: tuple[str, ...]
    dry: tuple[str, ...] = ()
    """Further arguments for a dry run."""

    def command(self, out: Path, commit: str, seconds: float, dry: bool) -> list[str]:
        values = {"{out}": str(out), "{commit}": commit, "{minutes}": f"{max(seconds - 12, 1) / 60:.2f}"}
        arguments = [re.sub("{out}|{commit}|{minutes}", lambda m: values[m[0]], a) for a in self.arguments]
        return [sys.executable, *arguments, *(self.dry if dry else ())]


@dataclass
class Done:
    """The outcome of a step."""

    name: str
    began: float
    """Seconds since the start of the run."""
    seconds: float = 0.0
    status: str = "skipped"
    """"ok", "exit 1", "cut after 60 s" or "skipped: 12 s left"."""
    compiled: int = 0
    """Kernels that Triton compiled during this step: few, once "compile everything" is done."""
    last: str = ""
    """The last line that it printed."""
    failed: list[str] = field(default_factory=list)
    """pytest's lines about failed tests."""


def _figures(*groups: str) -> tuple[str, ...]:
    return ("-m", "bench.gpu", *groups, "--brief", "--minutes", "{minutes}", "--out", "{out}", "--commit", "{commit}")


def _tests(chosen: str, *files: str, at_a_time: int = 1) -> tuple[str, ...]:
    several = ("-n", str(at_a_time)) if at_a_time > 1 else ()
    options = ("-q", "-m", "gpu", "--tb=short", "--durations=5", "-p", "no:cacheprovider", *several)
    return ("-m", "pytest", *options, *(f"tests/{file}" for file in files or ("kernels/test_gpu.py",)), "-k", chosen)


# Prints what the machine has.
MACHINE = """
import os, platform, shutil, subprocess
print(platform.python_version(), os.cpu_count(), "cores", shutil.disk_usage("/tmp").free >> 30, "GiB free in /tmp")
print({name: shutil.which(name) for name in ("git", "make", "gcc", "nvcc", "ncu", "nvdisasm", "nvidia-smi")})
if shutil.which("nvidia-smi"):
    asked = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"])
"""
DRY = ("--dry-run",)
STEPS = (
    Step("machine", 20, 2, ("-c", MACHINE)),
    Step("ceilings", 45, 5, _figures("--ceilings"), DRY),
    Step("compile everything", 90, 10, ("-m", "bench.prewarm"), DRY),
    Step("attention: correctness", 60, 15, _tests("real_sizes and bfloat16 and attention and not varlen")),
    Step("other operations: correctness", 70, 20, _tests("real_sizes and bfloat16 and (not attention or varlen)", at_a_time=3)),
    Step("attention: figures", 95, 25, _figures("attention"), DRY),
    Step("attention: counters", 45, 20, ("-m", "bench.counters", "--out", "{out}"), DRY),
    Step("GPT-2 124M", 140, 30, _figures("training"), DRY),
    Step("norms, softmax, losses: figures", 75, 25, _figures("norms", "softmax", "losses", "--quick"), DRY),
    Step(
        "graphs, NCCL, twenty runs", 60, 20,
        _tests("graph or captured or several_processes or twenty", "kernels/test_gpu.py", "gptcore/test_machinery.py",
               "gptcore/test_llama.py", at_a_time=3),
    ),
    Step(
        "past 2^31 elements", 60, 20,
        _tests("2_to_the_31", "kernels/test_gpu.py", "kernels/test_softmax.py", "kernels/test_rotary.py"),
    ),
    Step("float32: correctness", 60, 20, _tests("real_sizes and not bfloat16 and (not attention or varlen)", at_a_time=3)),
    Step("attention, float32: correctness", 60, 20, _tests("real_sizes and not bfloat16 and attention and not varlen")),
    Step("Inductor", 60, 20, _tests("inductor", at_a_time=3)),
    Step("other operations: figures", 60, 20, _figures("others", "--quick"), DRY),
    Step("figures of compiled peers", 300, 30, _figures("norms", "softmax", "losses", "--late"), DRY),
)  # fmt: skip
# The steps of --tune.
TUNING = (
    *STEPS[:2],
    Step("attention: tiles", 560, 60, ("-m", "bench.tune", "--minutes", "{minutes}", "--out", "{out}"), DRY),
)


@dataclass
class Run:
    """A run of steps within one budget."""

    out: Path
    commit: str
    seconds: float
    dry: bool = False
    done: list[Done] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # Both caches go by content, so a second run on the same machine finds the first one's kernels.
        caches = Path(tempfile.gettempdir()) / "gptcore-caches"
        self.environment = {
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # needed for deterministic products; PyTorch warns without it
        }

    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Seconds that steps may still take."""
        return self.seconds - self.passed() - RESERVE

    def kernels(self) -> int:
        """The number of kernels in Triton's cache."""
        return sum(1 for _ in Path(self.environment["TRITON_CACHE_DIR"]).glob("*/*.cubin"))

    def take(self, step: Step, log: TextIO) -> Done:
        """Runs one step within its limit and the time left; writes its output to `log` and to the terminal as it comes."""

        def say(line: str) -> None:
            for file in (log, sys.stdout):
                file.write(line)
                file.flush()

        done, limit = Done(step.name, self.passed()), min(step.cap, self.left() - GRACE)
        if limit < step.need:
            done.status = f"skipped: {max(self.left(), 0):.0f} s left"
            say(f"== {done.began:.0f} s: {step.name}: {done.status}\n")
            return done
        command = step.command(self.out, self.commit, limit, self.dry)
        say(f"== {done.began:.0f} s: {step.name}, {limit:.0f} s at most: {shlex.join(command)}\n")
        before = self.kernels()
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                say(line)
                done.last = line.strip() or done.last
                if line.startswith(("FAILED ", "ERROR ")):
                    done.failed.append(line.strip())

        # In a thread: a process that the step leaves behind may keep its output open, and reading would then never end.
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
            done.status = f"exit {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            done.status = f"cut after {limit:.0f} s"
            _end(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _end(process, signal.SIGKILL)  # with everything that it started
        reader.join(1.0)
        done.seconds = self.passed() - done.began
        done.compiled = self.kernels() - before
        return done

    def page(self) -> str:
        """The summary: as many figures as fit, failed tests, and the outcome of each step."""
        lines = [f"{'step':<34}{'began':>7}{'took':>7}{'kernels':>9}  {'':<20} last line"]
        for d in self.done:
            row = f"{d.name:<34}{d.began:>5.0f} s{d.seconds:>5.0f} s{d.compiled:>9}  {d.status:<20} {d.last}"
            lines.append(row[:180])
        failed = [line[:200] for d in self.done for line in d.failed]
        if len(failed) > FAILURES:
            failed[FAILURES:] = [f"and {len(failed) - FAILURES} more: log.txt"]
        steps, figures = "\n".join([*failed, "", *lines]), ""
        for file in sorted(self.out.glob("*.json")):
            if "rows" in (saved := json.loads(file.read_text())):
                figures += short_table(saved) + "\n"
        room = PAGE - len(steps) - 100
        if len(figures) > room:
            figures = figures[:room].rpartition("\n")[0] + "\n(the rest is in the folder's .json)"
        return f"{figures}\n\n{steps}\n{self.passed():.0f} of {self.seconds:.0f} s\n"


def _end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """Sends a signal to a step and every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def main(arguments: list[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.first_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m bench.first_run --out /tmp/run --commit abc1234\n"
        "  python -m bench.first_run --out /tmp/run --steps 1 2 7\n  python -m bench.first_run --out /tmp/run --tune\n"
        "  python -m bench.first_run --out /tmp/dry --dry-run\n\n"
        "steps:\n" + "\n".join(f"  {i}. {s.name}, {s.cap:g} s at most" for i, s in enumerate(steps, 1)),
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--seconds", type=float, default=590.0, help="time for all steps together (default: 590)")
    parser.add_argument("--commit", default="unknown", help="commit to write into the results (default: unknown)")
    parser.add_argument("--tune", action="store_true", help="find attention's fastest tiles instead")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="numbers of the steps to run, in this order (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="run every step without a GPU, at tiny sizes")
    options = parser.parse_args(arguments)
    steps = TUNING if options.tune else steps
    numbers = options.steps or range(1, len(steps) + 1)
    if wrong := [n for n in numbers if not 1 <= n <= len(steps)]:
        parser.error(f"--steps: got {wrong[0]}; accepted are 1 to {len(steps)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises SystemExit, so that `take` ends the running step
    run = Run(options.out.resolve(), options.commit, options.seconds, options.dry_run)
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "log.txt").open("a") as log:
        for number in numbers:
            run.done.append(run.take(steps[number - 1], log))
            (run.out / "summary.txt").write_text(run.page())
    print(run.page(), flush=True)
    return int(any(d.status != "ok" and not d.status.startswith("skipped") for d in run.done))


if __name__ == "__main__":
    sys.exit(main())
