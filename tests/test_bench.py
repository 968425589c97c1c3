"""The benches compare like with like, and the report shows what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from gptkernels.testing import SPECS, OpSpec

import bench.gpu
from bench.measure import affordable, in_turns, own_backends, results, save
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


def test_every_contender_on_a_gpu_has_run_once(capsys):
    """The same walk that a GPU takes, at sizes that mean nothing; the kernels are held to the error budget on the way."""
    assert bench.gpu.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "not timed" not in shown
    for spec in SPECS:
        assert f"| {spec.name} " in shown
    assert "GPT tiny training step" in shown


@pytest.fixture
def result() -> dict:
    row = {
        "name": "attention B16-H12-T1024-D64-causal bf16: forward",
        "medians": {"ours": 0.00005, "sdpa flash": 0.0001, "sdpa cudnn": 0.00006, "eager": 0.0002},
        "ours": "ours",
        "best_peer": "sdpa cudnn",
        "rate": 412.4,
        "unit": "TFLOP/s",
        "share_of_ceiling": 0.52,
        "refused": {},
        "goal": {"value": 330, "unit": "TFLOP/s", "met": True},
    }
    step = {
        **row,
        "name": "step",
        "ours": "ours, CUDA graph",
        "goal": {"value": 0.9, "unit": "of ceiling", "met": False},
    }
    step["medians"] = {"ours": 0.2, "ours, CUDA graph": 0.1, "sdpa cudnn": 0.15}
    versions = {"torch": "2.11.0", "python": "3.12", "commit": "abc", "date": "2026-12-01"}
    machine = {"gpu": "G", "cuda": "12.8", "triton": "3.6", **versions, "copy_gb_per_s": 3000.0}
    return {
        "machine": {**machine, "product_tflop_per_s": {"bf16": 798.0}},
        "rows": {row["name"]: row, "step": step},
        "memory": {"eager": 5 * 2**30, "ours": 2**30},
        "failed": {"softmax 4096x1024": "AssertionError: out: error 1"},
    }


def test_gpu_table(result: dict, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    lines = bench.gpu.table(result).splitlines()
    assert lines[2] == (
        "| attention B16-H12-T1024-D64-causal bf16: forward | 0.050 | 412 TFLOP/s | 52% | 330 TFLOP/s: met | "
        "0.060 (sdpa cudnn) | 1.20x | sdpa flash 0.100, eager 0.200 |"
    )
    assert lines[3].startswith("| step | 100.000 (CUDA graph) | 412 TFLOP/s | 52% | 90% of ceiling: missed | 150.000")
    assert lines[4].startswith("| linear_cross_entropy's memory beside the gradients | 1,024 MiB | | | a fifth: met |")
    monkeypatch.setattr(bench.measure, "RESULTS", tmp_path)
    save(result, tmp_path / "g.json")
    assert results("gpu") == {"g": result}
    assert results("cpu") == {}
    assert bench.gpu.main(["--show", str(tmp_path / "g.json")]) == 0
    assert "- not timed: softmax 4096x1024: AssertionError: out: error 1" in capsys.readouterr().out


def test_gpu_results_are_taken_in_as_they_come(result: dict, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A group whose process dies keeps the rows that it had finished, and the file says what became of the rest."""
    row = result["rows"]["step"]
    child = f"print('noise'); print({json.dumps(json.dumps(row))}, flush=True); raise SystemExit(3)"
    popen = bench.gpu.subprocess.Popen
    monkeypatch.setattr(bench.gpu.subprocess, "Popen", lambda command, **kw: popen([command[0], "-c", child], **kw))
    saved = {"machine": {}, "rows": {}, "failed": {}}
    bench.gpu._run_groups(["attention"], saved, tmp_path / "g.json", minutes=1.0)
    bench.gpu._run_groups(["norms"], saved, tmp_path / "g.json", minutes=0.0)
    kept = json.loads((tmp_path / "g.json").read_text())
    assert kept["rows"] == {"step": row}
    assert kept["failed"] == {"attention": "not finished: its process ended with 3"}
    assert saved["failed"]["norms"] == "the 0 minutes were over"


def test_gpu_results_of_one_commit_are_one_file(result: dict, tmp_path):
    save(result, tmp_path / "g.json")
    same, other = ({"machine": {**result["machine"], "commit": c}, "rows": {}, "failed": {}} for c in ("abc", "def"))
    bench.gpu.continue_file(same, tmp_path / "g.json")
    bench.gpu.continue_file(other, tmp_path / "g.json")
    assert same["rows"] == result["rows"]
    assert same["memory"] == result["memory"]
    assert other["rows"] == {}
    bench.gpu.take_in(same, {"name": "softmax 4096x1024 bf16: forward", "medians": {}})
    assert same["failed"] == {}  # what failed then has been timed now


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_timed(capsys):
    with pytest.raises(SystemExit):
        bench.gpu.main([])
    assert "there is no GPU here; --dry-run walks through everything" in capsys.readouterr().err
