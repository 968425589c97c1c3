"""The model of an H100: hand-computed examples of its arithmetic; its saved figures and its page are up to date."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from gptkernels import _sass
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, OpSpec

from bench import expected, expected_tables, h100
from bench.launches import _section
from bench.measure import BF16
from bench.rows import directions, row_name

TRITON_SPECS = [spec for spec in SPECS if "triton" in FUSED[spec.name]]


def test_tiles_of_a_causal_mask():
    """4,096 queries and keys, tiles of 128 queries x 64 keys: the last queries see 64 tiles, two of them on the diagonal."""
    assert h100.key_tiles(3968, 4096, 4096, True, 0, 128, 64) == (62, 2)
    assert h100.key_tiles(0, 4096, 4096, True, 0, 128, 64) == (0, 2)
    assert h100.key_tiles(0, 100, 100, False, 0, 128, 64) == (1, 1)  # the end is ragged
    assert h100.key_tiles(2048, 4096, 4096, True, 512, 128, 64) == (6, 4)  # two at the window's edge
    assert h100.query_tiles(0, 4096, 4096, True, 0, 64, 128) == (62, 2)
    assert h100.query_tiles(3968, 4096, 4096, True, 0, 64, 128) == (0, 2)


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (128, 320), (256, 128)])
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 70), (True, 500)])
@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 64)])
def test_tiles_are_those_with_visible_pairs(
    queries: int, keys: int, causal: bool, window: int, block_m: int, block_n: int
):
    """Compared with a dense mask: every tile with a visible pair is computed, and tiles without a mask are wholly visible."""
    query, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None, :]
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        mask &= key <= query
    if window:
        mask &= key > query - window
    tiles = mask.unflatten(1, (-1, block_n)).unflatten(0, (-1, block_m)).transpose(1, 2)  # (M tiles, N tiles, m, n)
    some, whole = tiles.flatten(2).any(2), tiles.flatten(2).all(2)
    by_queries = [
        h100.key_tiles(m, queries, keys, causal, window, block_m, block_n) for m in range(0, queries, block_m)
    ]
    by_keys = [h100.query_tiles(n, queries, keys, causal, window, block_m, block_n) for n in range(0, keys, block_n)]
    for walked, axis in ((by_queries, 1), (by_keys, 0)):
        plain, masked = torch.tensor(walked).unbind(1)
        assert (plain <= whole.sum(axis)).all()  # some wholly visible tiles are computed with the mask
        assert (plain + masked >= some.sum(axis)).all()
        assert (plain + masked - some.sum(axis) <= 1).all()  # queries before the first key see none


def test_programs_run_in_waves():
    alone = [(1.0,)]
    assert h100.makespan(alone * 132, 132) == 1.0
    assert h100.makespan(alone * 133, 132) == 2.0
    assert h100.makespan([], 132) == 0.0
    assert h100.makespan([(3.0,), (1.0,), (1.0,), (1.0,)], 2) == 3.0  # the long one first
    assert h100.makespan([(1.0,), (1.0,), (1.0,), (3.0,)], 2) == 4.0
    two = [(1.0, 1.5)]  # two that share a multiprocessor take 1.5 together
    assert h100.makespan(two * 264, 132) == 1.5
    assert h100.makespan(two * 528, 132) == pytest.approx(3.0)
    assert h100.makespan(two * 265, 132) == pytest.approx(2.5)  # the last one has a multiprocessor to itself
    assert h100.makespan([(1.0, 2.0), (2.0, 4.0)], 1) == pytest.approx(3.0)  # half of it shared for 2 s, then alone


def test_programs_that_a_multiprocessor_holds():
    def held(warps: int, registers: int, shared: int) -> int:
        return h100.resident({"warps": warps}, {"registers": registers, "shared": shared})

    assert held(8, 121, 0) == held(8, 128, 0) == 2
    assert held(8, 129, 0) == 1
    assert held(8, 81, 0) == 2  # 2,592 of a warp are rounded up to 2,816: three would need 67,584
    assert held(16, 32, 0) == 4  # 2,048 threads
    assert held(4, 32, 100 * 1024) == 2
    assert held(1, 16, 0) == 32


def streaming(**changes: int) -> tuple[dict, dict]:
    """A kernel like a copy of 1.5 GB: each thread loads 64 bytes."""
    launch = {"programs": 100_000, "warps": 8, "stages": 3, "read": 1_500_000_000, "written": 1_500_000_000}
    section = {"instructions": 60, "loads": 64}
    launch |= {key: value for key, value in changes.items() if key in launch}
    section |= {key: value for key, value in changes.items() if key not in launch}
    return launch | {"constants": {}}, {"registers": 32, "shared": 0, "straight": section, "loops": []}


def test_a_copy_takes_its_bytes_and_a_launch():
    assert h100.streaming_seconds(*streaming()) == pytest.approx(1e-3 + 2.5e-6)
    # 132 programs of 8 warps have 8 x 32 x 4 / 2 = 512 bytes under way to each multiprocessor; 3.0e12 x 0.7e-6 / 132 x 1/2 =
    # 7,955 would be needed.
    slow = h100.streaming_seconds(*streaming(programs=132, loads=4))
    assert slow == pytest.approx(1e-3 * 7954.5 / 512 + 2.5e-6, rel=1e-4)
    # 100,000 x 8 warps x 4,000 instructions over 4 x 132 x 1.75e9 a second.
    assert h100.streaming_seconds(*streaming(instructions=4000)) == pytest.approx(3.463e-3 + 2.5e-6, rel=1e-3)
    # 500 exponentials a thread, 16 a cycle: 100,000 x 8 x 32 x 500 / (16 x 132 x 1.75e9).
    assert h100.streaming_seconds(*streaming(special=500)) == pytest.approx(3.463e-3 + 2.5e-6, rel=1e-3)


def test_a_second_pass_costs_bytes_where_the_cache_has_lost_them():
    launch, figures = streaming(programs=4096)
    figures["loops"] = [{"instructions": 20, "loads": 64}] * 2
    # 8 x 132 programs of 366 kB at a time are 387 MB, of which the cache holds 52.4 MB.
    assert h100.read_again(launch, figures) == pytest.approx(1.5e9 * (1 - 52.43 / 386.7), rel=1e-3)
    assert h100.read_again(launch | {"programs": 100_000}, figures) == 0  # of 15 kB
    figures["loops"] = figures["loops"][:1]
    assert h100.read_again(launch, figures) == 0


@pytest.mark.parametrize("turn", [1, 2], ids=["one tile a turn", "two tiles a turn"])
def test_a_tile_of_attention(turn: int):
    """128 x 64 at head_dim 64 by 8 warps: 283 instructions of a warp, 34 of them exponentials of 32 lanes each."""
    section = {"instructions": 283, "special": 34, "flops": 262_144, "shared_bytes": 8_576}
    section = {name: turn * count for name, count in section.items()}
    tile = h100.tile(section, 2 * 2 * 128 * 64 * 64, 16_384, 8)
    assert tile.multiply == pytest.approx(346.9e-9, rel=1e-3)  # 2,097,152 FLOP at 798e12 / 132
    assert tile.feed == pytest.approx(306.3e-9, rel=1e-3)  # 68,608 bytes, 128 a cycle
    assert tile.softmax == pytest.approx(323.4e-9, rel=1e-3)  # 566 cycles at 1.75 GHz
    assert tile.loads == pytest.approx(393.2e-9, rel=1e-3)
    assert tile.seconds(1, h100.H100.overlap) == pytest.approx(670.3e-9, rel=1e-3)
    assert tile.seconds(2, h100.H100.overlap) == pytest.approx(562.5e-9, rel=1e-3)
    assert tile.seconds(2, (1.0, 1.0)) == tile.loads  # all overlaps: the cache is the ceiling


def test_an_attention_kernel_waits_and_ends_late():
    launch = {"programs": 133, "warps": 8, "read": 0, "written": 0}
    tile = h100.Tile(100e-9, 0.0, 200e-9, 0.0)
    seconds = h100.attention_seconds(launch, {"registers": 200, "shared": 0}, [(9, 1)] * 133, (tile, tile))
    assert seconds == pytest.approx(2.5e-6 + 2 * (1.4e-6 + 10 * 300e-9))


def test_the_counts_of_a_piece_of_code():
    text = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;
        /*0030*/                   LDS.64 R10, [R9] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R56, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/              @!P0 FADD R3, R3, R4 ;
    """
    assert _section(_sass.parse(text).instructions) == {
        "instructions": 8,
        "special": 1,
        "loads": 16 + 2 + 16,
        "async": 1,
        "flops": (2 * 64 * 64 * 16 + 2 * 64 * 128 * 16) // 4,  # four warps compute it together
        "shared_bytes": 32 * 16 + 32 * 8 + (2 * 16 * (64 + 64) + 2 * 16 * 128) // 4,
    }


