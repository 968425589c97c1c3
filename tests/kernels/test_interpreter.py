"""The fixed interpreter computes bfloat16 as a GPU does, and the fix is still needed."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gptkernels import _triton  # noqa: F401 (mends the interpreter)

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


def test_the_fix_is_still_needed(tmp_path):
    """When this fails, Triton's interpreter computes bfloat16 itself: delete `gptkernels/_interpreter.py`."""
    dot, cast = _errors(tmp_path, "plain")
    assert dot > 1.0
    assert cast > 0


def test_nan_survives_the_cast():
    from gptkernels._interpreter import _float32_to_bf16

    bits = _float32_to_bf16(torch.tensor([float("nan"), -float("nan"), 1.0]).numpy())
    assert torch.from_numpy(bits.view("int16")).view(torch.bfloat16).isnan().tolist() == [True, True, False]


# Functions of Triton that kernels use, compared with NumPy and PyTorch. On a machine with a GPU these tests run on it.


@triton.jit
def _philox_kernel(SEEDS, COUNTERS, OUT, N: tl.constexpr, ROUNDS: tl.constexpr):
    i = tl.arange(0, N)
    seed = tl.load(SEEDS + tl.program_id(0))
    c0 = tl.load(COUNTERS + 4 * i)
    c1 = tl.load(COUNTERS + 4 * i + 1)
    c2 = tl.load(COUNTERS + 4 * i + 2)
    c3 = tl.load(COUNTERS + 4 * i + 3)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c3, ROUNDS)
    out = OUT + (tl.program_id(0) * N + i) * 4
    tl.store(out, r0.to(tl.int32, bitcast=True))
    tl.store(out + 1, r1.to(tl.int32, bitcast=True))
    tl.store(out + 2, r2.to(tl.int32, bitcast=True))
    tl.store(out + 3, r3.to(tl.int32, bitcast=True))


def philox4x32(counters: np.ndarray, seed: int, rounds: int) -> np.ndarray:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): counters (N, 4), the key is the 64-bit seed."""
    c = [counters[:, k].astype(np.uint64) for k in range(4)]
    low32 = np.uint64(0xFFFFFFFF)
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(rounds):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        keys = [np.uint64(k) for k in key]
        c = [(b >> np.uint64(32)) ^ c[1] ^ keys[0], b & low32, (a >> np.uint64(32)) ^ c[3] ^ keys[1], a & low32]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1).astype(np.uint32)


def test_philox_is_the_published_one():
    """`philox4x32`, which the next test compares Triton's with, gives the known answers that Random123 ships."""
    zeros = np.zeros((1, 4), dtype=np.uint32)
    assert [hex(x) for x in philox4x32(zeros, 0, 10)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(x) for x in philox4x32(zeros, 0, 7)[0]] == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]


@pytest.mark.parametrize("rounds", [7, 10])
def test_philox(rounds: int, device: str):
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (64, 4), dtype=np.uint64).astype(np.uint32)
    counters[:3] = [[0, 0, 0, 0], [2**32 - 1] * 4, [2**31, 1, 2**31 - 1, 2**16]]
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x299F31D0A4093822], device=device)
    out = torch.empty(len(seeds), 64, 4, dtype=torch.int32, device=device)
    on_device = torch.from_numpy(counters.view(np.int32)).to(device)
    _philox_kernel[(len(seeds),)](seeds, on_device, out, 64, rounds)
    for row, seed in zip(out.cpu().numpy().view(np.uint32), seeds.tolist()):
        assert (row == philox4x32(counters, seed, rounds)).all(), seed


