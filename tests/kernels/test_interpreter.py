"""The mended interpreter: bfloat16 behaves as on a GPU, and the mend is still needed."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

# Runs a bf16 dot and a float32 -> bf16 cast in the interpreter; prints the dot's worst error and the differing casts.
SCRIPT = """
import sys, torch, triton, triton.language as tl
if sys.argv[1] == "mended":
    from gptkernels import _triton
@triton.jit
def dot(A, B, C, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))
@triton.jit
def cast(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(tl.bfloat16))
torch.manual_seed(0)
a, b = torch.randn(2, 32, 32).bfloat16()
c = torch.empty(32, 32)
dot[(1,)](a, b, c, 32)
x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.4e38]), torch.randn(18) * 1e-38])
y = torch.empty(1024, dtype=torch.bfloat16)
cast[(1,)](x, y, 1024)
print((c - a.float() @ b.float()).abs().max().item(), (y != x.bfloat16()).sum().item())
"""


def _errors(tmp_path, kind: str) -> tuple[float, int]:
    script = tmp_path / "script.py"  # triton reads a kernel's source from its file
    script.write_text(SCRIPT)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    dot, cast = done.stdout.split()
    return float(dot), int(cast)


def test_bfloat16_is_right(tmp_path):
    dot, cast = _errors(tmp_path, "mended")
    assert dot < 1e-5
    assert cast == 0


def test_the_mend_is_still_needed(tmp_path):
    """When this fails, Triton's interpreter computes bfloat16 itself: delete `gptkernels/_interpreter.py`."""
    dot, cast = _errors(tmp_path, "plain")
    assert dot > 1.0
    assert cast > 0


def test_nan_survives_the_cast():
    from gptkernels._interpreter import _float32_to_bf16

    bits = _float32_to_bf16(torch.tensor([float("nan"), -float("nan"), 1.0]).numpy())
    assert torch.from_numpy(bits.view("int16")).view(torch.bfloat16).isnan().tolist() == [True, True, False]
