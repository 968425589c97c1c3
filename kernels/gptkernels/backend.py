"""The one place that decides which implementation of an operation runs.

Three backends: ``reference`` (plain PyTorch, anywhere), ``triton`` (NVIDIA and AMD GPUs; on the CPU only through
Triton's interpreter, for tests) and ``native`` (C++ for the CPU). Operations ask `choose`; everybody else reads
`available_backends` and `report`.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gptkernels import _native
from gptkernels._library import FUSED

BACKENDS = ("reference", "triton", "native")
CHOICES = ("auto", *BACKENDS)

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# "auto" takes the first of these that can run, and reference when none can.
_PREFERRED = {"cuda": ("triton",), "cpu": ("native",)}
_MIN_CAPABILITY = (8, 0)

_choice = "auto"


class BackendUnavailableError(RuntimeError):
    """An explicitly chosen backend cannot run here; the message says why and what to do."""


def interpreting() -> bool:
    """True when Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``): on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _validated(name: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"backend: got {name!r}; accepted are {', '.join(map(repr, CHOICES))}")
    return name


@cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


@cache
def _gpu_too_old(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= _MIN_CAPABILITY:
        return None
    found = ".".join(map(str, capability))
    return f"{torch.cuda.get_device_name(index)} has compute capability {found}; 8.0 and newer are supported"


def _no_kernel(op: str | None, backend: str) -> str | None:
    if op is None or backend in FUSED[op]:
        return None
    missing = [name for name, backends in FUSED.items() if backend not in backends]
    return f"no {backend} kernel yet for {', '.join(missing)}: reference"


def _why_not(op: str | None, backend: str, device_type: str, device_index: int) -> str | None:
    """Returns why `backend` cannot run `op` (None: any operation) on that device; None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type != "cpu":
            return (
                f"the native kernels run on the CPU and the tensors are on {device_type!r}; use 'auto' or 'reference'"
            )
        return _native.why_not() or _no_kernel(op, backend)
    if missing := _triton_missing():
        return missing
    if device_type == "cuda":
        return _gpu_too_old(device_index) or _no_kernel(op, backend)
    if device_type == "cpu" and interpreting():
        return _no_kernel(op, backend)
    where = "there is no GPU here" if not torch.cuda.is_available() else f"the tensors are on {device_type!r}"
    return (
        f"Triton kernels need a CUDA or ROCm device and {where}; use 'auto' or 'reference' "
        "(for tests, TRITON_INTERPRET=1 runs them on the CPU in Triton's interpreter)"
    )


def _start(backend: str) -> str | None:
    """Prepares a backend that can run (the native one may have to be compiled); returns the reason if that fails."""
    return _native.load() if backend == "native" else None


# As torch.compiler.assume_constant_result does; but that imports the compiler, and `import gptkernels` would take seconds.
_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
_start._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _index(device: torch.device) -> int:
    return device.index or 0


def _transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp) or forward-mode differentiation is active; they support PyTorch's own ops only."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


_NO_DISPATCH: Any = torch._C._disabled_torch_dispatch_impl  # Tensor.__torch_dispatch__, unless a subclass overrides it
# Subclasses that pass every operation on to their data.
_TRANSPARENT = ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor")


def _is_plain(x: Tensor) -> bool:
    """Whether a kernel can read `x`'s memory. It cannot for DTensors, nested, sparse and other tensors made of tensors."""
    kind: Any = type(x)
    if kind.__torch_dispatch__ is not _NO_DISPATCH:
        return kind.__name__ in _TRANSPARENT and kind.__module__.startswith("torch.")
    return x.layout is torch.strided and not x.is_nested


def choose(op: str, x: Tensor, backend: str | None) -> str:
    """Returns the backend that runs `op` on a tensor like `x`.

    `backend` is the caller's argument: None stands for the choice made by `use_backend`, "auto" for the fastest that can
    run. If the chosen backend has no kernel for `op` (see `report`), the reference runs it. "auto" also takes the
    reference under torch.func's transforms and forward-mode differentiation, and for tensors that no kernel can read:
    DTensors, nested and sparse tensors, and other subclasses with operations of their own.

    Raises:
        ValueError: `backend` is not a known name.
        BackendUnavailableError: an explicit choice that cannot run on `x`'s device, under such a transform, or for such a
            tensor.
        TypeError: an explicit fused backend for a dtype that it does not compute in.
    """
    name = _choice if backend is None else _validated(backend)
    device_type, device_index = x.device.type, x.device.index or 0
    if name == "auto":
        if x.dtype in FUSED_DTYPES and not _transformed() and _is_plain(x):
            for candidate in _PREFERRED.get(device_type, ()):
                if _why_not(op, candidate, device_type, device_index) is None:
                    if (failure := _start(candidate)) is None:
                        return candidate
                    warnings.warn(f"auto takes the reference: {failure}", RuntimeWarning, stacklevel=3)
        return "reference"
    if reason := _why_not(None, name, device_type, device_index) or _start(name):
        raise BackendUnavailableError(f"backend {name!r} cannot run {op} on device {device_type!r}: {reason}")
    if name not in FUSED[op]:
        return "reference"  # the backend runs here and has no kernel for this: report() says so
    if _transformed():
        raise BackendUnavailableError(
            f"backend {name!r} cannot run {op} under torch.func transforms (grad, vmap, jvp) or forward-mode "
            "differentiation; use 'auto' or 'reference'"
        )
    if not _is_plain(x):
        what = type(x).__name__ if type(x) is not Tensor else "nested tensor" if x.is_nested else f"{x.layout} tensor"
        raise BackendUnavailableError(
            f"backend {name!r} cannot run {op} on a {what}: its kernels read plain strided memory; use 'auto' or 'reference'"
        )
    if x.dtype not in FUSED_DTYPES:
        raise TypeError(
            f"backend {name!r} computes {op} in float32, bfloat16 or float16; got {x.dtype} (use 'reference')"
        )
    return name


class use_backend:
    """Chooses the backend of every call that does not name one: a setter, and a context manager that undoes it.

    ``use_backend("reference")`` holds for the process until the next call; ``with use_backend("reference"): ...``
    restores the earlier choice at the end. The choice is the process's, not the thread's.

    Raises:
        ValueError: not one of "auto", "reference", "triton", "native".
        BackendUnavailableError: an explicit backend that can run on no device of this machine.
    """

    def __init__(self, name: str) -> None:
        global _choice
        _validated(name)
        if name != "auto":
            reasons = {str(device): _why_not(None, name, device.type, _index(device)) for device in _devices()}
            if all(reasons.values()):
                # No device can run it; the accelerator's reason is the one to act on.
                raise BackendUnavailableError(f"backend {name!r} cannot run here: {list(reasons.values())[-1]}")
        self._previous = _choice
        _choice = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._previous


def available_backends() -> tuple[str, ...]:
    """The backends that can run on at least one device of this machine, e.g. ``("reference", "triton")``."""
    return tuple(
        name
        for name in BACKENDS
        if any(_why_not(None, name, device.type, _index(device)) is None for device in _devices())
    )


@dataclass(frozen=True)
class OpReport:
    """What runs one operation on one device: the backend that "auto" takes, and why each other one is not available."""

    op: str
    device: str
    auto: str
    unavailable: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What runs where, and for what does not, why. ``print(report())`` is meant for people."""

    choice: str
    rows: tuple[OpReport, ...]
    native_level: str
    """The set of instructions that the native kernels use, or would use."""

    def __str__(self) -> str:
        lines = [f"backend choice: {self.choice}"]
        if any(row.auto == "native" for row in self.rows):
            lines.append(
                f"native kernels: {self.native_level}" + ("" if _native.loaded() else ", made ready at first use")
            )
        reasons: dict[str, str] = {}
        for device in dict.fromkeys(row.device for row in self.rows):
            lines.append(f"{device}:")
            for row in self.rows:
                if row.device == device:
                    lines.append(f"  {row.op:<20} auto -> {row.auto}")
                    reasons |= {f"{name} on {device}": reason for name, reason in row.unavailable.items()}
        lines += [f"not available: {what}: {reason}" for what, reason in reasons.items()]
        return "\n".join(lines)


def report() -> Report:
    """What "auto" runs for each operation on each device of this machine, and why each other backend is not available."""
    rows = []
    for device in _devices():
        for op in FUSED:
            reasons = {name: _why_not(op, name, device.type, _index(device)) for name in BACKENDS}
            unavailable = {name: reason for name, reason in reasons.items() if reason}
            candidates = [name for name in _PREFERRED.get(device.type, ()) if name not in unavailable]
            rows.append(OpReport(op, str(device), (candidates or ["reference"])[0], unavailable))
    return Report(_choice, tuple(rows), _native.loaded() or _native.supported()[0].name)
