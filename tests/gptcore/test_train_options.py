"""What surrounds the loop: YAML files, a step's tokens, utilisation, the search for a learning rate, what is shown."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gptcore import GPT, GPTConfig
from gptcore.train import TrainConfig, find_lr, train
from gptcore.train.display import Display, chart
from gptcore.train.hardware import listed_peak, measured_peak, model_flops_utilization, peak_flops
from gptcore.train.lr_finder import smoothed
from gptcore.train.parallel import World, checkpoint_activations
from tests.gptcore.runs import cli, config, contents, main, records


def gptcore(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_a_file_gives_values_and_the_command_line_comes_first(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("data: some/data\nlr: 2e-3\nsteps: 50\ncompile: true\ntokens_per_step: null\nresume: auto\n")
    options = cli().Train.parse(["--config", str(file), "--out", "some/out", "--steps", "60", "--no-compile"])
    assert options == cli().Train(
        data=Path("some/data"), out=Path("some/out"), lr=2e-3, steps=60, resume="auto", config=file
    )  # fmt: skip
    assert cli().Train.parse([f"--config={file}", "--out", "x", "--data", "y"]).data == Path("y")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("stepz: 3", r"run\.yaml: stepz is not an option; accepted are model, preset, context"),
        ("steps: many", r"run\.yaml: steps: got 'many'; accepted is int"),
        ("steps: 1.5", r"steps: got 1\.5; accepted is int"),
        ("steps: true", r"steps: got True; accepted is int"),
        ("lr: fast", r"lr: got 'fast'; accepted is float"),
        ("context: [1]", r"context: got \[1\]; accepted is int or null"),
        ("dtype: fp64", r"dtype: got 'fp64'; accepted are auto, fp32, bf16"),
        ("steps: 0", r"steps: got 0; accepted are positive integers"),
        ("- 3", r"run\.yaml holds \[3\]; accepted are lines of the form"),
        ("a: [", r"run\.yaml is not YAML"),
    ],
)
def test_a_bad_file_is_one_line(capsys, tmp_path: Path, monkeypatch, text: str, match: str):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    status, _, error = gptcore(capsys, "train", "--config", "run.yaml", "--data", "x", "--out", "y")
    assert status == 2
    assert re.search(match, error)
    assert error.count("\n") == 1


def test_a_home_folder_in_a_file(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data: ~/data\nout: ~/runs/one\n")
    options = cli().Train.parse(["--config", "~/run.yaml"])
    assert (options.data, options.out) == (tmp_path / "data", tmp_path / "runs/one")
    assert cli().Train.parse(["--data=~/data", "--out", "x"]).data == tmp_path / "data"
    assert cli().Train.parse(["--config=~/run.yaml", "--out=~/runs/two"]).out == tmp_path / "runs/two"


def test_a_missing_file_and_missing_options(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = gptcore(capsys, "train", "--config", "nowhere.yaml", "--data", "x", "--out", "y")
    assert (status, error) == (2, "gptcore: error: config: there is no file nowhere.yaml\n")
    Path("run.yaml").write_text("data: x")
    status, out, error = gptcore(capsys, "train", "--config", "run.yaml")
    assert status == 2
    assert "--out" in out + error


def test_a_run_leaves_the_file_that_repeats_it(corpus: Path, tmp_path: Path):
    made = config(corpus, tmp_path / "run", steps=2, eval_interval=2)
    train(made, progress=False)
    values = TrainConfig.read(tmp_path / "run" / "config.yaml")
    assert TrainConfig(**values) == made
    assert not {"resume", "overwrite"} & set(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    train(TrainConfig(**values | {"out": tmp_path / "again"}), progress=False)
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()


def test_a_task_takes_its_models_alone(corpus: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="task: got masked_lm for a gpt; it accepts the models bert"):
        config(corpus, tmp_path, task="masked_lm", model="gpt")
    with pytest.raises(ValueError, match="task: got 'chess'; accepted are language_model, masked_lm"):
        config(corpus, tmp_path, task="chess")
    with pytest.raises(ValueError, match="model: got 'gru'; accepted are gpt, bert"):
        config(corpus, tmp_path, model="gru")
    assert TrainConfig.of(data=corpus, out=tmp_path, model="bert").task.name == "masked_lm"


def test_tokens_per_step_is_a_number_of_batches(corpus: Path, tmp_path: Path):
    made = config(corpus, tmp_path / "tokens", steps=3, tokens_per_step=96)  # batches of 2 x 16 tokens
    assert made.batches() == 3
    train(made, progress=False)
    train(config(corpus, tmp_path / "batches", steps=3, accumulate=3), progress=False)
    assert records(tmp_path / "tokens", "loss") == records(tmp_path / "batches", "loss")
    assert records(tmp_path / "tokens", "tokens") == [96, 192, 288]
    with pytest.raises(
        ValueError, match=r"got 100; accepted are multiples of a batch's 32 tokens \(batch_size 2 times"
    ):
        config(corpus, tmp_path, tokens_per_step=100)
    with pytest.raises(ValueError, match=r"tokens_per_step: got \d+ with accumulate 2; accepted is one of the two"):
        config(corpus, tmp_path, tokens_per_step=64, accumulate=2)


def test_rows_of_a_batch():
    assert [World(rank, 2).rows(6) for rank in range(2)] == [slice(0, 3), slice(3, 6)]
    with pytest.raises(ValueError, match=r"batch_size: got 6; accepted are multiples of the 4 processes"):
        World(0, 4).rows(6)


def test_utilisation():
    """GPT-2 124M at 400,000 tokens/s on an H100: 6 N + 6 L C T = 0.80 GFLOP a token, of 989.4 TFLOP/s."""
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2-124m"))
    parameters = model.num_parameters() - 1024 * 768  # without the positions
    flops = 6 * parameters + 6 * 12 * 768 * 1024  # a token
    assert model.flops((3, 1024)) == 3 * 1024 * flops
    peak = listed_peak("NVIDIA H100 80GB HBM3", torch.bfloat16)
    assert model_flops_utilization(4e5 * flops, peak) == pytest.approx(4e5 * flops / 989.4e12)
    assert model_flops_utilization(4e5 * flops, peak) == pytest.approx(0.324, abs=0.002)


def test_peaks(monkeypatch):
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert listed_peak("NVIDIA H100 PCIe", torch.float32) == 51.2e12
    assert listed_peak("NVIDIA L40S", torch.bfloat16) == 362e12
    assert listed_peak("Some GPU", torch.bfloat16) is None
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert 1e6 < measured_peak(torch.device("cpu"), torch.float32, 256) < 1e15
    assert torch.equal(torch.get_rng_state(), state)
    peak, said = peak_flops(torch.device("cpu"), torch.float32)
    assert said == f"{peak / 1e9:,.0f} fp32 GFLOP/s, measured with one matrix product"


def test_timings_are_apart_from_what_is_repeatable(corpus: Path, tmp_path: Path):
    result = train(config(corpus, tmp_path / "run", steps=3), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {key for line in lines for key in line} == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "val_loss",
        "val_loss_full",
    }
    timings = [json.loads(line) for line in (tmp_path / "run" / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == [1, 2, 3]
    for line in timings:
        assert line["tokens_per_second"] == pytest.approx(32 / line["seconds"])
    assert result.tokens_per_second == sorted(line["tokens_per_second"] for line in timings)[1]
    assert result.mfu == sorted(line["mfu"] for line in timings)[1]


def test_activations_computed_again_change_nothing(corpus: Path, tmp_path: Path):
    for name, again in (("kept", False), ("again", True)):
        train(config(corpus, tmp_path / name, dropout=0.2, checkpoint_activations=again), progress=False)
    assert (tmp_path / "kept/metrics.jsonl").read_bytes() == (tmp_path / "again/metrics.jsonl").read_bytes()


def test_activations_are_computed_again():
    """Less is kept between forward and backward: the sizes that autograd saves say so."""

    def saved(again: bool) -> int:
        torch.manual_seed(0)
        model = GPT(GPTConfig.preset("tiny", vocab_size=50, kernels="reference"))
        if again:
            checkpoint_activations(model)
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        tokens = torch.zeros(2, 64, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(tokens, tokens)
        return total

    assert saved(True) < saved(False) / 3


def test_the_search_for_a_learning_rate(corpus: Path, tmp_path: Path, capsys):
    made = config(corpus, tmp_path / "run", batch_size=8)
    sweep = find_lr(made, progress=False)
    assert 1e-5 < sweep.suggestion < 3e-2
    assert sweep.lrs[0] == pytest.approx(1e-6)
    factors = torch.tensor(sweep.lrs[1:]) / torch.tensor(sweep.lrs[:-1])
    torch.testing.assert_close(factors, torch.full_like(factors, 10 ** (6 / 99)))
    assert sweep.suggestion == sweep.lrs[sweep.losses.index(min(sweep.losses))] / 10
    assert min(sweep.losses) < sweep.losses[0] - 0.5
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lr.png"]
    size = "--preset tiny --context 16 --kernels reference --dtype fp32 --steps 2 --eval-interval 2 --warmup 1"
    common = ("train", "--data", corpus, "--out", tmp_path / "run", "--sample-tokens", 0, *size.split())
    status, shown, _ = gptcore(capsys, *common, "--find-lr", "--batch-size", 8, "--seed", 1337)
    assert status == 0
    assert f"suggestion: --lr {sweep.suggestion:.1e}" in shown
    assert gptcore(capsys, *common)[0] == 0  # the folder is still free for a run
    before = contents(tmp_path / "run")
    assert gptcore(capsys, *common, "--find-lr")[0] == 0
    after = contents(tmp_path / "run")
    assert {name for name in after if after[name] != before[name]} <= {"lr.png"}


def test_smoothing_starts_without_a_pull():
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([1.0, 2.0]) == pytest.approx([1.0, (0.09 + 0.2) / 0.19])


def test_a_curve_in_text():
    # Dots fall from the upper left to the lower right: rows 0, 2, 5 and 7 of 8, in columns 0 to 3.
    assert chart([4.0, 3.0, 2.0, 1.0], 11, 2) == ["   4.000 \u2821\u2800", "   1.000 \u2800\u2882"]
    flat = chart([1.0, math.nan], 20, 3)
    assert len(flat) == 3
    assert len({len(line) for line in chart(list(range(1000)), 40, 5)}) == 1


AS_IT_IS = "a [bold]list[/bold] :end: $$x_1$$ [0]"  # markup, an emoji's code and mathematics to others


def shown(terminal: bool, **sizes) -> str:
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, highlight=False)
    with Display(True, 40, console=console) as display:
        for step in range(1, 41):
            display.step(step, 5 - step / 10, 60.0 if step == 1 else 0.5, 1234.0, 0.25)  # the first one compiles
        display.evaluated(40, {"loss": 1.5, "accuracy": 0.25})
        display.sampled(AS_IT_IS)
    return out.getvalue()


def test_lines_where_there_is_no_terminal():
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "step 2/40: loss 4.800, 1,234 tokens/s, MFU 25%, 0:19 left"
    assert len(lines) == 20 + 2
    assert lines[-2:] == ["step 40: validation loss 1.500, accuracy 25.0%", f"  {AS_IT_IS}"]
    assert "\x1b" not in "".join(lines)


def test_a_live_view_in_a_terminal():
    said = shown(terminal=True)
    assert "\x1b[" in said
    assert "40/40" in said
    assert "loss 1.000, 1,234 tokens/s, MFU 25%" in said
    assert "4.900" in said  # the curve's highest point
    assert AS_IT_IS in said
    assert "step 2/40" not in said


def test_tensorboard(corpus: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard.* is not installed; pip install 'gptcore\[monitor\]'"):
        train(config(corpus, tmp_path / "run", tensorboard=True), progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config(corpus, tmp_path / "run", tensorboard=True), progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(records(tmp_path / "run", "loss"))
    assert {"val_loss", "tokens_per_second", "mfu"} <= set(events.Tags()["scalars"])


def test_the_data_of_the_options_is_documented():
    """Every option says what it is in the help, which tyro takes from the line under it."""
    source = Path(sys.modules[TrainConfig.__module__].__file__).read_text()
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf'^    {field.name}: .*\n    """.+"""$', source, re.MULTILINE), field.name
