"""Two processes train what one trains: DistributedDataParallel and FSDP2 over gloo, checkpoints at any number of processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptcore import GPT
from gptcore.models import BERT
from gptcore.train import train
from gptcore.train.checkpoint import newest
from tests.gptcore.runs import assistant, config, contents, make_assistant, make_words, records

pytestmark = pytest.mark.slow
RUN = {"batch_size": 4, "accumulate": 2}
STEPS = [f"step-{step:08d}" for step in (4, 8)]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory) -> Path:
    """The runs of `several_trainings.py`, and ``one``: the same in this process."""
    folder = tmp_path_factory.mktemp("runs")
    train(config(corpus, folder / "one", **RUN), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcore.train.optimizers.multiplies_bf16", lambda device: False)
        train(config(corpus, folder / "muon-one", optimizer="muon", **RUN), progress=False)
    words = make_words(tmp_path_factory.mktemp("words"))
    train(config(words, folder / "bert-one", model="bert", **RUN), progress=False)
    make_assistant(folder)
    train(assistant(folder, "assistant-one"), progress=False)
    shutil.copytree(folder / "one", folder / "one-then-two")
    shutil.rmtree(folder / "one-then-two" / "checkpoints" / STEPS[1])
    (folder / "said").write_text(torchrun("-m", "tests.gptcore.several_trainings", *map(str, (corpus, words, folder))))
    return folder


def torchrun(*arguments: str) -> str:
    """What two processes said on the standard output; both must have ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def curves_agree(runs: Path, name: str, one: str = "one") -> None:
    for key in ("loss", "grad_norm", "val_loss", "val_loss_full"):
        ours, alone = (torch.tensor(records(runs / n, key)) for n in (name, one))
        assert len(ours) == {"loss": 8, "grad_norm": 8, "val_loss": 2, "val_loss_full": 1}[key]
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "checkpointed", "one-then-two"])
def test_two_processes_have_the_curve_of_one(runs: Path, name: str):
    curves_agree(runs, name)
    ours, alone = (GPT.from_pretrained(runs / n).state_dict() for n in (name, "one"))
    for key, tensor in ours.items():  # Adam's first steps are as large for rounding as for gradients
        torch.testing.assert_close(tensor, alone[key], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["muon-ddp", "muon-fsdp"])
def test_muon_has_the_curve_of_one_process(runs: Path, name: str):
    """Of sharded matrices every process computes the whole step."""
    curves_agree(runs, name, "muon-one")


@pytest.mark.parametrize("name", ["bert-ddp", "bert-fsdp"])
def test_masked_words_have_the_curve_of_one_process(runs: Path, name: str):
    """Both processes draw the same masks, and each learns from those in its rows; their numbers differ."""
    curves_agree(runs, name, "bert-one")
    ours, alone = (BERT.from_pretrained(runs / n).state_dict() for n in (name, "bert-one"))
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, alone[key], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["assistant-ddp", "assistant-fsdp"])
def test_fine_tuning_has_the_curve_of_one_process(runs: Path, name: str):
    """The rows of one process are longer than those of the other; and the base is evaluated before the first step."""
    curves_agree(runs, name, "assistant-one")
    ours, alone = (GPT.from_pretrained(runs / n).state_dict() for n in (name, "assistant-one"))
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, alone[key], rtol=0, atol=2e-3)


def test_a_sharded_checkpoint_goes_on_in_one_process(runs: Path, corpus: Path, tmp_path: Path):
    shutil.copytree(runs / "fsdp", runs / "two-then-one")
    shutil.rmtree(runs / "two-then-one" / "checkpoints" / STEPS[1])
    assert (runs / "two-then-one" / "checkpoints" / STEPS[0] / "optimizer").is_dir()
    train(config(corpus, runs / "two-then-one", resume="always", **RUN), progress=False)
    curves_agree(runs, "two-then-one")


@pytest.mark.parametrize("name", ["ddp-dropout", "fsdp-dropout"])
def test_resuming_with_as_many_processes_is_exact(runs: Path, name: str):
    """Dropout included: each process goes on with its own random numbers."""
    assert (runs / name / "metrics.jsonl").read_bytes() == (runs / f"{name}-again" / "metrics.jsonl").read_bytes()
    first, second = (runs / n / "checkpoints" / STEPS[1] for n in (name, f"{name}-again"))
    assert set(contents(first)) == set(contents(second))
    for path in first.rglob("*.safetensors"):  # the tensors, not the files: the shards' headers have no fixed order
        ours, theirs = load_file(path), load_file(second / path.relative_to(first))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), path


def test_processes_drop_different_activations(runs: Path):
    random = load_file(runs / "ddp-dropout" / "checkpoints" / STEPS[1] / "random.safetensors")
    assert not torch.equal(random["cpu.0"], random["cpu.1"])


def test_the_command_under_torchrun(corpus: Path, tmp_path: Path):
    """Joins the processes, trains and samples from shards, lets go of the processes and ends with status 0."""
    options = (
        "--preset tiny --context 16 --batch-size 4 --steps 2 --eval-interval 1 --sample-tokens 3 --kernels reference"
    )
    command = f"-m gptcore train --data {corpus} --out {tmp_path}/run --parallel fsdp {options}"
    said = torchrun(*command.split())
    assert said.count("validation loss") == 3  # of two evaluations and the end: one process alone prints
    assert "2 processes, fsdp" in said
    assert newest(tmp_path / "run", fall_back=False).progress.step == 2


def test_what_one_process_meets_stops_all(runs: Path):
    said = (runs / "said").read_text().splitlines()
    for rank in range(2):
        assert f"{rank}: batch_size: got 3; accepted are multiples of the 2 processes" in said
        assert f"{rank}: stopped 3" in said  # the signal came to the second alone
        assert any(line.startswith(f"{rank}: step 3: the loss is nan") for line in said)
        assert f"{rank}: done" in said
        held = (f"{runs}/held is in use by process ", f"the first process could not lock {runs}/held")[rank]
        assert any(line.startswith(f"{rank}: out: {held}") for line in said)
        full = [line for line in said if line.startswith(f"{rank}: the checkpoint of step 4 could not be written")]
        assert len(full) == 1
        assert "process 1: " in full[0]
        assert "File too large" in full[0]
    assert list((runs / "full").rglob("*.tmp")) == []
    assert newest(runs / "full", fall_back=False) is None
    assert newest(runs / "stopped", fall_back=False).progress.step == 3
    assert newest(runs / "nan", fall_back=False) is None


def test_shards_need_processes(corpus: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"parallel: got 'fsdp' in a process started alone; accepted is auto, or torchrun"
    ):
        train(config(corpus, tmp_path / "run", parallel="fsdp"), progress=False)
    assert not (tmp_path / "run").exists()