@pytest.mark.parametrize("spec", TRITON_SPECS, ids=lambda s: s.name)
def test_every_row_of_the_bench_has_a_prediction(spec: OpSpec):
    for case, direction in itertools.product(spec.bench_cases, directions(spec)):
        seconds, bounds = (f(spec, case, BF16, direction) for f in (expected.seconds, expected.bounds))
        assert seconds is not None, f"{case.name}: python -m bench.expected --compile"
        assert bounds is not None
        assert 0 < bounds[0] <= seconds <= bounds[1]
        cost = spec.cost(case, BF16)
        moved = cost.forward_bytes if direction == "forward" else cost.backward_bytes
        assert seconds > moved / h100.H100.bandwidth  # never faster than the fewest bytes allow


def test_rows_without_a_prediction():
    spec = next(spec for spec in SPECS if spec.name == "softmax")
    assert expected.seconds(spec, spec.bench_cases[0], torch.float32, "forward") is None
    linear = next(spec for spec in SPECS if spec.name == "linear")  # no GPU kernel of ours
    assert expected.seconds(linear, linear.bench_cases[0], BF16, "forward") is None
    with pytest.raises(
        ValueError, match="direction: got 'sideways'; accepted are forward, backward, forward \\+ backward"
    ):
        expected.seconds(spec, spec.bench_cases[0], BF16, "sideways")


