"""Checkpoints: killed runs end as if never stopped, damage is named, and nothing is lost before its successor is whole."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcore import GPT
from gptcore.train import train
from gptcore.train.checkpoint import checkpoints
from gptcore.weights import WeightsError
from tests.gptcore.runs import config, contents, records, same_end


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory) -> Path:
    """A run of 12 steps with checkpoints after 4, 8 and 12, all kept."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config(corpus, out, steps=12, keep=3, dropout=0.1), progress=False)
    return out


@pytest.fixture
def part(whole: Path, tmp_path: Path) -> Path:
    """That run as it was after 8 steps."""
    out = tmp_path / "part"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints/step-00000012")
    return out


def go_on(corpus: Path, out: Path, **changes):
    settings = {"steps": 12, "keep": 3, "dropout": 0.1, "resume": "always"} | changes
    progress = settings.pop("progress", False)
    return train(config(corpus, out, **settings), progress=progress)


@pytest.mark.slow
def test_ten_kills(corpus: Path, tmp_path: Path):
    """SIGKILL at random moments and inside the writing of checkpoints: the end is the same, byte for byte."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gptcore.killed_runs", str(corpus), str(tmp_path), "1", "10"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n10 kills\n"), done.stdout
    same_end(tmp_path / "whole", tmp_path / "killed", "step-00000036")
    assert len(records(tmp_path / "killed", "loss")) == 36
    assert records(tmp_path / "killed", "step", "timings.jsonl") == list(range(1, 37))
    found = [sorted(p.name for p in (tmp_path / n).rglob("*") if p.name != "state.json") for n in ("whole", "killed")]
    assert found[0] == found[1]  # nothing temporary is left


def test_a_checkpoint_is_a_model_and_out_is_the_latest(whole: Path):
    folders = checkpoints(whole)
    assert [p.name for p in folders] == ["step-00000012", "step-00000008", "step-00000004"]
    latest = GPT.from_pretrained(whole).state_dict()
    for folder in folders:
        state = GPT.from_pretrained(folder).state_dict()
        assert all(torch.equal(state[name], latest[name]) for name in state) == (folder is folders[0])
    assert json.loads((folders[0] / "state.json").read_text())["position"]["tokens"] == 12 * 2 * 16


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def make_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0] * 100}, protocol=4))


def make_zip(path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, path)


def rename_to_pt(path: Path) -> None:
    path.rename(path.with_suffix(".pt"))


@pytest.mark.parametrize(
    ("file", "damage", "match"),
    [
        ("model.safetensors", cut, r"model\.safetensors: is damaged: it has \d+ bytes of \d+"),
        ("optimizer.safetensors", Path.unlink, r"optimizer\.safetensors: there is no such file"),
        ("random.safetensors", cut, r"random\.safetensors: is damaged"),
        ("state.json", cut, r"state\.json: is damaged or no checkpoint"),
        ("state.json", Path.unlink, r"state\.json: there is no such file"),
        ("config.json", Path.unlink, r"config\.json: there is no such file"),
        ("optimizer.safetensors", make_pickle, r"optimizer\.safetensors: is a pickle, which can run code"),
        ("model.safetensors", make_zip, r"model\.safetensors: is a pickle, which can run code"),
        ("model.safetensors", rename_to_pt, r"model\.safetensors: there is no such file; model\.pt is a pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\\" not in value else getattr(value, "__name__", ""),
)
def test_a_damaged_newest_checkpoint(corpus: Path, part: Path, file: str, damage, match: str):
    damage(part / "checkpoints/step-00000008" / file)
    before = contents(part)
    with pytest.raises(WeightsError, match=rf"step-00000008/{match}.*--resume auto goes on"):
        go_on(corpus, part)
    assert contents(part) == before


def test_auto_falls_back_with_a_warning_and_ends_the_same(corpus: Path, whole: Path, part: Path, capsys):
    cut(part / "checkpoints/step-00000008/optimizer.safetensors")
    go_on(corpus, part, resume="auto", progress=True)
    shown = capsys.readouterr().out
    assert "warning: " in shown
    assert "step-00000008/optimizer.safetensors: is damaged" in shown
    assert "going on after step 4" in shown
    same_end(whole, part, "step-00000012")
    same_end(whole, part, "step-00000008")  # written anew, in place of the damaged one


def test_auto_with_nothing_whole_left(corpus: Path, part: Path):
    for folder in checkpoints(part):
        cut(folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"step-00000008/model\.safetensors: is damaged"):
        go_on(corpus, part, resume="auto")


def rewrite(folder: Path, file: str, change) -> None:
    """A file with other tensors, whole as far as sizes go."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    state = json.loads((folder / "state.json").read_text())
    state["files"][file] = (folder / file).stat().st_size
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("model.safetensors", lambda t: t.pop("wpe.weight"), r"wpe\.weight is missing \(1 of"),
        ("model.safetensors", lambda t: t.update(x=torch.ones(1)), r"x belongs to no GPT"),
        ("model.safetensors", lambda t: t.update({"ln_f.bias": torch.ones(3)}), r"ln_f\.bias has shape \(3,\)"),
        ("optimizer.safetensors", lambda t: t.pop("exp_avg.wpe.weight"), r"exp_avg\.wpe\.weight is missing"),
        ("optimizer.safetensors", lambda t: t.update({"exp_avg.x": torch.ones(1)}), r"exp_avg\.x belongs to no param"),
        (
            "optimizer.safetensors",
            lambda t: t.update({"exp_avg.ln_f.bias": torch.ones(3)}),
            r"exp_avg\.ln_f\.bias has shape \(3,\); accepted is \(64,\)",
        ),
        ("random.safetensors", lambda t: t.pop("data"), r"random\.safetensors: data is missing"),
    ],
)
def test_tensors_that_do_not_fit(corpus: Path, part: Path, file: str, change, match: str):
    rewrite(part / "checkpoints/step-00000008", file, change)
    before = contents(part)
    with pytest.raises(WeightsError, match=match):
        go_on(corpus, part)
    assert contents(part) == before


