"""Compiles every Triton kernel for a GPU that need not be there, and reads its machine code.

``python -m gptkernels.compile_report --target sm_90`` runs each operation's own launchers, forward and backward, over its
bench cases with tensors that have no data; every launch is compiled instead of run. It prints registers, spill
instructions, shared memory and matrix instructions of each kernel in the configuration that is shipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# What a program may use on each target, bytes of shared memory (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration: what its machine code uses."""

    case: str
    kernel: str
    target: str
    num_warps: int
    registers: int
    spills: int  # load and store instructions to local memory
    shared_bytes: int
    wgmma: int
    mma: int

    def row(self) -> str:
        return (
            f"{self.case:<44} {self.kernel:<24} {self.num_warps:>5} {self.registers:>9} {self.spills:>6} "
            f"{self.shared_bytes:>9} {self.wgmma:>6} {self.mma:>5}"
        )


HEADER = (
    f"{'case':<44} {'kernel':<24} {'warps':>5} {'registers':>9} {'spills':>6} {'shared B':>9} {'wgmma':>6} {'mma':>5}"
)


def _bound(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A launch's arguments by name, and its options (num_warps, ...)."""
    values = dict(zip(fn.arg_names, args)) | {n: v for n, v in kwargs.items() if n in fn.arg_names}
    return values, {n: v for n, v in kwargs.items() if n not in fn.arg_names}


def _source(fn: Any, values: dict[str, Any]) -> Any:
    """What Triton would specialise this launch on: types, constants, and divisibility by 16."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(fn.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """``(resource usage, machine code)`` by the tools that the triton wheel carries."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__path__[0]) / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout
            for command in ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        )
    return usage, code


def _launches(op: str, target: str, dtype: torch.dtype, cases: Any, spec: Any) -> dict[str, tuple[str, Any, Any, Any]]:
    """Runs `op`'s launchers over `cases` on tensors without data; every distinct launch, by what it is compiled from."""
    import triton

    from gptkernels import _library, _triton, backend

    found: dict[str, tuple[str, Any, Any, Any]] = {}
    current = ""

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values, options = _bound(self, args, kwargs)
        source = _source(self, values)
        found.setdefault(source.hash() + json.dumps(options), (current, self, source, options))

    # Tensors without data would stop at the ops' fake implementations: call the launchers themselves.
    direct = SimpleNamespace(**{name: load() for name, load in _library.launchers.items()})
    with (
        mock.patch.object(_library, "ops", return_value=direct),
        mock.patch.object(backend, "_why_not", return_value=None),
        mock.patch.object(triton.JITFunction, "run", record),
        _triton.compiling_for(target),
    ):
        for case in cases:
            current = f"{op} {case.name} {_TYPES[dtype]}"
            inputs = spec.make_inputs(case, dtype, torch.device("meta"), 0)
            leaves = inputs.mapped(lambda t: t.requires_grad_(True))
            out = spec.function(**leaves.tensors, **leaves.options, backend="triton")
            torch.autograd.grad(out, list(leaves.differentiable().values()), torch.empty_like(out))
    return found


def compile_ops(target: str, ops: tuple[str, ...] = (), dtypes: tuple[str, ...] = ("bf16", "fp32")) -> list[Compiled]:
    """Compiles the kernels that the bench cases of `ops` (empty: all) launch on `target`, e.g. "sm_90".

    Raises:
        ValueError: an unknown target, operation or dtype.
        RuntimeError: ``TRITON_INTERPRET=1`` is set (interpreted kernels have no machine code).
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1: unset it, interpreted kernels have no machine code")
    if target not in SHARED_MEMORY:
        raise ValueError(f"target: got {target!r}; accepted are {', '.join(SHARED_MEMORY)}")
    import triton
    from triton.backends.compiler import GPUTarget

    from gptkernels.backend import FUSED
    from gptkernels.testing import SPECS

    names = {spec.name: spec for spec in SPECS if "triton" in FUSED[spec.name]}
    if unknown := set(ops) - set(names):
        raise ValueError(f"ops: got {sorted(unknown)}; accepted are {sorted(names)}")
    by_name = {name: dtype for dtype, name in _TYPES.items() if dtype.is_floating_point}
    if unknown := set(dtypes) - set(by_name):
        raise ValueError(f"dtypes: got {sorted(unknown)}; accepted are {sorted(by_name)}")
    results = []
    for name in ops or tuple(names):
        for dtype in dtypes:
            launches = _launches(name, target, by_name[dtype], names[name].bench_cases, names[name])
            for case, fn, source, options in launches.values():
                kernel = triton.compile(
                    source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options
                )
                usage, code = _disassemble(kernel.asm["cubin"])
                registers = re.search(r"REG:(\d+)", usage)
                assert registers is not None, usage
                results.append(
                    Compiled(
                        case=case,
                        kernel=fn.fn.__name__,
                        target=target,
                        num_warps=options.get("num_warps", 4),
                        registers=int(registers.group(1)),
                        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
                        shared_bytes=kernel.metadata.shared,
                        wgmma=len(re.findall(r"\bHGMMA\b", code)),
                        mma=len(re.findall(r"\bHMMA\b", code)),
                    )
                )
                print(results[-1].row(), file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptkernels.compile_report",
        description="Compile every Triton kernel in its shipped configuration, without a GPU, and read its machine code.",
        epilog="example: python -m gptkernels.compile_report --target sm_90 --op attention --json report.json",
    )
    parser.add_argument("--target", default="sm_90", choices=SHARED_MEMORY, help="architecture (default: sm_90)")
    parser.add_argument("--op", action="append", default=[], help="an operation; may be repeated (default: all)")
    parser.add_argument("--dtype", action="append", default=[], help="bf16, fp16 or fp32 (default: bf16 and fp32)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    print(HEADER, file=sys.stderr)
    results = compile_ops(options.target, tuple(options.op), tuple(options.dtype) or ("bf16", "fp32"))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    limit = SHARED_MEMORY[options.target]
    over = [result for result in results if result.spills or result.shared_bytes > limit]
    print(f"{len(results)} kernels for {options.target}; {len(over)} spill or need over {limit} bytes of shared memory")


if __name__ == "__main__":
    main()
