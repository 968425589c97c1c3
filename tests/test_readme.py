"""README tells the truth: its Python runs, its commands are the demo's, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_runs(code: str):
    exec(compile(code, "README.md", "exec"), {})


def test_every_command_is_run_by_make_demo():
    commands = [line.split("#")[0].strip() for language, code in BLOCKS if not language for line in code.splitlines()]
    demo = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(commands) >= 6
    for command in commands:
        if command.startswith("make "):
            assert command.split()[1] in targets
        else:
            assert f".venv/bin/{command}\n" in demo


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "kernels/README.md"])
def test_links_lead_somewhere(file: str):
    path = ROOT / file
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("kind", ["cpu", "gpu", "gpt"])
def test_tables_are_made_from_saved_results(kind: str):
    """The table of a kind of machine is one of its saved results; there is none before there is a result."""
    import bench.cpu
    import bench.gpt
    import bench.gpu
    from bench.measure import results

    section = {"cpu": bench.cpu.section, "gpu": bench.gpu.section, "gpt": bench.gpt.section}[kind]
    saved = [section(result) for result in results(kind).values()]
    shown = re.findall(rf"<!-- {kind} -->\n(.*?)\n<!-- /{kind} -->", README, re.DOTALL)
    assert len(shown) == (1 if saved else 0)
    assert set(shown) <= set(saved)
