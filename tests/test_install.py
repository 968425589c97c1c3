"""What the two commands of README install and leave behind; `make check-install` asks the package index itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_dependency_has_one_version_for_each_python(python: str):
    pins = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert canonicalize_name(pin.name) not in pins
            (version,) = pin.specifier
            assert version.operator == "=="
            pins[canonicalize_name(pin.name)] = version.version
    wanted = [Requirement(text) for text in requires("gptcore") or []]
    wanted = [r for r in wanted if canonicalize_name(r.name) not in ("gptcore", "triton")]
    assert len(wanted) > 20
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_triton_is_the_one_that_pytorch_asks_for():
    """PyTorch's CUDA build requires one version exactly: a pin of ours beside it could not be installed."""
    assert "triton" not in {pin.name for pin in PINS}


def test_lint_does_not_depend_on_what_other_commands_left(tmp_path: Path):
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("gptcore", "bench", "runs/demo", "data/python-docs", "build", "dist"):  # make demo's, and a wheel's
        (tmp_path / folder).mkdir(parents=True)
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
