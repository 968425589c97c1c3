"""Decides once, before triton is imported, where kernels run: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# The same problems on every run, as CI draws them: a failure is a change's, not a day's.
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")
if torch.cuda.is_available():
    # What cuBLAS asks for when results are to be the same on every run, as the tests of errors have it; else it warns.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"
# Several workers (pytest -n) share the cores: with a thread of each for every core they would mostly wait for one another.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not item.keywords: they hold the names of folders, too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels under test run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _restore_backend_choice():
    """No test's `use_backend` reaches the next test."""
    from gptkernels import use_backend

    with use_backend("auto"):
        yield
