"""What launches pass to Triton's compiled kernels, recorded with a stand-in for a GPU; nothing is compiled or run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WATCHED = """
import contextlib, json, sys
from unittest import mock
import torch, triton
import triton.language as tl
from gptkernels import _triton
from triton.runtime import JITFunction
from bench.host import stand_in
from gptkernels._triton import Launch

ran, ordinary = [], []
plain = JITFunction.run

def watched(self, *args, **kwargs):
    ordinary.append(self.__name__)
    return plain(self, *args, **kwargs)

def run(x, y, z, stream, kernel, metadata, launch_metadata, enter, leave, *args):
    ran.append((kernel.name, (x, y, z), args, [at for (at,), found in kernel.src.attrs.items() if found]))
    for hook in (enter, leave):
        if hook is not None:
            hook(launch_metadata)

@contextlib.contextmanager
def watching():
    with mock.patch.object(JITFunction, "run", watched), mock.patch.object(_triton, "_run", watched), stand_in(run):
        yield
"""

SINGLE = """
@triton.jit
def _kernel(X, Y, N, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    pass

def launched(launch, *tensors):
    ran.clear(), ordinary.clear()
    launch(*tensors)
    name, grid, args, aligned = ran[-1]
    return {"grid": grid, "numbers": args[2:], "multiples of 16": aligned, "ordinary": len(ordinary), "times": len(ran)}

found = {}
with watching():
    x, y = torch.zeros(64), torch.zeros(65)
    launch = Launch(_kernel, (5, 2), (48, 0.5), FLAG=True, BLOCK=16, num_warps=2)
    found["first"], found["second"] = launched(launch, x, y), launched(launch, x, y)
    found["other memory"] = launched(launch, torch.zeros(64), y)
    found["unaligned"], found["unaligned again"] = launched(launch, x, y[1:]), launched(launch, x, y[1:])
    found["other dtype"], found["and again"] = launched(launch, x.half(), y), launched(launch, x.half(), y)
    found["no tensor"], found["the other none"] = launched(launch, x, None), launched(launch, None, x)
    found["other numbers"] = launched(Launch(_kernel, (5,), (49, 0.25), FLAG=False, BLOCK=16), x, y)
    with mock.patch.object(_triton, "_ROCM", True):
        small, large = torch.zeros(64), torch.empty(2**29)[:64]
        found["within 2 GiB"] = [launched(launch, small, y)["ordinary"] for _ in range(2)]
        found["of 2 GiB"] = [launched(launch, large, y)["ordinary"] for _ in range(2)]
    seen = []
    instrumented = lambda self, *args, **kwargs: seen.append(self.__name__) or plain(self, *args, **kwargs)
    with mock.patch.object(JITFunction, "run", instrumented):
        launch(x, y), launch(x, y)
    found["another run saw"], seen = seen, []
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    for hook in hooks:
        hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    found["hooked"] = launched(launch, x, y)
    found["hooks saw"] = seen
    for hook in hooks:
        hook.calls.clear()
with watching():  # another device
    found["other device"], found["once more"] = launched(launch, x, y), launched(launch, x, y)
with mock.patch.object(_triton, "_DIRECT", False), watching():
    launch = Launch(_kernel, (5, 2), (48, 0.5), FLAG=True, BLOCK=16)
    found["unknown release"] = [launched(launch, x, y)["ordinary"] for _ in range(2)]
print(json.dumps(found))
"""

# Each operation's launches over all its cases: with nothing worked out before, then twice with all that was.
EVERY = """
from gptkernels.testing import SPECS, outputs
from gptkernels.backend import FUSED

def forget():
    for name, module in list(sys.modules.items()):
        if name.startswith("gptkernels.") and name.endswith("triton"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear") and value is not _triton._properties:
                    value.cache_clear()

def shown(x):
    return (str(x.dtype), x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x

def launches(spec, case, dtype, fresh):
    if fresh:
        forget()
    ran.clear(), ordinary.clear()
    inputs = spec.make_inputs(case, dtype, torch.device("cpu"), 0)
    leaves = inputs.mapped(lambda t: t.detach().requires_grad_())
    outs = [out for out in outputs(spec.function(**leaves.tensors, **leaves.options, backend="triton")) if out.requires_grad]
    torch.autograd.grad(outs, list(leaves.differentiable().values()), [torch.ones_like(out) for out in outs], allow_unused=True)
    return [(name, grid, [shown(x) for x in args], aligned) for name, grid, args, aligned in ran]

found, again = {}, {}
torch.set_num_threads(1)
for spec in SPECS:
    if "triton" not in FUSED[spec.name]:
        continue
    cases = [(case, dtype) for case in spec.cases for dtype in (torch.bfloat16, torch.float32)]
    with watching():
        truth = [launches(spec, case, dtype, True) for case, dtype in cases]
        for turn in range(2):
            count = 0
            for (case, dtype), wanted in zip(cases, truth):
                if launches(spec, case, dtype, False) != wanted:
                    found.setdefault(spec.name, []).append(f"{case.name} {dtype}")
                count += len(ordinary)
    again[spec.name] = count, sum(map(len, truth))
print(json.dumps([found, again]))
"""


def _watched(script: str, folder: Path) -> Any:
    file = folder / "watched.py"
    file.write_text(WATCHED + script)  # Triton reads a kernel's source from its file
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One kernel, launched in several ways; ``ordinary`` counts Triton's own launches, ``times`` the kernel's runs."""
    return _watched(SINGLE, tmp_path_factory.mktemp("single"))


def test_the_first_launch_is_tritons_own_and_the_next_ones_are_the_same(single: Any):
    first = single["first"]
    assert (first["grid"], first["numbers"]) == ([5, 2, 1], [48, 0.5, True, 16])
    assert first["multiples of 16"] == [0, 1, 2]
    assert first["ordinary"] == first["times"] == 1
    for later in ("second", "other memory"):
        assert single[later] == first | {"ordinary": 0}


def test_an_address_that_is_no_multiple_of_16_finds_another_kernel(single: Any):
    unaligned = single["unaligned"]
    assert unaligned["multiples of 16"] == [0, 2]
    assert single["unaligned again"] == unaligned
    assert unaligned["ordinary"] == unaligned["times"] == 1


def test_other_dtypes_other_tensors_left_out_and_other_devices_find_other_kernels(single: Any):
    for name in ("other dtype", "no tensor", "the other none", "other device"):
        assert single[name]["ordinary"] == 1, name
    assert single["and again"]["ordinary"] == single["once more"]["ordinary"] == 0
    assert single["no tensor"]["multiples of 16"] == [0, 2]
    assert single["the other none"]["multiples of 16"] == [1, 2]


def test_on_amd_a_tensor_of_more_memory_than_32_bit_offsets_reach_finds_another_kernel(single: Any):
    assert single["within 2 GiB"] == single["of 2 GiB"] == [1, 0]


def test_other_numbers_are_handed_on_and_seen(single: Any):
    other = single["other numbers"]
    assert (other["grid"], other["numbers"]) == ([5, 1, 1], [49, 0.25, False, 16])
    assert other["multiples of 16"] == [0, 1]


def test_tools_see_every_launch(single: Any):
    assert single["hooked"]["ordinary"] == 0
    assert single["hooks saw"] == ["_kernel"] * 2
    assert single["another run saw"] == ["_kernel"] * 2


def test_an_unknown_release_of_triton_is_left_alone(single: Any):
    assert single["unknown release"] == [1, 1]


def test_what_was_worked_out_for_one_case_serves_no_other(tmp_path: Path):
    """Kernels, grids, numbers and constants of every operation's cases, forward and backward, in one process."""
    different, counts = _watched(EVERY, tmp_path)
    assert different == {}
    for name, (ordinary, launched) in counts.items():
        assert ordinary < launched / 4, f"{name}: {ordinary} of {launched} launches are Triton's own the second time"
