"""Machine code for GPUs, compiled without them: shipped configurations do not spill, fit, and use the matrix units.

`make compile-report TARGET=all` is the whole. Here are the main configurations of an H100 and of an MI300X, which another
compiler makes, and for the other generations of NVIDIA's cards those of attention, which has tiles for each.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gptkernels import compile_report
from gptkernels.backend import FUSED
from gptkernels.compile_report import Compiled

# Bytes of shared memory that a program may use, and the instruction that multiplies 16-bit tiles of 64 rows and more.
TARGETS = {
    "sm_80": (166912, "mma"),
    "sm_89": (101376, "mma"),
    "sm_90": (232448, "wgmma"),
    "sm_100": (232448, "tcgen05"),
    "gfx942": (65536, "mfma"),
}
ATTENTION = [word for op in FUSED if op.startswith("attention") for word in ("--op", op)]
SELECTIONS = (
    ["--target", "sm_90", "--main", "--dtype", "bf16", "--dtype", "fp32"],
    ["--target", "gfx942", "--main", "--dtype", "bf16"],
    ["--target", "sm_80", "--target", "sm_89", "--target", "sm_100", "--main", "--dtype", "bf16", *ATTENTION],
)
Row = dict


def _python(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": interpret}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def _compiled(file: Path) -> list[Row]:
    rows: list[Row] = []
    for selection in SELECTIONS:
        done = _python("-m", "gptkernels.compile_report", *selection, "--json", str(file))
        assert file.exists(), done.stderr
        print(done.stderr, done.stdout)  # registers, spills and shared memory of each kernel: pytest -s, or on failure
        found = json.loads(file.read_text())
        assert done.returncode == any(row["faults"] for row in found)
        rows += found
        file.unlink()
    return rows


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, list[Row]]:
    """Each target's kernels, compiled by the first of several workers, in a process where Triton does not interpret."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    report = folder / "compiled.json"
    with (folder / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            report.write_text(json.dumps(_compiled(folder / "report.json")))
    rows = json.loads(report.read_text())
    return {target: [row for row in rows if row["target"] == target] for target in TARGETS}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_is_compiled(compiled: dict[str, list[Row]], target: str):
    kernels = Path(__file__).parents[2] / "kernels" / "gptkernels"
    defined = {
        (file.parent.name, kernel)
        for file in kernels.rglob("*.py")
        for kernel in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert len(defined) >= 10
    assert defined == {(row["folder"], row["kernel"]) for row in compiled[target]}


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations_fit(compiled: dict[str, list[Row]], target: str):
    shared, _ = TARGETS[target]
    assert [row for row in compiled[target] if row["faults"] or row["spills"] or row["error"]] == []
    assert max(row["shared_bytes"] for row in compiled[target]) <= shared
    assert min(row["registers"] for row in compiled[target]) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_products_use_the_matrix_units(compiled: dict[str, list[Row]], target: str):
    multiplying = [row for row in compiled[target] if row["dots"]]
    for kernel in ("_forward_kernel", "_dkdv_kernel", "_dq_kernel"):
        for head_dim in (64, 128):
            assert any(row["kernel"] == kernel and f"-D{head_dim}-" in row["case"] for row in multiplying)
    assert all(row["matrix"] for row in multiplying)
    # Tiles of fewer rows (a few queries at a time, while decoding) are too small for a warp group.
    large = [row for row in multiplying if row["dot_rows"] >= 64]
    assert large
    assert [row for row in large if set(row["matrix"]) != {TARGETS[target][1]}] == []


def test_two_programs_share_an_h100s_multiprocessor(compiled: dict[str, list[Row]]):
    """Plain 16-bit attention with a head_dim of 64 runs two: while one waits for its products, the other computes."""
    for kernel in ("_forward_kernel", "_dq_kernel"):
        rows = [row for row in compiled["sm_90"] if row["kernel"] == kernel and row["dtype"] == "bf16"]
        rows = [row for row in rows if row["op"] == "attention" and "-D64-" in row["case"]]
        assert rows
        assert [row for row in rows if row["blocks"] < 2] == []


def _attention_forward(tile: str, case: str) -> list[str]:
    """Attention's forward on an H100 in a given tile: spills, shared memory, blocks, faults."""
    script = f"""
from gptkernels import compile_report
from gptkernels.attention import tiles, triton
triton.tile = lambda *args: tiles.Tile({tile})
found = compile_report.launches(["sm_90"], ["attention"], ["bf16"], main=True)
wanted = [l for l in found if l.source.fn.__name__ == "_forward_kernel" and "{case}" in l.case]
for result in compile_report.compile_launches(wanted[:1]):
    print(result.spills, result.shared_bytes, result.blocks, *result.faults(), sep=";")
"""
    done = _python("-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split(";")


def test_a_kernel_that_does_not_fit_is_found():
    """A tile that 4 warps cannot hold in registers, with too many loads in flight."""
    spills, shared, _, *faults = _attention_forward("128, 64, 4, 9", "-D128-")
    assert int(spills) > 0
    assert int(shared) > TARGETS["sm_90"][0]
    assert faults == [f"{spills} spills", "more than 232448 bytes of shared memory"]


def test_serialised_wgmma_is_found():
    """With fewer registers than the products of a tile need to overlap; and three programs where registers would do for four."""
    spills, _, blocks, *faults = _attention_forward("128, 64, 8, 3, 64", "-D64-")
    assert blocks == "3"
    assert faults == [
        f"{spills} spills",
        "wgmma serialised",
        "3 of the 4 blocks a multiprocessor that maxnreg=64 is for",
    ]


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared_bytes", "blocks"),
    [
        ("sm_90", 8, 128, 0, 2),  # registers
        ("sm_90", 8, 129, 0, 1),
        ("sm_90", 4, 168, 0, 3),
        ("sm_90", 4, 169, 0, 2),
        ("sm_90", 8, 96, 113 * 1024, 2),  # shared memory: half of 228 KiB, less 1
        ("sm_90", 8, 96, 113 * 1024 + 1, 1),
        ("sm_90", 8, 96, 232448, 1),
        ("sm_90", 8, 96, 232449, 0),
        ("sm_90", 16, 32, 0, 4),  # threads
        ("sm_89", 16, 32, 0, 3),
        ("sm_90", 1, 16, 0, 32),  # programs
        ("sm_89", 1, 16, 0, 24),
    ],
)
def test_blocks_of_a_multiprocessor(target: str, num_warps: int, registers: int, shared_bytes: int, blocks: int):
    assert compile_report.TARGETS[target].blocks(num_warps, registers, shared_bytes) == blocks


def test_faults():
    def faults(**figures: object) -> list[str]:
        known = {
            "op": "softmax",
            "folder": "softmax",
            "case": "1x1",
            "dtype": "bf16",
            "kernel": "_k",
            "target": "gfx942",
        }
        return Compiled(**(known | {"num_warps": 4, "registers": 40} | figures)).faults()  # type: ignore[arg-type]

    assert faults() == []
    assert faults(spills=3) == ["3 spills"]
    assert faults(shared_bytes=65536) == []
    assert faults(shared_bytes=65537) == ["more than 65536 bytes of shared memory"]
    assert faults(shared_bytes=65537, target="sm_90") == []
    assert faults(num_warps=16) == []
    assert faults(num_warps=32) == ["2048 threads, more than 1024"]
    assert faults(num_warps=32, target="sm_90") == []
    assert faults(dots=2) == ["16-bit products without matrix instructions"]
    assert faults(dots=2, matrix={"mfma": 1}) == []
    assert faults(wgmma_serialised=True) == ["wgmma serialised"]
    assert faults(maxnreg=128, blocks=2, num_warps=8, target="sm_90") == []
    assert faults(maxnreg=128, blocks=1, num_warps=8, target="sm_90") == [
        "1 of the 2 blocks a multiprocessor that maxnreg=128 is for"
    ]
    assert faults(error="OutOfResources: tensor memory") == ["OutOfResources: tensor memory"]


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        ([], "1", "unset it, interpreted kernels have no machine code"),
        (["--target", "sm_70"], "0", "invalid choice: 'sm_70'"),
        (["--op", "convolution"], "0", "ops: got ['convolution']; accepted are layer_norm"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: list[str], interpret: str, message: str):
    done = _python("-m", "gptkernels.compile_report", *arguments, interpret=interpret)
    assert done.returncode != 0
    assert message in done.stderr
