"""Rules of the project's structure that no other test would notice being broken."""

from __future__ import annotations

import ast
from pathlib import Path

import gptkernels
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for top in ("kernels", "gptcore", "bench") for p in (ROOT / top).rglob("*.py"))
OPS = sorted(p.parent for p in (ROOT / "kernels/gptkernels").glob("*/api.py"))


def imports(file: Path, typing: bool = True) -> dict[str, bool]:
    """Module that `file` imports -> whether it does so at its top level. `typing=False` leaves out TYPE_CHECKING imports."""
    tree = ast.parse(file.read_text())
    if not typing:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    top = {id(node) for node in tree.body}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            found[name] = found.get(name, False) or id(node) in top
    return found


# Package of gptcore -> the packages that it may import. Each may import only packages above it, so there is no circle.
ARROWS = {
    "_extras": set(),
    "_files": set(),
    "nn": set(),
    "assets": {"_files"},
    "weights": {"_extras", "_files", "nn", "assets"},
    "text": {"_extras", "_files", "assets", "weights"},
    "data": {"_extras", "_files", "assets", "text"},
    "generate": {"nn", "text"},
    "models": {"nn", "weights", "generate"},
    "tasks": {"_files", "nn", "assets", "text", "data", "generate", "models"},
    "train": {"_extras", "_files", "nn", "text", "weights", "models", "tasks"},
    "evaluate": {"_extras", "_files", "nn", "assets", "weights", "text", "data", "generate", "models", "tasks"},
}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_one_way(package: str):
    """Imports inside functions count; imports for type checking do not."""
    found = set()
    place = ROOT / "gptcore" / package
    for file in [place.with_suffix(".py")] if place.with_suffix(".py").exists() else sorted(place.rglob("*.py")):
        for name in imports(file, typing=False):
            parts = name.split(".")
            if parts[0] == "gptcore" and len(parts) > 1 and parts[1] != package:
                found.add(parts[1])
    earlier = set(list(ARROWS)[: list(ARROWS).index(package)])
    assert found <= ARROWS[package] <= earlier


def test_kernels_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "Hugging Face owns the import name `kernels`"


@pytest.mark.parametrize("folder", OPS, ids=lambda p: p.name)
def test_an_op_is_one_folder_with_the_same_files(folder: Path):
    found = {p.name for p in folder.iterdir()}
    assert {"__init__.py", "api.py", "reference.py", "native.cpp", "spec.py", "MATH.md"} <= found


@pytest.mark.parametrize("folder", OPS, ids=lambda p: p.name)
def test_an_op_imports_no_other_op(folder: Path):
    """What two of them share stands below both."""
    others = {p.name for p in OPS} - {folder.name}
    found = {name for file in folder.glob("*.py") for name in imports(file) if name.startswith("gptkernels.")}
    assert {name for name in found if name.split(".")[1] in others} == set()


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(file: Path):
    found = imports(file)
    place = file.relative_to(ROOT).as_posix()
    may_import_triton = {"_triton.py", "_interpreter.py", "_sass.py", "compile_report.py"}
    if place.startswith("kernels/"):
        assert not any(name.split(".")[0] in ("gptcore", "bench") for name in found), "kernels knows nothing of gptcore"
        if file.name not in may_import_triton and not file.name.startswith("triton"):
            assert not any(name.split(".")[0] == "triton" for name in found)
        integration = place.partition("gptkernels/integrations/")[2].split("/")[0]  # "transformers", or ""
        assert not {name.split(".")[0] for name in found} & {"transformers"} - {integration}, "its integration alone"
        others = {name for name in found if name.startswith("gptkernels.integrations")}
        own = f"gptkernels.integrations.{integration or '-'}"
        assert all(name.startswith(own) for name in others), "imported by users alone"
    if place.startswith("gptcore/"):
        assert not any(name.split(".")[0] == "triton" for name in found), "models never import triton"
        private = {name for name in found if name.startswith("gptkernels.")}
        assert all(not part.startswith("_") for name in private for part in name.split("."))
        allowed = ("gptkernels.nn", "gptkernels.integrations", *(f"gptkernels.{n}" for n in gptkernels.__all__))
        assert all(name.startswith(allowed) for name in private), f"public names only: {private}"
        heavy = {"tyro", "matplotlib", "rustbpe", "transformers", "tiktoken", "rich", "huggingface_hub"}
        lazy = place.startswith("gptcore/cli/")  # imported by the command alone, made of tyro
        assert lazy or not {n for n, at_top in found.items() if at_top and n.split(".")[0] in heavy}, (
            "import where used"
        )


@pytest.mark.parametrize("folder", OPS, ids=lambda p: p.name)
def test_backends_never_import_one_another(folder: Path):
    backends = (("triton.py", ("reference", "native")), ("reference.py", ("triton", "native")))
    for file, others in [(file, others) for file, others in backends if (folder / file).exists()]:
        found = imports(folder / file)
        assert not any(name.split(".")[-1] in others and name.startswith("gptkernels") for name in found)


def test_no_file_is_longer_than_500_lines():
    native = [*(ROOT / "kernels").rglob("*.cpp"), *(ROOT / "kernels").rglob("*.h")]
    files = [*SOURCES, *native, *(ROOT / "tests").rglob("*.py")]
    assert {str(path): lines for path in files if (lines := len(path.read_text().splitlines())) > 500} == {}
