"""bench.gpu: its rows, what it saves and shows; and bench.first_run, the ten minutes on a GPU that it is a part of."""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from _pytest.mark.expression import Expression
from gptkernels.testing import SPECS, Case

import bench.gpu
from bench import first_run, gpu_rows
from bench.counters import shown
from bench.first_run import Step
from bench.gpu_rows import COPY, Goal, Plan, Row, goals, op_rows
from bench.gpu_table import continue_file, short_table, table, take_in
from bench.measure import CapturedGraph, results, save

ROOT = Path(__file__).parents[1]


def spec(name: str):
    return next(spec for spec in SPECS if spec.name == name)


def case(name: str, **parameters) -> Case:
    """The first bench case of an operation that has these parameters."""
    return next(c for c in spec(name).bench_cases if parameters.items() <= dict(c.parameters).items())


def test_the_dry_run_runs_every_contender_once(capsys):
    """It takes the same steps as on a GPU, at tiny sizes, and checks the kernels against the error budget."""
    assert bench.gpu.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "not timed" not in shown
    for spec in SPECS:
        assert f"| {spec.name} " in shown
    assert "GPT tiny training step" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_timed(capsys):
    with pytest.raises(SystemExit):
        bench.gpu.main([])
    assert "there is no GPU here; --dry-run walks through everything" in capsys.readouterr().err


# What is timed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "direction", "expected"),
    [
        ("attention", {"queries": 8192, "head_dim": 64}, "forward", (Goal(1.0, "sdpa flash"), Goal(500, "TFLOP/s"))),
        ("attention", {"queries": 2048, "head_dim": 64}, "backward", (Goal(1.0, "sdpa flash"), Goal(370, "TFLOP/s"))),
        ("attention", {"queries": 2048, "head_dim": 128}, "forward", (Goal(1.0, "sdpa flash"), Goal(568, "TFLOP/s"))),
        ("attention", {"queries": 8192, "head_dim": 128}, "backward", (Goal(1.0, "sdpa flash"),)),
        ("attention", {"window": 512}, "forward", ()),
        ("layer_norm", {"shape": (32768, 1024)}, "forward", (Goal(0.95, COPY),)),
        ("layer_norm", {"shape": (4096, 1024)}, "forward", ()),
        ("layer_norm", {"shape": (4096, 4096)}, "backward", (Goal(0.8, COPY),)),
        ("rms_norm", {"shape": (4096, 8192)}, "backward", ()),
        ("swiglu", {"shape": (16384, 4096)}, "forward", (Goal(0.95, COPY),)),
        ("softmax", {"shape": (32768, 1024)}, "forward", (Goal(0.95, COPY),)),
        ("cross_entropy", {"shape": (16384, 50257)}, "forward + backward", (Goal(0.9, COPY),)),
        ("cross_entropy", {"shape": (4096, 4096)}, "forward + backward", ()),
    ],
)
def test_goals(name: str, parameters: dict, direction: str, expected: tuple[Goal, ...]):
    assert goals(name, case(name, **parameters), direction) == expected


def test_a_mean_loss_is_differentiated_with_a_gradient_of_1():
    """As in training: with another gradient, the loss's own would be read and written once more."""
    loss = spec("cross_entropy")
    inputs = loss.make_inputs(loss.cases[3], torch.bfloat16, torch.device("cpu"), 0)
    logits = inputs.tensors["logits"].requires_grad_()
    (row,) = op_rows(loss, loss.cases[3], Plan(dry=True))
    expected = torch.autograd.grad(loss.reference(**inputs.tensors, **inputs.options), logits)
    for name in ("ours", "eager"):
        torch.testing.assert_close(row.contenders[name](), expected, rtol=0.01, atol=1e-4)


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def gradient_of_something_else(**kwargs):
        x = kwargs["x"]
        return gpu_rows.SPECS[4].reference(**kwargs).detach() + x - x.detach()

    found = {"eager": spec("softmax").reference, "other": gradient_of_something_else}
    monkeypatch.setattr(gpu_rows, "peers", lambda *_, **__: found)
    rows = list(op_rows(spec("softmax"), spec("softmax").cases[4], Plan(dry=True)))
    assert [list(row.contenders) for row in rows] == [["ours", "eager"], ["ours", "eager", COPY]]
    assert "differs from ours" in rows[0].refused["other"]


