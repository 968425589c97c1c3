"""Chooses where Triton kernels run, before triton is imported: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Hypothesis draws the same examples on every run, so that a failure comes from a change and not from chance.
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")
if torch.cuda.is_available():
    # cuBLAS needs this to give the same results on every run, which the tests of error budgets ask for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"
# Workers (pytest -n) share the cores. If each had as many threads as there are cores, they would mostly wait.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))


# Their compilers take minutes where nothing is cached. They come first: at the end no worker waits for another one's.
LONGEST = "test_compile.py", "test_native.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)  # keeps the order otherwise
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # item.keywords would match folders named gpu too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    """The device that the kernels under test run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _restore_backend_choice():
    """A `use_backend` in one test does not affect the next."""
    from gptkernels import use_backend

    with use_backend("auto"):
        yield