@triton.jit
def _arithmetic_kernel(X, Y, OUT, COMPARED, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    y = tl.load(Y + i)
    tl.store(OUT + i, x + y)
    tl.store(OUT + N + i, x - y)
    tl.store(OUT + 2 * N + i, x * y)
    tl.store(OUT + 3 * N + i, -x)
    tl.store(OUT + 4 * N + i, tl.abs(x))
    tl.store(OUT + 5 * N + i, tl.maximum(x, y))
    tl.store(OUT + 6 * N + i, tl.minimum(x, y))
    tl.store(OUT + 7 * N + i, tl.where(x > y, x, 0.0))
    tl.store(COMPARED + i, (x > y).to(tl.int32))
    tl.store(COMPARED + N + i, (x == y).to(tl.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic(dtype: torch.dtype, device: str):
    """Every result is rounded correctly to the operands' dtype, as PyTorch's is."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 256).to(device, dtype)
    y[:9] = x[:9]
    out = torch.empty(8, 256, dtype=dtype, device=device)
    compared = torch.empty(2, 256, dtype=torch.int32, device=device)
    _arithmetic_kernel[(1,)](x, y, out, compared, 256)
    expected = [x + y, x - y, x * y, -x, x.abs(), x.maximum(y), x.minimum(y), torch.where(x > y, x, 0.0)]
    for k, theirs in enumerate(expected):
        assert torch.equal(out[k], theirs), k
    assert torch.equal(compared, torch.stack([x > y, x == y]).int())


@triton.jit
def _reductions_kernel(X, MAX, MIN, SUM, ARGMAX, CUMSUM, POSITIVE, M: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, M)
    at = row[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(X + at)
    tl.store(MAX + row, tl.max(x, axis=1))
    tl.store(MIN + row, tl.min(x, axis=1))
    tl.store(SUM + row, tl.sum(x, axis=1))
    tl.store(ARGMAX + row, tl.argmax(x, axis=1))
    tl.store(CUMSUM + at, tl.cumsum(x, axis=1))
    tl.store(POSITIVE + row, tl.sum(x > 0, axis=1))
    tl.store(POSITIVE + M, tl.sum((x > 0).to(tl.int32)))
    tl.store(MAX + M, tl.max(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reductions(dtype: torch.dtype, device: str):
    torch.manual_seed(1)
    x = torch.randn(8, 64).to(device, dtype)
    x[1] = -x[1].abs() - 1.0  # as bit patterns, negative numbers are the largest, and in the wrong order
    largest, smallest = torch.empty(9, dtype=dtype, device=device), torch.empty(8, dtype=dtype, device=device)
    total, running = torch.empty(8, dtype=dtype, device=device), torch.empty(8, 64, dtype=dtype, device=device)
    where, positive = (torch.empty(9, dtype=torch.int32, device=device) for _ in range(2))
    _reductions_kernel[(1,)](x, largest, smallest, total, where, running, positive, 8, 64)
    assert torch.equal(largest, torch.cat([x.amax(1), x.max()[None]]))
    assert torch.equal(smallest, x.amin(1))
    assert torch.equal(x.float().gather(1, where[:8, None].long())[:, 0], x.float().amax(1))  # of equals, any
    assert torch.equal(positive, torch.cat([(x > 0).sum(1), (x > 0).sum()[None]]).int())
    # Each partial sum may be rounded, in some order.
    exact, size = x.double().cumsum(1), x.double().abs().cumsum(1)
    eps = torch.finfo(dtype).eps
    assert bool(((running.double() - exact).abs() <= 64 * eps / 2 * size).all())
    assert bool(((total.double() - exact[:, -1]).abs() <= 6 * eps * size[:, -1]).all())


def test_sums_of_bfloat16_are_rounded_as_they_grow(device: str):
    """`tl.sum` of bfloat16 accumulates in bfloat16, and so loses 2**-9 beside 1; kernels widen to float32 first."""
    x = torch.full((8, 64), 2.0**-9, device=device, dtype=torch.bfloat16)
    x[:, 32:] = 1.0
    outs = [torch.empty(9, dtype=x.dtype, device=device) for _ in range(3)]
    where, positive = (torch.empty(9, dtype=torch.int32, device=device) for _ in range(2))
    _reductions_kernel[(1,)](x, *outs, where, torch.empty_like(x), positive, 8, 64)
    assert (outs[2][:8] == 32.0).all()


@triton.jit
def _pairs_kernel(X, OUT, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.split(tl.reshape(tl.load(X + at), (M, N // 2, 2)))
    tl.store(OUT + at, tl.reshape(tl.join(b, a), (M, N)))
    tl.store(OUT + M * N + at, tl.interleave(a, b))
    wide = tl.arange(0, M)[:, None] + tl.arange(0, N)[None, :] * M
    tl.store(OUT + 2 * M * N + tl.trans(wide), tl.trans(tl.load(X + at)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pairs(dtype: torch.dtype, device: str):
    """join, split, interleave, reshape and trans, as rotary embeddings use them."""
    torch.manual_seed(2)
    x = torch.randn(8, 32).to(device, dtype)
    out = torch.empty(3, 8, 32, dtype=dtype, device=device)
    _pairs_kernel[(1,)](x, out, 8, 32)
    assert torch.equal(out[0], x.unflatten(1, (16, 2)).flip(2).flatten(1))
    assert torch.equal(out[1], x)
    assert torch.equal(out[2].view(32, 8).T, x)


@triton.jit
def _exponentials_kernel(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(OUT + i, tl.exp2(x))
    tl.store(OUT + N + i, tl.log2(tl.exp2(x)))
    tl.store(OUT + 2 * N + i, tl.rsqrt(tl.exp2(x)))
    tl.store(OUT + 3 * N + i, tl.sigmoid(x))
    tl.store(OUT + 4 * N + i, tl.erf(x))


def test_exponentials(device: str):
    """Within two roundings of 2**-22, what NVIDIA's manual of PTX states for ex2.approx, lg2.approx and rsqrt.approx."""
    x = torch.linspace(-60.0, 60.0, 1024, device=device)
    x[0], x[1] = float("-inf"), float("inf")
    out = torch.empty(5, 1024, device=device)
    _exponentials_kernel[(1,)](x, out, 1024)
    wide = x.double()
    power = torch.exp2(wide)
    for k, exact in enumerate([power, wide, power.rsqrt(), wide.sigmoid(), wide.erf()]):
        finite = exact.isfinite()
        error = (out[k].double() - exact)[finite].abs()
        assert bool((error <= 2 * 2.0**-22 * exact[finite].abs()).all()), (k, error.max())
        assert torch.equal(out[k].double()[~finite], exact[~finite]), k
