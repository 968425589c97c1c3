"""Finds out, without a GPU, what our operations launch on an H100 and what the compiler makes of those kernels.

`recorded` and `training_step` run the library's own launchers on tensors without data and record every launch: the
kernel, the number of programs, the bytes of its arguments. `compiled` adds each kernel's registers, shared memory and the
instructions of its loops. `bench.expected` predicts times from both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gptkernels import _check, _sass, compile_report
from gptkernels.backend import FUSED, interpreting
from gptkernels.linear_cross_entropy import triton as linear_cross_entropy
from gptkernels.testing import SPECS, Case, OpSpec, outputs
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.expected import BATCH, PRESET, TRAINING
from bench.measure import BF16
from bench.rows import BOTH, directions, row_name

TARGET = "sm_90"
# The arguments that kernels only write, by name; all other tensors are read. The two tables below say which kernels differ.
WRITTEN = {
    "OUT", "Y", "SUMMED", "MEAN", "RSTD", "C1", "C2", "DX", "DBRANCH", "PARTIAL_DW", "PARTIAL_DB", "FIRST", "SECOND", "LOSS",
    "DGATE", "DUP", "DQ", "DK", "DV",
}  # fmt: skip
WRITTEN_BY = {
    "_forward_kernel": {"SHIFTS", "SUMS"},
    "_decode_kernel": {"PARTIAL", "MAXIMA", "SUMS"},
    "_combine_kernel": {"SHIFTS", "SUMS"},
    "_delta_kernel": {"DELTA"},
}
READ_BY = {
    "_backward_kernel": {"MEAN", "RSTD", "C1", "C2", "Y"},
    "_backward_long_kernel": {"MEAN", "RSTD", "Y"},
    "_backward_strided_kernel": {"Y"},
    "_backward_means_kernel": {"MEAN", "RSTD"},
    "_delta_kernel": {"OUT"},
}
# How the names of PyTorch's operations begin that launch no kernel.
WITHOUT_KERNEL = ("empty", "new_empty", "detach", "alias", "lift", "_unsafe_view", "scalar_tensor")


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel of ours or, without `folder`, of a PyTorch kernel."""

    kernel: str
    folder: str = ""
    """The folder of the operation that the kernel belongs to."""
    programs: int = 0
    read: int = 0
    """Bytes of the arguments that are read, each counted once."""
    written: int = 0
    product: tuple[int, ...] = ()
    """(m, k, n) of a matrix product."""
    warps: int = 0
    stages: int = 0
    constants: dict[str, Any] = field(default_factory=dict)
    source: tuple[Any, ...] = field(default=(), compare=False)
    """The arguments of `triton.compile`."""

    def shape(self) -> dict[str, Any]:
        """The launch as a saved file holds it: all fields but `source` that are not empty."""
        known = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "source"}
        return {name: list(x) if isinstance(x, tuple) else x for name, x in known.items() if x}


def _bytes(x: Tensor) -> int:
    """Bytes that must move to read all of `x`: an expanded tensor's storage is smaller than its shape."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class _RecordedKernel(compile_report._NotRun):
    """Stands in for a compiled kernel: records each launch and runs nothing."""

    def __init__(self, launches: list[Launch], source: Any, gpu: Any, options: dict[str, Any]) -> None:
        self.launches, self.source = launches, (source, gpu, options)

    def run(self, x: int, y: int, z: int, *args: Any) -> None:
        source, _, options = self.source
        function = source.fn
        name, module = function.fn.__name__, function.fn.__module__
        bound = dict(zip(function.arg_names, args[-len(function.arg_names) :]))
        outputs = WRITTEN - READ_BY.get(name, set()) | WRITTEN_BY.get(name, set())
        sizes = {key: _bytes(x) for key, x in bound.items() if isinstance(x, Tensor)}
        written = sum(size for key, size in sizes.items() if key in outputs)
        constants = {function.arg_names[path[0]]: value for path, value in source.constants.items()}
        sizes_of_tiles = {key: value for key, value in constants.items() if key.isupper() and type(value) is int}
        self.launches.append(
            Launch(
                name,
                module.split(".")[-2],
                x * y * z,
                sum(sizes.values()) - written,
                written,
                warps=options["num_warps"],
                stages=options.get("num_stages", 3),
                constants=sizes_of_tiles,
                source=self.source,
            )
        )

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.run(*grid, *args)


class _PyTorchRecorder(TorchDispatchMode):
    """Records the launches of PyTorch's own kernels on tensors without data."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        returns = func._schema.returns
        view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if view or name.startswith(WITHOUT_KERNEL):
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if all(x.device.type == "meta" for x in given + made):
            product = ()
            if name in ("mm", "addmm"):
                a, b = args[-2:]
                product = (a.shape[0], a.shape[1], b.shape[1])
            read, written = (sum(map(_bytes, tensors)) for tensors in (given, made))
            self.launches.append(Launch(f"aten::{name}", read=read, written=written, product=product))
        return result


