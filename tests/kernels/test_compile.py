"""Machine code for an H100, made without one: the shipped configurations spill nothing and use wgmma where meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 232448  # bytes a program may use on sm_90


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every kernel that the bench cases launch, compiled for sm_90 in a process where Triton does not interpret."""
    file = tmp_path_factory.mktemp("compiled") / "report.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "gptkernels.compile_report", "--target", "sm_90", "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # registers, spills and shared memory of each kernel: pytest -s, or on failure
    return json.loads(Path(file).read_text())


def test_every_kernel_is_compiled(compiled: list[dict]):
    kernels = Path(__file__).parents[2] / "kernels" / "gptkernels"
    defined = {
        (file.parent.name, line.split("(")[0].removeprefix("def "))
        for file in kernels.glob("*/triton.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert len(defined) >= 10
    assert defined == {(row["case"].split()[0], row["kernel"]) for row in compiled}


def test_nothing_spills(compiled: list[dict]):
    assert [row for row in compiled if row["spills"]] == []


def test_shared_memory_fits(compiled: list[dict]):
    assert max(row["shared_bytes"] for row in compiled) <= SHARED_MEMORY


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_dkdv_kernel", "_dq_kernel"])
def test_attention_uses_wgmma(compiled: list[dict], kernel: str, head_dim: int):
    rows = [
        row
        for row in compiled
        if row["kernel"] == kernel and f"-D{head_dim}-" in row["case"] and row["case"].endswith("bf16")
    ]
    assert rows
    assert all(row["wgmma"] > 0 and row["mma"] == 0 for row in rows)


def test_refuses_what_it_cannot_do():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "gptkernels.compile_report", "--op", "attention"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "unset it, interpreted kernels have no machine code" in done.stderr
