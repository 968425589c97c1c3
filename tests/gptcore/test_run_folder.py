"""A run's folder is one process's at a time: whose it is, and that nothing left behind blocks the next."""

from __future__ import annotations

import os
import platform
import signal
from pathlib import Path

import pytest

from gptcore.train import find_lr, train
from gptcore.train.parallel import ALONE
from gptcore.train.run_folder import locked_folder
from tests.gptcore.runs import config, contents

pytestmark = pytest.mark.usefixtures("no_peak")


def test_a_folder_in_use_is_refused_with_its_holder(corpus: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(config(corpus, out, steps=4), progress=False)
    kept = contents(out)
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    holder = rf"out: {out} is in use by process {os.getpid()} on {platform.node()} {since}; accepted is a folder"
    with locked_folder(out, ALONE):
        for changes in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(BlockingIOError, match=holder):
                train(config(corpus, out, **changes), progress=False)
        with pytest.raises(BlockingIOError, match=holder):
            find_lr(config(corpus, out), progress=False)
    assert contents(out) == kept
    assert train(config(corpus, out, resume="auto"), progress=False).steps == 8


def test_a_killed_process_leaves_nothing_that_blocks(corpus: Path, tmp_path: Path):
    out = tmp_path / "deep" / "run"
    inside, outside = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked_folder(out, ALONE):
                os.write(outside, b"x")
                signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(outside)
        assert os.read(inside, 1) == b"x"
        with pytest.raises(BlockingIOError, match=f"in use by process {child} on"):
            train(config(corpus, out), progress=False)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert sorted(p.name for p in out.iterdir()) == [".lock", ".lock-holder"]
    assert train(config(corpus, out, steps=2), progress=False).steps == 2
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_folders_made_for_nothing_go_again(tmp_path: Path):
    with locked_folder(tmp_path / "a" / "b", ALONE):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path / "a" / "b", ALONE):
        (tmp_path / "a" / "b" / "lr.png").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["lr.png"]
