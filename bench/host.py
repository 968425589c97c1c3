"""Times the host's part of a Triton-backed call, in Python and PyTorch, without a GPU: ``python -m bench.host``.

It calls each operation's public function, and its backward, on small CPU tensors with a stand-in for Triton's driver.
Argument checks, the choice of the backend, autograd, PyTorch's dispatcher, the launcher and Triton's launch code run as
on an H100; the compiled kernel is replaced by one that does nothing.

The figures leave out the driver's own call, CUDA's allocator (the CPU's is used), asking for the current device and stream,
and in a backward the wait for autograd's GPU thread. They include what a GPU would not cost the host: a loss's PyTorch
operations and products, which run on the CPU here, and the check of packed attention's lengths.

Operations are timed in turns of 20 calls. The fastest turn is shown, in microseconds of processor time a call, since other
work on the machine only adds time: *forward* without gradients, as in decoding; *recorded* for autograd; *backward* of the
20 calls together, as in a model.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gptkernels.backend import interpreting
from gptkernels.testing import SPECS, outputs

from bench.measure import BF16, save, versions

CALLS = 20  # of a turn
# The cases of each operation that are called: ones that take the usual way through its launcher.
CASES = {
    "attention": ("B1-H2-T64-D64-causal", "B1-H1-T1-D64-causal-keys77"),
    "attention_varlen": ("T37+1+20-H2-D16",),
    "layer_norm": ("9x768",),
    "add_layer_norm": ("70x100",),
    "rms_norm": ("9x768",),
    "add_rms_norm": ("70x100",),
    "softmax": ("40x100-scale3",),
    "rotary": ("B2-H3-T19-D64",),
    "gelu": ("9x3072",),
    "swiglu": ("9x2048",),
    "cross_entropy": ("33x17",),
    "linear_cross_entropy": ("33-C16-V17",),
}


class _Driver:
    """Stands in for Triton's GPU driver, which tells Triton the target, the device and the stream."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self  # a key that no real device has, in Triton's cache of compiled kernels

    def get_current_stream(self, device: Any) -> int:
        return 0


def _nothing(*args: Any) -> None:
    pass


@contextmanager
def stand_in(run: Callable[..., None] = _nothing) -> Iterator[None]:
    """Makes Triton launch on CPU tensors as on an H100, without compiling anything.

    `run` is called in place of each kernel with what Triton passes to its driver: the grid's three sizes, the stream, the
    compiled kernel (in place of its handle), its metadata, the hooks' data, two hooks, the kernel's arguments.
    """
    import triton
    from gptkernels import _triton, backend
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

    def no_reason(*_: Any) -> None:  # a mock's own function would take 20 us
        return None

    class NotRun(CompiledKernel):
        """A kernel that passes for compiled and loaded."""

        def __init__(self, source: Any, **_: Any) -> None:
            self.src, self.name, self.module, self._run = source, source.fn.__name__, self, run
            self.function, self.packed_metadata = self, None

        def __del__(self) -> None:  # the base class would unload it
            pass

    with (
        mock.patch.object(backend, "_why_not", no_reason),
        mock.patch.object(triton.runtime.driver, "_active", _Driver(GPUTarget("cuda", 90, 32))),
        mock.patch.object(triton.compiler, "compile", lambda source, **_: NotRun(source)),
        _triton.compiling_for("sm_90"),
    ):
        yield


class Timed:
    """Times one case of one operation; each call has tensors of its own. `took`: microseconds a call, for each turn."""

    def __init__(self, op: str, case: str) -> None:
        spec = next(spec for spec in SPECS if spec.name == op)
        inputs = spec.make_inputs(next(c for c in spec.cases if c.name == case), BF16, torch.device("cpu"), 0)
        drawn = [inputs.mapped(lambda t: t.detach().clone().requires_grad_()) for _ in range(CALLS)]
        self._calls = [partial(spec.function, **one.tensors, **one.options, backend="triton") for one in drawn]
        self._leaves = [leaf for one in drawn for leaf in one.differentiable().values()]
        self._grads = [torch.ones_like(out) for call in self._calls for out in outputs(call())]
        self.took: dict[str, list[float]] = {"forward": [], "recorded": [], "backward": []}

    def turn(self) -> None:
        with torch.no_grad(), self._timed("forward"):
            for call in self._calls:
                call()
        with self._timed("recorded"):
            results = [call() for call in self._calls]
        outs = [out for result in results for out in outputs(result)]
        with self._timed("backward"):
            torch.autograd.grad(outs, self._leaves, self._grads)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.took[what].append((time.process_time() - start) / CALLS * 1e6)


def measured(ops: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a call of the fastest turn: for each operation and case, by "forward", "recorded", "backward"."""
    with stand_in():
        timed = {f"{op} {case}": Timed(op, case) for op in ops for case in CASES[op]}
        for _ in range(rounds):
            for one in timed.values():
                one.turn()
    return {name: {what: min(took) for what, took in one.took.items()} for name, one in timed.items()}


def table(saved: dict[str, Any]) -> str:
    """A saved result as a Markdown table."""
    lines = ["| operation and case | forward, us | recorded, us | backward, us |", "| --- | --- | --- | --- |"]
    for name, row in saved["rows"].items():
        lines.append(
            f"| {name} | " + " | ".join(f"{row[kind]:.1f}" for kind in ("forward", "recorded", "backward")) + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m bench.host\n  python -m bench.host attention layer_norm --rounds 200\n"
        "  python -m bench.host --out bench/results",
    )
    parser.add_argument("ops", nargs="*", help=f"operations to call (default: all): {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=50, help="turns of each operation, of 20 calls (default: 50)")
    parser.add_argument("--out", type=Path, help="folder for host-<processor>.json (default: nothing is saved)")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(CASES):
        parser.error(f"ops: got {', '.join(sorted(unknown))}; accepted are {', '.join(CASES)}")
    if options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}; accepted are 1 and more")
    if interpreting():
        parser.error("TRITON_INTERPRET is 1: unset it, the interpreter does not use Triton's launch code")
    import triton

    torch.set_num_threads(1)  # idle threads would add processor time
    machine = {"processor": platform.processor() or platform.machine(), "triton": triton.__version__, **versions()}
    saved = {"kind": "host", "machine": machine, "rows": measured(options.ops or list(CASES), options.rounds)}
    print(table(saved))
    if options.out:
        file = options.out / f"host-{'-'.join(machine['processor'].lower().split())}.json"
        save(saved, file)
        print(f"\nsaved as {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