@contextmanager
def _recording() -> Iterator[list[Launch]]:
    """Within this context, our launchers take tensors without data and append their launches to the list."""
    import triton

    launches: list[Launch] = []

    def compile_never(source: Any, target: Any, options: dict[str, Any], **_: Any) -> _RecordedKernel:
        return _RecordedKernel(launches, source, target, options)

    def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:  # as on NVIDIA's GPUs
        read = _bytes(a) + _bytes(b) + (0 if first else _bytes(total))
        product = (a.shape[0], a.shape[1], b.shape[1])
        launches.append(Launch("aten::addmm", read=read, written=_bytes(total), product=product))

    with (
        compile_report._recorded(compile_report.TARGETS[TARGET]),
        mock.patch.object(triton.compiler, "compile", compile_never),
        mock.patch.object(linear_cross_entropy, "_add_product", add_product),
        torch.device("meta"),
    ):
        yield launches


def recorded(spec: OpSpec, case: Case, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """The launches of each of the operation's `directions`, in order."""
    with _recording() as launches:
        with compile_report._Literals():
            inputs = spec.make_inputs(case, dtype, torch.device("meta"), 0)
        leaves = inputs.mapped(lambda t: t.detach().requires_grad_(True))
        with compile_report._Literals(), _PyTorchRecorder(launches):
            with torch.no_grad():
                spec.function(**inputs.tensors, **inputs.options, backend="triton")
            forward = list(launches)
            launches.clear()
            result = outputs(spec.function(**leaves.tensors, **leaves.options, backend="triton"))
        outs = [out for out in result if out.requires_grad]
        grads = [torch.empty_like(out) for out in outs]
        in_forward = len(launches)
        with _PyTorchRecorder(launches):
            torch.autograd.grad(outs, list(leaves.differentiable().values()), grads, allow_unused=True)
    found = {"forward": forward, "backward": launches[in_forward:], BOTH: launches}
    if case.parameters.get("causal"):  # softmax reads only the part of each row that is not masked
        cost = spec.cost(case, dtype)
        for direction, moved in (("forward", cost.forward_bytes), ("backward", cost.backward_bytes)):
            found[direction] = [replace(launch, read=moved - launch.written) for launch in found[direction]]
    return {direction: found[direction] for direction in directions(spec)}


class _Autocast(TorchFunctionMode):
    """Computes linear layers in bfloat16, as autocast would: autocast does not support tensors without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = tuple(x.to(BF16) if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


def training_step() -> list[Launch]:
    """The launches of a training step's forward and backward; the optimizer's are left out."""
    from gptcore import GPT, GPTConfig

    with _recording() as launches:
        config = GPTConfig.preset(PRESET, kernels="triton")
        model = GPT(config)
        tokens = torch.zeros(BATCH, config.context, dtype=torch.int64)
        autocast = mock.patch.object(_check, "autocast_dtype", return_value=BF16)
        with autocast, _PyTorchRecorder(launches), _Autocast(), compile_report._Literals():
            model.loss(tokens, tokens).backward()
    return launches


def everything(ops: Sequence[str] = ()) -> dict[str, list[Launch]]:
    """The launches of each row of bench.gpu, by the row's name.

    Args:
        ops: the operations; without any, all and the training step.

    Raises:
        RuntimeError: ``TRITON_INTERPRET=1`` is set.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is 1: unset it, the interpreter compiles nothing")
    rows = {
        row_name(spec, case, BF16, direction): launches
        for spec in SPECS
        if "triton" in FUSED[spec.name] and (not ops or spec.name in ops)
        for case in spec.bench_cases
        for direction, launches in recorded(spec, case, BF16).items()
    }
    return rows if ops else {**rows, TRAINING: training_step()}


def _width(opcode: str) -> int:
    """Bytes that one thread loads or stores by an instruction: 16 by LDG.E.128, 2 by LDG.E.U16, 4 by LDG.E."""
    for modifier, size in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
        if opcode.endswith(modifier) or f"{modifier}." in opcode:
            return size
    return 4


def _section(instructions: Sequence[_sass.Instruction]) -> dict[str, int]:
    """What one warp does in straight code: instructions, FLOPs, bytes of shared memory; `loads` in bytes of one thread."""
    counts = _sass.count_kinds(instructions)
    loads = flops = shared = 0
    for i in instructions:
        if i.kind in ("LDG", "LDGSTS"):
            loads += _width(i.opcode)
        if i.kind in ("LDS", "STS", "LDGSTS"):
            shared += 32 * _width(i.opcode)
        elif i.kind in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits: one, two or four
            shared += 128 * int(i.opcode[-1]) if i.opcode[-1] in "24" else 128
        elif i.kind == "HGMMA":
            # Of four warps together; the first operand comes from registers or, by a descriptor, from shared memory.
            m, n, k = map(int, i.opcode.split(".")[1].split("x"))
            flops += 2 * m * n * k // 4
            from_shared = i.operands.split(",")[1].strip().startswith("gdesc")
            shared += 2 * k * (n + m * from_shared) // 4
        elif i.kind == "HMMA":
            flops += 2 * 16 * 8 * 16
    found = {
        "instructions": len(instructions),
        "special": sum(count for kind, count in counts.items() if kind.startswith("MUFU")),
        "loads": loads,
        "async": counts["LDGSTS"],
        "flops": flops,
        "shared_bytes": shared,
    }
    return {name: count for name, count in found.items() if count}


def _figures(source: tuple[Any, ...]) -> dict[str, Any]:
    """Compiles a kernel: its registers, shared memory, spills, straight code, and innermost loops in the code's order."""
    import triton

    kernel = triton.compile(source[0], target=source[1], options=source[2])
    cubin = kernel.asm["cubin"]
    code = _sass.disassemble(cubin)
    inner = [
        loop
        for loop in code.loops
        if not any(other is not loop and loop.start <= other.start and other.end <= loop.end for other in code.loops)
    ]
    looped = {i.address for loop in code.loops for i in loop.instructions}
    return {
        "registers": _sass.resources(cubin)[0],
        "shared": kernel.metadata.shared,
        "spills": code.spills,
        "serialised": code.wgmma_serialised,
        "straight": _section([i for i in code.instructions if i.address not in looped]),
        "loops": [_section(loop.instructions) for loop in inner],
    }


def _counted(launches: Iterable[Launch], figures: Mapping[int, int] | None = None) -> list[dict[str, Any]]:
    """Launches as a saved file holds them: equal ones once, with their count.

    `figures`: the index of each kernel's figures, by the identity of the launch's source.
    """
    found: list[dict[str, Any]] = []
    for launch in launches:
        shape = launch.shape()
        if figures is not None and launch.source:
            shape["figures"] = figures[id(launch.source)]
        same = next((other for other in found if {**other, "count": 0} == {**shape, "count": 0}), None)
        if same is None:
            found.append({**shape, "count": 1})
        else:
            same["count"] += 1
    return found


def without_figures(rows: Mapping[str, list[Launch]]) -> dict[str, list[dict[str, Any]]]:
    """Every row's launches as a saved file holds them, without the compiler's figures."""
    return {name: _counted(launches) for name, launches in rows.items()}


def compiled(rows: Mapping[str, list[Launch]]) -> dict[str, Any]:
    """The contents of the file that `bench.expected` reads: each kernel's figures once, and every row's launches."""
    import triton

    sources: dict[tuple[str, str], tuple[Any, ...]] = {}
    keys: dict[int, tuple[str, str]] = {}
    for launch in (launch for launches in rows.values() for launch in launches if launch.source):
        key = launch.source[0].hash(), repr(sorted(launch.source[2].items(), key=str))
        keys[id(launch.source)] = key
        sources.setdefault(key, launch.source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # MLIR, LLVM and the assembler release Python's global lock
        kernels = list(pool.map(_figures, sources.values()))
    numbers = {key: index for index, key in enumerate(sources)}
    figures = {source: numbers[key] for source, key in keys.items()}
    return {
        "kind": "expected",
        "triton": triton.__version__,
        "target": TARGET,
        "kernels": kernels,
        "rows": {name: _counted(launches, figures) for name, launches in rows.items()},
    }