@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm", "softmax", "gelu", "swiglu"])
def test_the_bytes_that_a_kernel_reads_and_writes(name: str):
    """Reads and writes together are the bytes that the spec counts, and the writes are the results."""
    spec = next(spec for spec in SPECS if spec.name == name)
    for case in spec.bench_cases:
        (launch,) = expected.saved()["rows"][row_name(spec, case, BF16, "forward")]
        results = math.prod(case.parameters["shape"]) * 2 * (2 if name.startswith("add") else 1)
        assert launch["read"] + launch["written"] == pytest.approx(spec.cost(case, BF16).forward_bytes, rel=0.01)
        assert launch["written"] == pytest.approx(results, rel=0.01)


def test_the_training_step_is_predicted():
    parts = expected.training_parts()
    assert sum(parts.values()) == expected.training_seconds()
    # 6 FLOP a token for each of the blocks' weights, at 75 % of 798 TFLOP/s.
    assert parts["products"] == pytest.approx(6 * 84.9e6 * 16384 / (0.75 * 798e12), rel=0.05)
    assert 0.02 < expected.training_seconds() < 0.06


def test_the_page_is_made_from_the_saved_figures():
    text = expected_tables.DOCUMENT.read_text()
    assert expected_tables.rewritten(text) == text, "python -m bench.expected --document"
    with pytest.raises(ValueError, match="worked streaming: got 0 pairs of markers"):
        expected_tables.rewritten("")


def test_the_saved_figures_are_those_of_what_is_launched_now():
    """In a process where Triton does not interpret; then with another tile, which must show as a difference."""
    script = """
from bench import expected
from gptkernels.attention import tiles, triton
print(expected.differences())
triton.tile = lambda *args: tiles.Tile(64, 64, 4, 2)
print(expected.differences(["attention_varlen"]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    now, then = done.stdout.splitlines()
    assert now == "[]", "python -m bench.expected --compile"
    assert then.count("attention_varlen") == 2


def test_the_command(capsys, monkeypatch: pytest.MonkeyPatch):
    assert expected.main([]) == 0
    assert "| softmax 4096x1024: forward | 1 |" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        expected.main(["--check"])
    assert "TRITON_INTERPRET is 1: unset it" in capsys.readouterr().err