def test_peers_that_take_long_to_compile_come_last(monkeypatch: pytest.MonkeyPatch):
    eager = spec("softmax").reference
    monkeypatch.setattr(gpu_rows, "peers", lambda *_, **__: {"compile": eager, "eager": eager})
    small = spec("softmax").cases[4]
    for late, expected in ((False, {"ours", "eager"}), (True, {"ours", "eager", "compile"})):
        for row in op_rows(spec("softmax"), small, Plan(dry=True), late):
            assert set(row.contenders) - {COPY} == expected
    monkeypatch.setattr(gpu_rows, "peers", lambda *_, **__: {"eager": eager})
    assert list(op_rows(spec("softmax"), small, Plan(dry=True), late=True)) == []


def test_each_contender_of_the_training_step_is_measured_when_it_is_ready():
    """A run that is cut while torch.compile works keeps ours and eager; a contender that fails does not stop the others."""
    rows = list(gpu_rows.training_rows(Plan(dry=True)))
    names = [list(row.contenders) for row in rows]
    assert names == [["eager", "ours"], [*names[0], "compile, sdpa flash"], [*names[1], "ours, compile"]]
    assert len({row.name for row in rows}) == 1
    refused = {"eager, sdpa cudnn", "compile, sdpa cudnn", "ours, CUDA graph"}  # there is no GPU
    assert torch.cuda.is_available() or set(rows[-1].refused) == refused
    assert [list(row.contenders) for row in gpu_rows.training_rows(Plan(dry=True, quick=True))] == names[:1]


def test_a_captured_step_keeps_its_weights(monkeypatch: pytest.MonkeyPatch):
    """A CUDA graph holds only addresses: freed weights would become the next contender's memory, overwritten at each replay."""
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    weights = torch.zeros(3)
    known = weakref.ref(weights)
    replay = CapturedGraph(lambda weights=weights: weights.add_(1).sum())
    del weights
    gc.collect()
    assert known() is not None
    assert replay() == 12.0  # what the capture returned, after three steps to warm up
    torch.cuda.CUDAGraph.return_value.replay.assert_called_once_with()
    del replay
    gc.collect()
    assert known() is None


# What is saved and shown ---------------------------------------------------------------------------------------------


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
        "expected": 0.000061,
        "refused": {"flex": "NotImplementedError: no"},
        "goals": [
            {"value": 1.0, "unit": "sdpa flash", "met": True},
            {"value": 330, "unit": "TFLOP/s", "met": True},
        ],
    }
    step = {
        **row,
        "name": "step",
        "medians": {"ours": 0.2, "ours, CUDA graph": 0.1, "sdpa cudnn": 0.15},
        "ours": "ours, CUDA graph",
        "expected": None,
        "goals": [{"value": 0.9, "unit": COPY, "met": False}, {"value": 1.0, "unit": "sdpa flash", "met": None}],
    }
    versions = {"torch": "2.11.0", "python": "3.12", "commit": "abc", "date": "2026-12-01"}
    machine = {"gpu": "G", "cuda": "12.8", "triton": "3.6", **versions, "copy_gb_per_s": 3000.0}
    return {
        "machine": {**machine, "product_tflop_per_s": {"bf16": 798.0}},
        "rows": {row["name"]: row, "step": step},
        "memory": {"eager": 5 * 2**30, "ours": 2**30},
        "failed": {"softmax 4096x1024": "AssertionError: out: error 1"},
    }


def test_a_row_is_judged_by_its_goals():
    calls = {"ours": lambda: time.sleep(0.002), "ours, quick": lambda: None, "eager, so": lambda: time.sleep(0.004)}
    given = (Goal(1.0, "eager"), Goal(1e9, "tokens/s"), Goal(1.0, "sdpa flash"), Goal(1.0, COPY))
    copy = {COPY: lambda: None}
    row = Row("x", {**calls, **copy}, torch.float32, flops=1e6, tokens=10, goals=given, expected=0.5)
    found = row.measure((1e9, 1e9), 3)
    assert (found["ours"], found["best_peer"], found["unit"], found["expected"]) == (
        "ours, quick", "eager, so", "tokens/s", 0.5,
    )  # fmt: skip
    assert [goal["met"] for goal in found["goals"]][:3] == [True, False, None]
    alone = Row("x", {"ours": calls["ours"], **copy}, torch.float32, moved=1.0).measure((1e9, 1e9), 1)
    assert (alone["best_peer"], alone["unit"]) == ("", "GB/s")


