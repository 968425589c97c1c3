"""The benches' peers compute the same as our operations, bench.cpu times all of them, and the report shows the results."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from gptkernels.backend import FUSED
from gptkernels.testing import SPECS, OpSpec

from bench import cpu, rows
from bench.measure import BF16, FP32, affordable, in_turns, own_backends, results
from bench.peers import flex_attention, peers
from bench.picture import lines
from bench.report import main, read, table

SMALL = {
    "softmax": "2x5x64-causal",
    "attention": "B2-H3-T37-D64-causal",
    "rotary": "B2-H3-T19-D64",
    "attention_varlen": "T37+1+20-H2-D16",
    "linear": "7x40-N64",
    "linear_cross_entropy": "33-C16-V17-bias-sum",
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_peers_compute_the_same(spec: OpSpec):
    case = next(c for c in spec.cases if c.name == SMALL.get(spec.name, "33x17"))
    inputs = spec.make_inputs(case, torch.float64, torch.device("cpu"), 0).mapped(lambda t: t.double())
    expected = spec.reference(**inputs.tensors, **inputs.options)
    for name, peer in peers(spec, "cpu", compiled=False).items():
        actual = peer(**inputs.tensors, **inputs.options)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3}, {"is_causal": True, "window": 9}], ids=str)
def test_flex_attention_computes_the_same(options: dict):
    spec = next(spec for spec in SPECS if spec.name == "attention")
    query, key, value = torch.randn(3, 2, 4, 37, 16, dtype=torch.float64).unbind()
    key, value = key[:, ::2], value[:, ::2]
    expected = spec.reference(query, key, value, **options)
    torch.testing.assert_close(flex_attention(compiled=False)(query, key, value, **options), expected)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_op_is_timed_somewhere(spec: OpSpec):
    assert affordable(spec, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_triton_is_not_timed_on_a_cpu():
    assert "triton" not in own_backends()


def saved(file, rows) -> None:
    benchmarks = [{"group": g, "stats": {"median": m}, "extra_info": {"contender": c, **x}} for g, c, m, x in rows]
    file.write_text(json.dumps({"benchmarks": benchmarks}))


def test_report(tmp_path, capsys):
    file = tmp_path / "b.json"
    info = {"gb_per_s": 12.5, "tflop_per_s": 0.25, "share_of_ceiling": 0.5}
    saved(file, [("softmax 4x4", "eager", 0.004, info), ("softmax 4x4", "triton", 0.002, {}), ("step", "x", 1.0, {})])
    lines = table(read([file])).splitlines()
    assert lines[2] == "| softmax 4x4 | eager | 4.000 | 1.00x | 12.50 | 0.25 |  | 50% |"
    assert lines[3] == "|  | triton | 2.000 | 2.00x |  |  |  |  |"
    assert lines[4] == "| step | x | 1000.000 |  |  |  |  |  |"
    assert main([str(file), "--plot", str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().out.strip() == "\n".join(lines)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "broken.json").write_text("{}")
    for name in ("broken.json", "missing.json"):
        assert main([str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_contenders_are_timed_in_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    medians = in_turns(calls, rounds=4, seconds=60.0)
    assert "".join(order).endswith("ab" * 4)
    assert set(medians) == {"a", "b"}
    order.clear()
    in_turns(calls, rounds=1000, seconds=0.0, least=2)
    assert len(order) <= 2 * (2 + 2)


# bench.cpu -----------------------------------------------------------------------------------------------------------

OP_GROUPS = (*rows.GROUPS, rows.OTHERS)


def spec(name: str) -> OpSpec:
    return next(spec for spec in SPECS if spec.name == name)


def test_every_native_op_has_a_row_on_the_cpu():
    timed = {spec.name for group in OP_GROUPS for spec, _, _ in cpu.op_cases(group)}
    assert timed == {name for name, backends in FUSED.items() if "native" in backends}


def test_rows_keep_the_names_that_saved_results_have():
    """Results of different dates can then be compared; which of two dtypes a row has may depend on the machine."""
    names = {
        cpu.row_name(spec, case, dtype, direction)
        for group in OP_GROUPS
        for spec, case, _ in cpu.op_cases(group)
        for dtype in cpu.DTYPES
        for direction in cpu.directions(spec)
    }
    for saved in results("cpu").values():
        ops = {name for name in saved["default"]["rows"] if not name.startswith(("GPT-2", "decoding"))}
        assert ops <= names


@pytest.mark.parametrize(
    ("name", "case", "directions"),
    [
        ("attention", "B2-H3-T37-D64-causal", ["forward", "backward"]),
        ("rms_norm", "33x17", ["forward + backward"]),
        ("linear_cross_entropy", "33-C16-V17", ["forward + backward"]),
        ("linear", "1x768-N33", ["forward"]),
    ],
)
def test_a_cpu_row_times_ours_beside_pytorch(name: str, case: str, directions: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "ceilings", lambda dtype: (1e9, 1e9))
    small = next(c for c in spec(name).cases if c.name == case)
    found = [row.measure(rounds=1) for row in cpu.op_rows(spec(name), small, FP32)]
    assert [row["name"] for row in found] == [f"{name} fp32, {case}: {direction}" for direction in directions]
    for row in found:
        assert set(row["medians"]) == {"eager", "ours"}
        assert row["share_of_ceiling"] > 0
        assert row["goal"] is None


def test_a_cpu_row_outside_the_error_budget_is_not_timed():
    right = spec("softmax")
    wrong = dataclasses.replace(right, function=lambda **kwargs: right.function(**kwargs) * 1.01)
    with pytest.raises(AssertionError, match="softmax out: error"):
        next(cpu.op_rows(wrong, right.cases[4], BF16))


def test_the_cpu_table_shows_goals_where_there_are_some():
    medians = {"F.softmax": 0.004, "other": 0.003, "ours": 0.002}
    row = {"medians": medians, "share_of_ceiling": 0.5}
    both = {"rows": {"softmax": {**row, "goal": 1.3}, "rotary": {**row, "goal": None}}}
    lines = cpu.table({"default": both, "tuned": {"rows": {}}}).splitlines()
    assert lines[2] == "| softmax | 3.00 (other) | 2.00 | 1.50x | 1.3x | 50% |  |"
    assert lines[3] == "| rotary | 3.00 (other) | 2.00 | 1.50x |  | 50% |  |"


def test_the_work_of_a_row():
    """A loss reads its logits once for both directions; other operations read their input in each."""
    for name, case, directions in (("softmax", "33x17", ("forward", "backward")), ("cross_entropy", "33x17", ())):
        op = spec(name)
        small = next(c for c in op.cases if c.name == case)
        both = rows.work(op, small, FP32, rows.BOTH)
        alone = [rows.work(op, small, FP32, direction) for direction in directions]
        cost = op.cost(small, FP32)
        assert both[0] == cost.forward_flops + cost.backward_flops
        assert both[1] == (sum(moved for _, moved in alone) or 2 * 33 * 17 * 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("softmax fp32, 4096x1024: forward + backward", ("softmax fp32: forward + backward", "4096x1024")),
        ("GPT-2 124M training step, fp32, B2 T512", ("GPT-2 124M training step", "fp32, B2 T512")),
    ],
)
def test_the_picture_names_work_and_size_in_two_lines(name: str, expected: tuple):
    assert lines(name) == expected
