"""The benches compare like with like, and the report shows what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from gptkernels.testing import SPECS, OpSpec

from bench.measure import affordable, in_turns, own_backends
from bench.peers import flex_attention, peers
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
def test_the_interpreter_is_never_timed():
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


def test_turns_are_taken_and_medians_quoted():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    medians = in_turns(calls, rounds=4, seconds=60.0)
    assert "".join(order).endswith("ab" * 4)
    assert set(medians) == {"a", "b"}
    order.clear()
    in_turns(calls, rounds=1000, seconds=0.0, least=2)
    assert len(order) <= 2 * (2 + 2)
