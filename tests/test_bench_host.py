"""bench.host calls every Triton-backed operation without a GPU, and refuses what it cannot do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS

from bench.host import CASES


def _bench_host(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "bench.host", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_triton_op_has_a_case_to_call():
    assert set(CASES) == {op for op, backends in FUSED.items() if "triton" in backends}
    for spec in SPECS:
        assert set(CASES.get(spec.name, ())) <= {case.name for case in spec.cases}


def test_every_op_is_timed_shown_and_saved(tmp_path: Path):
    done = _bench_host("--rounds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("host-*.json")
    saved = json.loads(file.read_text())
    assert saved["kind"] == "host"
    assert list(saved["rows"]) == [f"{op} {case}" for op, cases in CASES.items() for case in cases]
    for row in saved["rows"].values():
        assert set(row) == {"forward", "recorded", "backward"}
        assert min(row.values()) > 0
    assert len(re.findall(r"^\| \w+ \S+ \|( [\d.]+ \|){3}$", done.stdout, re.MULTILINE)) == len(saved["rows"])


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (["linear"], "0", "ops: got linear; accepted are attention"),
        (["--rounds", "0"], "0", "--rounds: got 0; accepted are 1 and more"),
        ([], "1", "TRITON_INTERPRET is 1: unset it"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: list[str], interpret: str, message: str):
    done = _bench_host(*arguments, interpret=interpret)
    assert done.returncode == 2
    assert message in done.stderr
