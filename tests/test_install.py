"""What the two commands of README install and leave behind; `make check-install` asks the package index itself.

And what runs where less is installed: on rented GPU machines, whose images hold PyTorch and little else.
"""

from __future__ import annotations

import os
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


# Behaves as if it were not installed: neither imported nor found.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

found = PathFinder.find_spec
missing = sys.argv.pop(1).split(",")
PathFinder.find_spec = classmethod(lambda _, name, *rest: None if name.partition(".")[0] in missing else found(name, *rest))
"""
NOT_ON_GPU_MACHINES = "tyro,platformdirs,rustbpe,gguf,datasets,sklearn,peft,lm_eval"


def run_without(packages: str, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where `packages` are not installed."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"} | environment
    command = [sys.executable, "-c", WITHOUT + code, packages, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_test_file_is_collected_without_the_packages_that_gpu_machines_lack():
    """A GPU is rented by the minute: `pytest -m gpu` must not stop there at an import that its tests do not need."""
    code = "import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    options = ("--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:platformdirs")  # the latter brings a plugin
    done = run_without(NOT_ON_GPU_MACHINES, code, *options, "-m", "gpu or not gpu", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    files = (ROOT / "tests").rglob("test_*.py")
    assert {file.relative_to(ROOT).as_posix() for file in files} == collected


def test_a_model_runs_without_the_packages_that_gpu_machines_lack():
    code = """
import gptcore, torch
from bench.measure import versions
model = gptcore.GPT(gptcore.GPTConfig.preset("tiny", vocab_size=61, kernels="reference"))
model.loss(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
print(model.generate(torch.zeros(1, 4, dtype=torch.long), 3).shape[1], versions()["commit"])
"""
    done = run_without(NOT_ON_GPU_MACHINES, code, PATH="")  # no git either
    assert done.stdout == "7 unknown\n", done.stderr
