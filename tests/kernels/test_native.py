"""The native extension: every level of instructions gives right numbers, and its build survives what machines do to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gptkernels
import pytest
import torch
from gptkernels import _native, backend
from gptkernels.testing import outputs, poisoned_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the native kernels are built on Linux")

# Builds two operations instead of all: seconds instead of a minute.
SMALL = """
import sys, gptkernels, torch
from gptkernels import _native
everything = _native.sources()
_native.sources = lambda: {n: p for n, p in everything.items() if n.endswith(".h") or n in ("softmax.cpp", "rms_norm.cpp")}
"""
USE = (
    SMALL
    + """
x = torch.randn(9, 33)
assert torch.allclose(gptkernels.softmax(x, backend="native"), torch.softmax(x, -1))
print("right")
"""
)


def start(code: str, cache: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    values = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_EXTENSIONS_DIR": str(cache)} | environment
    command = [sys.executable, "-c", code, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=values, text=True, **pipes, start_new_session=True)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out, err


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "gptkernels").glob("*.so"))


def test_two_processes_that_start_cold_compile_once(tmp_path: Path):
    both = [start(USE, tmp_path) for _ in range(2)]
    ends = [finish(process) for process in both]
    assert [out for out, _ in ends] == ["right\n"] * 2
    assert sum("compiling the native CPU kernels" in err for _, err in ends) == 1
    assert len(libraries(tmp_path)) == 1


def test_a_build_that_was_killed_does_not_hang_the_next(tmp_path: Path):
    first = start(USE, tmp_path)
    building = tmp_path / "gptkernels"
    until = time.monotonic() + 60
    while not list(building.glob("building-*/build.ninja")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert libraries(tmp_path) == []
    left = list(building.glob("building-*"))
    assert left  # it was in the middle
    assert finish(start(USE, tmp_path))[0] == "right\n"
    assert len(libraries(tmp_path)) == 1
    assert list(building.glob("building-*")) == []
    # A library that is no library is an error once, and compiled again by the next process.
    libraries(tmp_path)[0].write_bytes(b"half")
    broken = start(USE, tmp_path)
    assert "could not be built or loaded" in broken.communicate(timeout=400)[1]
    assert finish(start(USE, tmp_path))[0] == "right\n"


def test_without_a_compiler_auto_takes_the_reference_and_says_why(tmp_path: Path):
    code = """
import gptkernels, torch
x = torch.randn(3, 8)
assert torch.equal(gptkernels.softmax(x), gptkernels.softmax(x, backend="reference"))
print(gptkernels.report())
try: gptkernels.softmax(x, backend="native")
except gptkernels.BackendUnavailableError as error: print("error:", error)
"""
    out, _ = finish(start(code, tmp_path, CXX="no-such-compiler"))
    assert "auto -> reference" in out
    assert "native on cpu: there is no C++ compiler (no-such-compiler is not on PATH): install one" in out
    assert "error: backend 'native' cannot run softmax on device 'cpu': there is no C++ compiler" in out


def test_a_compiler_that_fails_warns_once_and_takes_the_reference(tmp_path: Path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\ncase $1 in --version) echo broken 1.0;; *) echo no room on disk >&2; exit 1;; esac\n")
    broken.chmod(0o755)
    code = (
        SMALL
        + """
