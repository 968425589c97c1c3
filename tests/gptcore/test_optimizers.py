"""Muon: PyTorch's own within rounding, AdamW beside it, resumed and chosen by the command line's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from gptcore import GPT, GPTConfig
from gptcore.train import train
from gptcore.train.optimizers import Muon, initialise_state, make_optimizer, orthogonalised
from tests.gptcore.runs import config, records

pytestmark = pytest.mark.usefixtures("no_peak")


def steps(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
def test_muon_is_pytorchs_within_its_rounding(shape: tuple[int, int]):
    """In bfloat16 to the bit; in float32 nearer to the exact iteration than PyTorch's is."""
    torch.manual_seed(0)
    start = torch.randn(shape)

    def ours(dtype: torch.dtype, start: torch.Tensor) -> torch.Tensor:
        parameter = torch.nn.Parameter(start.clone())
        return steps(
            Muon([{"params": [parameter], "weight_decay": 0.1, "muon": True}], lr=0.02, dtype=dtype), parameter
        )

    theirs = torch.nn.Parameter(start.clone())
    wanted = steps(torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True), theirs)
    assert torch.equal(ours(torch.bfloat16, start), wanted)
    exact = ours(torch.float64, start)
    rounding = (wanted - exact).abs().max()
    assert 0 < (ours(torch.float32, start) - exact).abs().max() < rounding / 100


def test_other_parameters_get_adamws_steps():
    torch.manual_seed(0)
    start = torch.randn(7, 3)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    found = steps(Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.01), ours)
    wanted = steps(torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1), theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_singular_values_come_to_about_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(40, 12), torch.float32))
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    assert torch.equal(orthogonalised(torch.zeros(3, 2), torch.float32), torch.zeros(3, 2))


def test_muon_takes_the_blocks_matrices_alone(corpus: Path, tmp_path: Path):
    model = GPT(GPTConfig.preset("tiny", vocab_size=50))
    made = make_optimizer(model, config(corpus, tmp_path, optimizer="muon"), torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden, matrices, vectors = ([names[id(p)] for p in group["params"]] for group in made.param_groups)
    assert len(hidden) == 2 * 4
    assert all(name.startswith("h.") and name.endswith("weight") and "ln_" not in name for name in hidden)
    assert sorted(matrices) == ["wpe.weight", "wte.weight"]
    assert len(vectors) == len(names) - 10
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.1, 0.0]
    with pytest.raises(ValueError, match=r"groups: got a parameter of shape \(3,\) for Muon; accepted are matrices"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))], "weight_decay": 0.0, "muon": True}], lr=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_making_the_state_changes_no_weight(corpus: Path, tmp_path: Path, optimizer: str):
    model = GPT(GPTConfig.preset("tiny", vocab_size=50))
    model.wpe.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = make_optimizer(model, config(corpus, tmp_path, optimizer=optimizer), torch.device("cpu"))
    rates = [group["lr"] for group in made.param_groups]
    initialise_state(made)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [group["lr"] for group in made.param_groups] == rates
    assert {id(p) for p in made.state} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_muon_run_resumes_bit_for_bit(corpus: Path, tmp_path: Path):
    options = {"optimizer": "muon", "schedule": "linear", "dropout": 0.1}
    for name in ("whole", "part"):
        train(config(corpus, tmp_path / name, **options), progress=False)
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000008")
    train(config(corpus, tmp_path / "part", resume="always", **options), progress=False)
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(records(tmp_path / "part", "loss")) == 8
    with pytest.raises(ValueError, match=r"optimizer: got 'adamw'; accepted when resuming is the run's, 'muon'"):
        train(config(corpus, tmp_path / "part", resume="always", steps=9, dropout=0.1), progress=False)


def test_the_linear_schedule_stays_and_falls_over_the_last_half(corpus: Path, tmp_path: Path):
    made = config(corpus, tmp_path, steps=100, warmup=10, lr=1.0, min_lr=0.05, schedule="linear")
    assert made.lr_at(4) == pytest.approx(0.5)
    assert [made.lr_at(step) for step in (10, 30, 50)] == [1.0, 1.0, 1.0]
    assert made.lr_at(99) == pytest.approx(0.05)
    assert made.lr_at(74) + made.lr_at(75) == pytest.approx(1.05, abs=0.03)
    assert made.lr_at(60) > made.lr_at(61)
