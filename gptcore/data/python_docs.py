"""The built-in corpus ``python-docs``: the documentation that comes with Python, about 2 MB."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

PYTHON_DOCS = "python-docs"
"""The name of the corpus. A file or folder of that name is reached as ``./python-docs``."""

_MIN_DOCSTRING = 80
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
"""Folders of the standard library that hold no documentation."""


def python_texts() -> Iterator[tuple[str, str]]:
    """Yield ``(name, text)``: the docstrings of each module, then the articles that ``help()`` shows, each sorted by name.

    Modules are parsed and not imported. Tests and docstrings of at most 80 characters are left out.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    modules = (path.relative_to(root) for path in root.rglob("*.py"))
    for module in sorted(path.as_posix() for path in modules if not _LEFT_OUT & set(path.parts[:-1])):
        text = docstrings((root / module).read_bytes())
        if text:
            yield f"{PYTHON_DOCS}:{module}", text
    for topic, article in sorted(topics.items()):
        yield f"{PYTHON_DOCS}:topics/{topic}", article.strip() + "\n"


def docstrings(source: bytes) -> str:
    """The docstrings of a module and of its classes and functions, in the order of the source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold escapes that today's compiler warns of
        tree = ast.parse(source)
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    found = []
    for node in ast.walk(tree):
        if isinstance(node, documented):
            text = ast.get_docstring(node)  # cleaned by inspect.cleandoc
            if text is not None and len(text) > _MIN_DOCSTRING:
                found.append((getattr(node, "lineno", 0), text.strip() + "\n"))
    return "\n".join(text for _, text in sorted(found))
