"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gptcore.runs import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def no_peak(monkeypatch) -> None:
    """The measurement of the machine's peak takes most of a small run."""
    monkeypatch.setattr("gptcore.train.loop.peak_flops", lambda *_: (1e12, "not measured"))