import warnings
warnings.simplefilter("always")
x = torch.randn(3, 8)
for _ in range(3): assert torch.equal(gptkernels.softmax(x), gptkernels.softmax(x, backend="reference"))
"""
    )
    _, err = finish(start(code, tmp_path, CXX=str(broken)))
    assert err.count("auto takes the reference: the native CPU kernels could not be built") == 1
    assert list((tmp_path / "gptkernels").glob("building-*")) == []


def test_the_key_holds_what_the_machine_code_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    level = _native.supported()[0]
    key = _native._key(level, ("-O3",))
    assert key == _native._key(level, ("-O3",))
    assert key != _native._key(level, ("-O2",))
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert key == _native._key(level, ("-O3",))  # the stable interface serves it
    monkeypatch.undo()
    changed = tmp_path / "norm.h"
    changed.write_text(_native.sources()["csrc/norm.h"].read_text() + "// changed\n")
    everything = _native.sources()
    monkeypatch.setattr(_native, "sources", lambda: everything | {"csrc/norm.h": changed})
    assert key != _native._key(level, ("-O3",))


def test_pytorchs_own_limit_of_instructions_is_kept():
    code = "from gptkernels import _native; print(*(level.name for level in _native.supported()))"
    for limit, names in (("default", "portable"), ("avx2", "avx2 portable")):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "ATEN_CPU_CAPABILITY": limit}
        shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
        assert names.endswith(shown.strip())
        assert shown.strip()


LEVELS = [level for level in (_native.EMULATED_AMX, *_native.LEVELS) if level.name != "amx"]


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_every_level_is_within_the_error_budget(level: _native.Level):
    """Whatever this machine's best level is, the others are compiled and held to the same budget."""
    capabilities = torch.cpu.get_capabilities()
    if not all(capabilities.get(need, False) for need in level.needs):
        pytest.skip(f"this CPU has no {level.name}")
    code = """
import subprocess, sys, torch
from gptkernels import _native
level = next(l for l in (_native.EMULATED_AMX, *_native.LEVELS) if l.name == sys.argv[1])
assert (reason := _native.load(level)) is None, reason
_native.multiplies = lambda dtype: False  # our products, also where PyTorch's would be taken
from gptkernels.testing import SPECS, check_op
count = 0
for spec in SPECS:
    for case in spec.cases:
        if "V120000" in case.name: continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_op(spec, case, dtype, "native")
            count += 1
assert _native.loaded() == sys.argv[1]
print(count)
library = _native.cache_folder() / f"{_native._key(level, (*_native.FLAGS, *level.flags))}.so"
needed = subprocess.run(["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True)
print(*(line.split()[1] for line in needed.stdout.splitlines() if "@" not in line and " w " not in line))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, level.name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, needed = done.stdout.splitlines()
    assert int(count) > 300
    # Nothing of PyTorch but its stable C interface: a binary with another symbol would need its own version of PyTorch.
    others = {symbol for symbol in needed.split() if not symbol.startswith(("aoti_torch_", "torch_", "std::"))}
    assert others == set()
    assert "aoti_torch_empty_strided" in needed


def test_tune_allocator_keeps_freed_memory():
    """Page faults of a large tensor made and freed over and over: many by default, next to none afterwards."""
    code = """
