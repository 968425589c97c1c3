"""bench.tune drops tiles that do not fit before timing them, and chooses the fastest of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gptkernels.attention.tiles import Tile, tile

import bench.tune
from bench.tune import CANDIDATES, chosen, described, measure, parsed, table, times

A, B, C = Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 2), Tile(128, 128, 8, 2)


def test_the_tile_that_is_best_over_all_lengths_is_chosen():
    medians = {A: {1024: 1.0, 4096: 4.0}, B: {1024: 0.9, 4096: 4.8}, C: {1024: 1.1, 4096: 3.2}}
    assert chosen(medians, A) == C
    assert chosen({tile: {1024: medians[tile][1024]} for tile in medians}, A) == B


def test_the_shipped_tile_stays_unless_another_is_clearly_faster():
    assert chosen({A: {1024: 1.005}, B: {1024: 1.0}}, A) == A
    assert chosen({A: {1024: 1.02}, B: {1024: 1.0}}, A) == B
    assert chosen({B: {1024: 1.02}, C: {1024: 1.0}}, A) == C  # the shipped one does not fit
    assert chosen({}, A) == A
    assert chosen({A: {}, B: {}}, A) == A
    # A run that was cut timed only some tiles at 8,192 tokens: that length does not count.
    assert chosen({A: {1024: 1.0}, B: {1024: 1.2, 8192: 0.1}}, A) == A


def test_the_table_is_written_as_tiles_py_has_it():
    medians = {("dq", 64): {B: {1024: 1.0}, C: {1024: 2.0}}, ("dkdv", 128): {}}
    shipped = tile("dkdv", "sm_90", 2, 128, is_plain=True)
    assert eval(f"{{{table(medians, 'sm_90')}}}") == {("sm_90", "dq", 64): B, ("sm_90", "dkdv", 128): shipped}
    assert eval(described(A)) == A
    assert eval(described(B)) == B


def test_times_are_shown_fastest_first():
    shown = times("dq", 64, {A: {1024: 2e-3, 4096: 3e-3}, B: {1024: 1e-3, 4096: 2e-3}}, A).splitlines()
    assert shown[0] == "dq d64, ms at 1024, 4096 tokens"
    assert shown[1].split(")")[1].split() == ["1.000", "2.000", "chosen"]
    assert shown[2].split(")")[1].split() == ["2.000", "3.000", "shipped"]


def test_a_dozen_candidates_of_each_kernel():
    assert {len(set(tiles)) >= 12 for tiles in CANDIDATES.values()} == {True}
    assert len(CANDIDATES) == 6


def test_tiles_are_timed_once_their_numbers_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("WIDTH", 16), ("TOKENS", 64), ("CHECKED", 48), ("ROUNDS", 1)):
        monkeypatch.setattr(bench.tune, name, value)
    right, other, wrong = Tile(16, 16, 1, 1), Tile(32, 16, 1, 1), Tile(16, 16, 1, 2)
    checks = bench.tune.verify

    def verify(*given: Any) -> None:
        from gptkernels.attention import triton as launchers

        checks(*given)
        assert launchers.tile("dq") != wrong, "dq differs"

    monkeypatch.setattr(bench.tune, "verify", verify)
    saved: dict[str, Any] = {"machine": {"target": "sm_90"}, "failed": {}, "medians": {}}
    faults = {("dq", 16): {right: "", other: "", wrong: "", Tile(64, 16, 1, 1): "9 spills"}}
    results = measure(faults, [32, 64], time.monotonic() + 600, saved, tmp_path / "tiles.json")
    assert {tile: set(found) for tile, found in results["dq", 16].items()} == {right: {32, 64}, other: {32, 64}}
    assert saved["failed"] == {"dq d16 Tile(16, 16, 1, 2)": "AssertionError: dq differs"}
    assert set(saved["medians"]) == {"dq d16 32 tokens", "dq d16 64 tokens"}
    assert json.loads((tmp_path / "tiles.json").read_text()) == saved
    measure(faults, [32], time.monotonic() - 1, saved, None)
    assert saved["failed"]["dq d16 32 tokens"] == "the time was up"


def test_dry_run(tmp_path: Path):
    choice = ("--kernel", "forward", "--head-dim", "64", "--tile", "128,64,8,3,64", "--out", str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.tune", "--dry-run", *choice]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shipped = described(tile("forward", "sm_90", 2, 64, is_plain=True))
    head, *rest = done.stdout.splitlines()
    assert head == "forward d64, to be timed at 1024, 2048, 4096, 8192 tokens:"
    assert rest[0] == f"  {shipped}"
    assert rest[2:] == ["dry run: nothing was timed"]
    (name,), (why,) = zip(*json.loads((tmp_path / "tiles.json").read_text())["failed"].items())
    assert name == "forward d64 Tile(128, 64, 8, 3, 64)"
    assert "spills; wgmma serialised" in why
    assert rest[1] == f"left out: {name}: {why}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "unset it, interpreted kernels have no machine code"),
        (["--tile", "128,64"], "got '128,64'; a tile is block_m,block_n,warps,stages or with ,maxnreg"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench.tune, "interpreting", lambda: True)
    with pytest.raises(SystemExit):
        bench.tune.main(arguments)
    assert message in capsys.readouterr().err


def test_parsed():
    assert parsed("128,64,8,3") == Tile(128, 64, 8, 3)
    assert parsed("128,64,8,3,128") == A