def test_another_configuration_is_refused_by_name(corpus: Path, part: Path):
    for changes, match in (
        ({"dropout": 0.2}, r"dropout: got 0\.2; accepted when resuming is the run's, 0\.1"),
        ({"accumulate": 2}, r"batches of a step: got 2; accepted when resuming is the run's, 1"),
        ({"seed": 2}, r"seed: got 2; accepted when resuming is the run's, 1337"),
    ):
        for resume in ("auto", "always"):
            with pytest.raises(ValueError, match=match):
                go_on(corpus, part, resume=resume, **changes)
    go_on(corpus, part, tokens_per_step=32)  # says the same in other words


def fail_on_disk(error: int, at: int):
    calls = 0
    fsync = os.fsync

    def fails(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    return fails


@pytest.mark.parametrize("at", [3, 5, 8])
def test_a_full_disk_keeps_what_was_there(corpus: Path, whole: Path, part: Path, monkeypatch, at: int):
    before = contents(part / "checkpoints")
    model = (part / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("gptcore.train.loop._Run._save", with_full_disk(patch, at))
        with pytest.raises(OSError, match=r"checkpoint of step 12 could not be written .*No space left on device"):
            go_on(corpus, part)
    assert contents(part / "checkpoints") == before
    assert list(part.rglob("*.tmp")) == []
    assert (part / "model.safetensors").read_bytes() != model  # out holds step 8's, which it went on from
    go_on(corpus, part)
    same_end(whole, part, "step-00000012")


def with_full_disk(patch, at: int):
    """`_Run._save` on a disk that is full from its `at`-th file on."""
    from gptcore.train.loop import _Run

    save = _Run._save

    def instead(self) -> None:
        patch.setattr(os, "fsync", fail_on_disk(errno.ENOSPC, at))
        save(self)

    return instead


def test_a_file_that_cannot_grow(corpus: Path, part: Path):
    """The operating system itself refuses: the model no longer fits under the limit on a file's size."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = contents(part / "checkpoints")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 12 could not be written .*File too large"):
            go_on(corpus, part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(part / "checkpoints") == before


def test_the_last_ones_and_the_best_are_kept(corpus: Path, tmp_path: Path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 5.0])
    monkeypatch.setattr("gptcore.train.step.evaluate", lambda state, limit: {"loss": next(losses)})
    train(config(corpus, tmp_path / "run", steps=5, eval_interval=1, keep=2), progress=False)
    steps = [int(p.name[5:]) for p in checkpoints(tmp_path / "run")]
    assert steps == [5, 4, 2]
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 5.0])
    train(config(corpus, tmp_path / "other", steps=5, eval_interval=1, keep=1, keep_best=False), progress=False)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "other")] == [5]


@pytest.mark.parametrize("place", ["gptcore.train.step.evaluate", "gptcore.train.loop.record_evaluation"])
def test_a_step_is_saved_before_it_is_evaluated(corpus: Path, whole: Path, part: Path, monkeypatch, place: str):
    """Whatever an evaluation meets, its step is there, and going on evaluates it."""

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(place, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            go_on(corpus, part)
    assert [p.name for p in checkpoints(part)] == [p.name for p in checkpoints(whole)]
    go_on(corpus, part)
    same_end(whole, part, "step-00000012")


def test_a_checkpoint_of_the_first_format_goes_on(corpus: Path, whole: Path, part: Path):
    """It knows no data, and its losses were measured otherwise: they are measured anew."""
    path = part / "checkpoints/step-00000008/state.json"
    state = json.loads(path.read_text()) | {"format": 1}
    del state["data_digest"]
    for name in ("evaluated", "val_loss_full"):
        del state["position"][name]
    state["position"] |= {"best_step": 4, "best_val_loss": 0.1}
    path.write_text(json.dumps(state))
    go_on(corpus, part)
    same_end(whole, part, "step-00000012")


def test_a_torn_last_line(corpus: Path, whole: Path, part: Path):
    with (part / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    go_on(corpus, part)
    same_end(whole, part, "step-00000012")


def test_auto_starts_goes_on_and_ends(corpus: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    result = go_on(corpus, out, resume="auto")
    assert result.steps == 12
    same_end(whole, out, "step-00000012")
    before = contents(out)
    again = go_on(corpus, out, resume="auto")
    assert (again.steps, again.val_loss, again.interrupted) == (12, result.val_loss, False)
    assert contents(out) == before
    assert go_on(corpus, out, resume="auto", steps=16).steps == 16


def test_a_run_killed_before_its_first_checkpoint_starts_again(corpus: Path, whole: Path, part: Path):
    shutil.rmtree(part / "checkpoints")
    with pytest.raises(WeightsError, match="holds no checkpoint; nothing to resume"):
        go_on(corpus, part)
    go_on(corpus, part, resume="auto")
    same_end(whole, part, "step-00000012")


def test_sigterm_finishes_the_step_and_saves(corpus: Path, whole: Path, tmp_path: Path, monkeypatch):
    from gptcore.train import step

    gradients, calls = step.gradients, 0

    def terminated(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "gradients", terminated)
        result = go_on(corpus, tmp_path / "run", resume="never")
    assert result.interrupted
    assert result.steps == 6
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    go_on(corpus, tmp_path / "run")
    same_end(whole, tmp_path / "run", "step-00000012")