def test_gpu_table(result: dict, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    lines = table(result).splitlines()
    assert lines[2] == (
        "| attention B16-H12-T1024-D64-causal bf16: forward | 0.050 | 0.061 | 412 TFLOP/s | 52% | "
        "as fast as sdpa flash: met; 330 TFLOP/s: met | 0.060 (sdpa cudnn) | 1.20x | sdpa flash 0.100, eager 0.200 |"
    )
    assert lines[3].startswith(
        "| step | 100.000 (CUDA graph) |  | 412 TFLOP/s | 52% | 90% of copy of as many bytes: missed; as fast as sdpa flash: "
        "not judged | 150.000"
    )
    assert lines[4].startswith(
        "| linear_cross_entropy's peak memory without the gradients | 1,024 MiB | | | | a fifth: met |"
    )
    assert len({line.count("|") for line in lines}) == 1
    brief = short_table(result).splitlines()
    assert brief[1] == "not timed: softmax 4096x1024: AssertionError: out: error 1"
    assert brief[3].split() == [
        "attention", "B16-H12-T1024-D64-causal", "bf16:", "forward", "0.050", "0.061", "412", "TFLOP/s", "52%", "2/2",
        "1.20x", "sdpa", "cudnn",
    ]  # fmt: skip
    monkeypatch.setattr(bench.measure, "RESULTS", tmp_path)
    save(result, tmp_path / "g.json")
    assert results("gpu") == {"g": result}
    assert results("cpu") == {}
    assert bench.gpu.main(["--show", str(tmp_path / "g.json")]) == 0
    shown = capsys.readouterr().out
    assert "- not timed: softmax 4096x1024: AssertionError: out: error 1" in shown
    assert (
        "- without flex: attention B16-H12-T1024-D64-causal bf16: forward and 1 more: NotImplementedError: no" in shown
    )


def test_gpu_results_are_saved_row_by_row(result: dict, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """If a group's process dies, the file keeps its finished rows and says what became of the rest."""
    row = result["rows"]["step"]
    child = f"print('noise'); print({json.dumps(json.dumps(row))}, flush=True); raise SystemExit(3)"
    popen, commands = bench.gpu.subprocess.Popen, []

    def start(command, **options):
        commands.append(command[3:])
        return popen([command[0], "-c", child], **options)

    monkeypatch.setattr(bench.gpu.subprocess, "Popen", start)
    saved = {"machine": {}, "rows": {}, "failed": {}}
    groups = bench.gpu.passes(["attention", "training"], Plan(), late=False)
    bench.gpu.run_groups(groups, Plan(), saved, tmp_path / "g.json", time.monotonic() + 60)
    bench.gpu.run_groups([("norms", False)], Plan(), saved, tmp_path / "g.json", time.monotonic())
    assert commands == [["--child", "attention"], ["--child", "training"], ["--child", "attention", "--late"]]
    kept = json.loads((tmp_path / "g.json").read_text())
    assert kept["rows"] == {"step": row}
    names = ("attention", "training", "attention, with compiled peers")
    assert kept["failed"] == dict.fromkeys(names, "not finished: its process ended with 3")
    assert saved["failed"]["norms"] == "the time was up"


def test_which_rows_are_timed_when():
    groups = ["training", "norms"]
    assert bench.gpu.passes(groups, Plan(), late=False) == [("training", False), ("norms", False), ("norms", True)]
    assert bench.gpu.passes(groups, Plan(quick=True), late=False) == [("training", False), ("norms", False)]
    assert bench.gpu.passes(groups, Plan(), late=True) == [("norms", True)]


def test_gpu_results_of_one_commit_are_one_file(result: dict, tmp_path):
    save(result, tmp_path / "g.json")
    same, other = ({"machine": {**result["machine"], "commit": c}, "rows": {}, "failed": {}} for c in ("abc", "def"))
    continue_file(same, tmp_path / "g.json")
    continue_file(other, tmp_path / "g.json")
    assert same["rows"] == result["rows"]
    assert same["memory"] == result["memory"]
    assert other["rows"] == {}
    take_in(same, {"name": "softmax 4096x1024 bf16: forward", "medians": {}})
    assert same["failed"] == {}  # what failed then has been timed now


def test_the_most_important_counters_are_shown():
    raw = '==PROF== noise\n"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","x"\n'
    raw += '"","","us","register/thread",""\n"0","_forward_kernel","61.5","128","7"\n"1","_dq_kernel","99","255","7"\n'
    assert shown(raw).splitlines() == [
        "_forward_kernel: time 61.5 us, registers 128 register/thread",
        "_dq_kernel: time 99 us, registers 255 register/thread",
    ]
    assert shown("==ERROR== no") == "ncu reported no kernel"


# The run of ten minutes ----------------------------------------------------------------------------------------------


def python(name: str, code: str, cap: float = 20, need: float = 1) -> Step:
    return Step(name, cap, need, ("-c", code))


def test_a_run_continues_after_a_step_fails_or_is_cut(tmp_path: Path, capsys):
    waiting = "import time; time.sleep(99)"
    left_behind = "import time; time.sleep(15)"  # in a session of its own, holding the step's output open
    slow = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{left_behind}'], start_new_session=True);"
        f"subprocess.run([sys.executable, '-c', '{waiting}'])"
    )
    steps = (
        python("good", "print('{out} {commit}'); print('fine')"),
        python("bad", "print('FAILED tests/x.py::test_y - no'); raise SystemExit('broken')"),
        python("slow", slow, cap=2),
        python("needs more", "print('never')", need=99, cap=99),
        python("last", "import os; print(os.environ['PYTHONPATH'], os.path.exists('pyproject.toml'))"),
    )
    began = time.monotonic()
    assert first_run.main(["--out", str(tmp_path), "--commit", "abc", "--seconds", "60"], steps) == 1
    assert time.monotonic() - began < 12  # it did not wait for what the cut step had started
    failures, _, page = capsys.readouterr().out.rpartition("step  ")
    assert failures.endswith("\nFAILED tests/x.py::test_y - no\n\n")
    said = {line[:34].strip(): (line[59:79].strip(), line[80:]) for line in page.splitlines()[1:6]}
    assert said["good"] == ("ok", "fine")
    assert said["bad"] == ("exit 1", "broken")
    assert said["slow"][0] == "cut after 2 s"
    assert said["needs more"][0].startswith("skipped: ")
    assert said["last"] == ("ok", f"{ROOT / 'kernels'}:{ROOT} True"[:100])
    log = (tmp_path / "log.txt").read_text()
    assert f"{tmp_path} abc\nfine\n" in log
    assert "never\n" not in log


def test_a_run_keeps_to_its_budget(tmp_path: Path):
    steps = (python("one", "import time; time.sleep(60)", cap=60), python("two", "print('never')", need=10))
    began = time.monotonic()
    assert first_run.main(["--out", str(tmp_path), "--seconds", "12"], steps) == 1
    assert time.monotonic() - began < 12
    assert "skipped" in (tmp_path / "summary.txt").read_text()


def test_the_page_fits_and_ends_with_the_steps(result: dict, tmp_path: Path, capsys):
    row = result["rows"].pop("step")
    result["rows"] |= {f"row {i}": row for i in range(400)}
    save(result, tmp_path / "g.json")
    assert first_run.main(["--out", str(tmp_path)], (python("good", "print('fine')"),)) == 0
    page = (tmp_path / "summary.txt").read_text()
    assert len(page) < 12_000
    assert "(the rest is in the folder's .json)" in page
    assert (
        "G, CUDA 12.8, PyTorch 2.11.0, Triton 3.6, Python 3.12, commit abc, 2026-12-01: copy 3,000 GB/s, product 798 TFLOP/s"
        in page
    )
    assert page.splitlines()[-2].endswith("fine")


def test_every_step_of_the_run_finds_its_tests_and_modules():
    for step in first_run.STEPS:
        command = step.command(Path("OUT"), "abc", 60.0, dry=True)
        if "-m" not in command:
            continue
        assert not [word for word in command if re.search(r"[{}]", word)], command
        module = command[command.index("-m") + 1]
        if module != "pytest":
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
            continue
        names = [f"test_real_sizes_within_the_error_budget[{p.id}]" for p in real_sizes()]
        for file in (word for word in command if word.startswith("tests/")):
            tree = ast.parse((ROOT / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            names += functions - {"test_real_sizes_within_the_error_budget"}
        chosen = Expression.compile(command[command.index("-k") + 1])
        assert any(chosen.evaluate(lambda word, name=name: word in name) for name in names if name.startswith("test_"))


def real_sizes() -> list:
    from tests.kernels.test_gpu import REAL_SIZES

    return REAL_SIZES


def test_the_cache_is_filled_with_what_a_launch_looks_up():
    """Launches recorded on tensors without data have the same cache keys as launches on tensors in memory."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.recorded_launches"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all the same"
