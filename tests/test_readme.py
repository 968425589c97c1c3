"""README and docs are right: their Python runs, `make demo` runs their commands, their links and figures exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (file.name, language, code)
    for file in PAGES
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", file.read_text(), re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize(("file", "code"), [(file, code) for file, language, code in BLOCKS if language == "python"])
def test_python_runs(file: str, code: str):
    exec(compile(code, file, "exec"), {})


def test_readme_is_short():
    assert len(README.split()) <= 600


def test_every_command_is_run_by_make():
    """By `make demo`, or for the walkthrough by `make from-scratch`, which begins with the demo."""
    commands = [
        (file, line.split("  #")[0].strip())
        for file, language, code in BLOCKS
        if not language
        for line in code.splitlines()
    ]
    run = {
        target: subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("demo", "from-scratch")
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(commands) >= 6
    for file, command in commands:
        made = run["from-scratch" if file == "from-scratch.md" else "demo"]
        if command.startswith("make "):
            assert command.split()[1] in targets
        elif command.startswith("python -m bench."):  # other tests run these
            assert (ROOT / f"{command.split()[2].replace('.', '/')}.py").exists()
        elif not command.startswith("pip install "):
            installed = re.sub(r"(^|\| )(gptcore|python)\b", r"\1.venv/bin/\2", command)
            assert f"{installed}\n" in made, command


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "kernels/README.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("kind", ["cpu", "gpu", "gpt"])
def test_tables_are_made_from_saved_results(kind: str):
    """docs/benchmarks.md has a table for each kind of machine with saved results, made from one of them."""
    import bench.cpu
    import bench.gpt
    import bench.gpu
    from bench.measure import results

    section = {"cpu": bench.cpu.section, "gpu": bench.gpu.section, "gpt": bench.gpt.section}[kind]
    saved = [section(result) for result in results(kind).values()]
    page = (ROOT / "docs/benchmarks.md").read_text()
    shown = re.findall(rf"<!-- {kind} -->\n(.*?)\n<!-- /{kind} -->", page, re.DOTALL)
    assert len(shown) == (1 if saved else 0)
    assert set(shown) <= set(saved)


def test_the_picture_is_made_from_a_saved_result(tmp_path: Path):
    from bench.measure import RESULTS
    from bench.picture import PICTURE, draw, lines, times

    saved = json.loads((RESULTS / "amd-epyc-avx512_bf16.json").read_text())
    draw(saved, tmp_path / "again.svg")
    for drawn in (PICTURE.read_text(), (tmp_path / "again.svg").read_text()):
        for name, (theirs, ours) in times(saved).items():
            assert f">{lines(name)[0]}<" in drawn
            assert f">{theirs / ours:.2f}x<" in drawn
