"""The choice of the backend: an explicit choice is kept or an error, "auto" never fails, and the report is true."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import gptkernels
import pytest
import torch
import torch.distributed as dist
from gptkernels import BackendUnavailableError, available_backends, layer_norm, report, use_backend
from gptkernels.backend import FUSED, choose
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

X = torch.randn(3, 8)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new Python process with the test's import path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("call", [lambda: layer_norm(X, backend="cuda"), lambda: use_backend("cuda")])
def test_unknown_name(call):
    with pytest.raises(ValueError, match=r"backend: got 'cuda'; accepted are 'auto', 'reference', 'triton', 'native'"):
        call()


def test_explicit_triton_on_a_cpu_tensor_is_an_error_outside_the_interpreter():
    code = """
import torch, gptkernels
x = torch.randn(2, 8)
assert "triton" not in gptkernels.available_backends() or torch.cuda.is_available()
for call in (lambda: gptkernels.layer_norm(x, backend="triton"), lambda: gptkernels.softmax(x, backend="triton")):
    try: call()
    except gptkernels.BackendUnavailableError as error: print(error)
assert torch.equal(gptkernels.softmax(x), gptkernels.softmax(x, backend="native"))
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("cannot run" in line and "use 'auto' or 'reference'" in line for line in lines), lines


def test_works_without_triton():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."): raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, gptkernels
x = torch.randn(2, 8, requires_grad=True)
gptkernels.layer_norm(x).sum().backward()
assert gptkernels.available_backends() == ("reference", "native")
print(gptkernels.report())
try: gptkernels.layer_norm(x, backend="triton")
except gptkernels.BackendUnavailableError as error: print("error:", error)
assert "triton" not in sys.modules
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "the package triton is not installed (pip install triton)" in done.stdout
    assert "error: backend 'triton' cannot run layer_norm" in done.stdout


def test_importing_imports_no_triton_and_touches_no_network():
    code = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network at import")
socket.socket.connect = refuse
import gptkernels
assert "triton" not in sys.modules, "triton was imported"
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_use_backend_is_a_setter_and_a_context_manager(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    from gptkernels.layer_norm import reference

    original = reference.layer_norm
    monkeypatch.setattr(reference, "layer_norm", lambda *a: calls.append("reference") or original(*a))
    use_backend("triton")
    x = X.cuda() if torch.cuda.is_available() else X
    layer_norm(x)
    assert calls == []
    with use_backend("reference"):
        layer_norm(x)
        assert calls == ["reference"]
        layer_norm(x, backend="triton")  # the call's own choice wins
        assert calls == ["reference"]
    layer_norm(x)
    assert calls == ["reference"]
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert report().choice == "triton"


class Wrapper(Tensor):
    """A tensor subclass that holds a tensor and overrides every operation, with PyTorch's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        out = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function.namespace == "aten"
        plain = [a.inner if isinstance(a, Wrapper) else a for a in args]
        out = function(*plain, **(kwargs or {}))
        return cls(out) if isinstance(out, Tensor) else out


class Labelled(Tensor):
    """A subclass that overrides no operation, as most do."""


@pytest.fixture
def one_process():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded() -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(X, dist.device_mesh.init_device_mesh("cpu", (1,)), [Shard(0)])


UNREADABLE = {
    "Wrapper": lambda: Wrapper(X),
    "DTensor": sharded,
    "NestedTensor": lambda: torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged),
    "nested tensor": lambda: torch.nested.nested_tensor([X, X[:2]]),
    "torch.sparse_coo tensor": lambda: X.to_sparse(),
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_that_no_kernel_can_read_takes_the_reference(what: str, one_process: None):
    x = UNREADABLE[what]()
    for op in FUSED:
        assert choose(op, x, None) == choose(op, x, "auto") == "reference"
        for backend in set(available_backends()) & set(FUSED[op]):
            message = rf"backend '{backend}' cannot run {op} on a {what}: .* use 'auto' or 'reference'"
            with pytest.raises(BackendUnavailableError, match=message):
                choose(op, x, backend)
    if what != "torch.sparse_coo tensor":  # which has no GELU
        assert type(gptkernels.gelu(x)) is type(x)


def test_a_tensor_that_is_its_data_runs_on_the_kernels(one_process: None):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    gathered = AsyncCollectiveTensor(X)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    for x in (X, torch.nn.Parameter(X), X.as_subclass(Labelled), gathered, fake, X.t()):
        assert choose("gelu", x, None) == "native"
    expected = gptkernels.gelu(X)
    for x in (torch.nn.Parameter(X), X.as_subclass(Labelled), gathered):
        torch.testing.assert_close(gptkernels.gelu(x).detach().as_subclass(Tensor), expected)
    assert gptkernels.gelu(fake).shape == X.shape


def test_sequence_parallel_norms_and_activations(one_process: None):
    """`parallelize_module` turns inputs and parameters into DTensors."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.RMSNorm(8), torch.nn.GELU())
    ours = copy.deepcopy(plain)
    gptkernels.replace_modules(ours)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    parallelize_module(ours, mesh, {name: SequenceParallel() for name in ("0", "1")})
    x = torch.randn(2, 3, 8)
    out, expected = ours(x), plain(x)
    assert isinstance(out, DTensor)
    torch.testing.assert_close(out.full_tensor(), expected)
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)


def test_report_says_what_runs_and_why_not():
    rows = {(row.op, row.device): row for row in report().rows}
    assert {op for op, _ in rows} == set(FUSED)
    on_cpu = rows["attention", "cpu"]
    assert on_cpu.auto == "native"  # the interpreter is never chosen by "auto"
    assert "native" not in on_cpu.unavailable
    assert available_backends()[0] == "reference"
    text = str(report())
    assert re.search(r"attention +auto -> native", text)
    assert "no triton kernel yet for linear" in text


def test_report_on_a_cpu_explains_triton():
    done = run_python("import gptkernels; print(gptkernels.report())", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert "triton on cpu: Triton kernels need a CUDA or ROCm device and there is no GPU here" in done.stdout


def test_the_public_names_are_the_documented_ones():
    assert sorted(gptkernels.__all__) == [
        "BackendUnavailableError",
        "add_layer_norm",
        "add_rms_norm",
        "attention",
        "attention_dropout_mask",
        "attention_varlen",
        "available_backends",
        "causal_attention",
        "cross_entropy",
        "gelu",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "replace_modules",
        "report",
        "restore_modules",
        "rms_norm",
        "rotary",
        "softmax",
        "swiglu",
        "tune_allocator",
        "use_backend",
    ]
    assert all(getattr(gptkernels, name).__doc__ for name in gptkernels.__all__)