import resource, sys, torch, gptkernels
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20): torch.empty(48 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
done = gptkernels.tune_allocator()
faults()
print(done, plain, faults())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    done, plain, tuned = shown.split()
    if done == "False":
        pytest.skip("no glibc here")
    assert int(tuned) < int(plain) / 10


def test_the_loss_and_its_gradients_over_several_chunks():
    """bfloat16, so that the weight's gradient is summed over chunks by our own product: 64 MiB hold 279 of these rows."""
    classes, tokens, width = 120_000, 300, 24
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(classes, width, generator=generator)).requires_grad_()
    target = torch.randint(0, classes, (tokens,), generator=generator)
    results = []
    for name in ("native", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = gptkernels.linear_cross_entropy(x, weight, target, backend=name)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, weight))))
    (loss, grad_x, grad_weight), (plain_loss, plain_x, plain_weight) = results
    assert grad_weight.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(grad_x, plain_x, rtol=0.05, atol=2e-5)
    torch.testing.assert_close(grad_weight, plain_weight, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_backward_gives_the_same_gradients(reduction: str):
    """The first backward gives its buffers away; with retain_graph the second one computes them anew."""
    x, weight = torch.randn(9, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    target = torch.randint(0, 40, (9,))
    for loss in (
        gptkernels.linear_cross_entropy(x, weight, target, reduction=reduction, backend="native"),
        gptkernels.cross_entropy(x @ weight.T, target, reduction=reduction, backend="native"),
    ):
        first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()  # the first result is the caller's, to do with as he likes
        second = torch.autograd.grad(3 * loss, (x, weight))
        for a, b in zip(kept, second):
            torch.testing.assert_close(3 * a, b)


def test_a_target_that_is_no_class():
    for bad in (-1, 40):
        with pytest.raises(IndexError, match=f"target: got {bad}; accepted are 0 to 39 and ignore_index, -100"):
            gptkernels.cross_entropy(torch.randn(2, 40), torch.tensor([3, bad]), backend="native")


def test_mean_of_no_targets_is_nan_and_its_gradient_zero_or_nan_like_pytorchs():
    logits = torch.randn(3, 8, requires_grad=True)
    target = torch.full((3,), -100)
    ours = gptkernels.cross_entropy(logits, target, backend="native")
    plain = torch.nn.functional.cross_entropy(logits, target)
    assert ours.isnan()
    assert plain.isnan()


def test_available_and_reported():
    assert "native" in gptkernels.available_backends()
    assert all("native" in names for names in backend.FUSED.values())
    gptkernels.softmax(torch.zeros(1), backend="native")
    assert f"native kernels: {_native.loaded()}" in str(gptkernels.report())


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_activations_at_the_ends(approximate: str):
    """Where exponentials overflow or vanish; infinities and NaN as in PyTorch."""
    inf = float("inf")
    x = torch.tensor([-inf, -1e30, -1e4, -88.0, -20.0, -0.0, 20.0, 88.0, 1e4, 1e30, inf, float("nan")])
    functional = torch.nn.functional
    ours = gptkernels.gelu(x, approximate=approximate, backend="native")
    plain = functional.gelu(x, approximate=approximate)
    plain[10] = inf  # PyTorch's exact form gives NaN there on some CPUs
    torch.testing.assert_close(ours, plain, equal_nan=True)
    up = torch.ones_like(x)
    ours = gptkernels.swiglu(x, up, backend="native")
    torch.testing.assert_close(ours, functional.silu(x), rtol=1e-5, atol=1e-30, equal_nan=True)
    finite = x[2:9].clone().requires_grad_()
    for mine, plain in (
        (
            gptkernels.gelu(finite, approximate=approximate, backend="native"),
            functional.gelu(finite, approximate=approximate),
        ),
        (gptkernels.swiglu(finite, up[2:9], backend="native"), functional.silu(finite)),
    ):
        gradients = [torch.autograd.grad(out.sum(), finite)[0] for out in (mine, plain)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


ROWWISE = {
    "layer_norm": lambda x, w: gptkernels.layer_norm(x, w, w, backend="native"),
    "add_layer_norm": lambda x, w: gptkernels.add_layer_norm(x, 0.5 * x, w, w, backend="native"),
    "add_layer_norm, float32 stream": lambda x, w: gptkernels.add_layer_norm(x, x.float(), w, w, backend="native"),
    "add_rms_norm": lambda x, w: gptkernels.add_rms_norm(x, 0.5 * x, w, backend="native"),
    "softmax": lambda x, w: gptkernels.softmax(x, scale=0.5, backend="native"),
    "causal softmax": lambda x, w: gptkernels.softmax(x, causal=True, backend="native"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWWISE)
def test_results_written_past_the_caches_are_those_of_smaller_calls(name: str, dtype: torch.dtype):
    """More than 32 MiB, every result goes past the caches; slices of the same rows do not."""
    blocks = (36 << 20) // (512 * 1024 * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(blocks, 512, 1024, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(1024, generator=generator)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        with poisoned_memory():
            outs = outputs(ROWWISE[name](x, weight))
            return [*outs, torch.autograd.grad(outs, x, [out.detach() for out in outs])[0]]

    whole = run(x)
    for block in range(0, blocks, 5):
        for all_of_it, part in zip(whole, run(x[block : block + 1])):
            assert torch.equal(all_of_it[block : block + 1], part)
