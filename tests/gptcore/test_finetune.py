"""Fine-tuning runs: they begin with a base, train what was chosen, and leave the rest as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptcore.models import GPT, GPTConfig
from gptcore.nn import merge_lora
from gptcore.tasks.epochs import Epochs
from gptcore.text import Tokenizer, get_tokenizer
from gptcore.train import FinetuneConfig, train
from gptcore.weights import WeightsError
from tests.gptcore.runs import config, contents, records, same_end

pytestmark = pytest.mark.usefixtures("no_peak")


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory) -> Path:
    """A tiny GPT that is not trained, with the corpus's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = get_tokenizer(corpus)
    torch.manual_seed(0)
    GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, context=32)).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


def tuned(corpus: Path, base: Path, out: Path, **changes) -> FinetuneConfig:
    small = {
        "context": 16,
        "batch_size": 2,
        "steps": 6,
        "warmup": 2,
        "lr": 1e-2,
        "eval_interval": 3,
        "eval_windows": 2,
        "sample_tokens": 0,
        "dtype": "fp32",
        "kernels": "reference",
    }
    return FinetuneConfig.of(data=corpus, out=out, model=str(base), **(small | changes))


def test_lora_writes_adapters_alone_and_lowers_the_loss(corpus: Path, base: Path, tmp_path: Path):
    before = contents(base)
    result = train(tuned(corpus, base, tmp_path / "run", steps=30, eval_interval=30), progress=False)
    assert contents(base) == before
    losses = records(tmp_path / "run", "loss")
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    described = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base)
    # The run's folder stands for base and adapters together: it loads, and has the loss that the run measured.
    model, text = GPT.from_pretrained(tmp_path / "run", kernels="reference"), get_tokenizer(tmp_path / "run")
    assert text.fingerprint == get_tokenizer(base).fingerprint
    from gptcore.tasks import LanguageModel, LanguageModelOptions

    task = LanguageModel(LanguageModelOptions(), corpus, 16)
    sums = [task.loss(model, batch) for batch in task.evaluation(8, None)]
    loss = sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)
    assert loss == pytest.approx(result.val_loss_full, rel=1e-5)


@pytest.mark.parametrize(("trained", "changed"), [("last-block", ("h.1.", "ln_f.")), ("all", ("",))])
def test_only_what_is_chosen_is_trained(corpus: Path, base: Path, tmp_path: Path, trained: str, changed: tuple):
    train(tuned(corpus, base, tmp_path / "run", trained=trained), progress=False)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    different = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.startswith(changed)}
    if trained == "all":
        expected -= {"wpe.weight"} - different  # rows beyond the context never come
    assert different == expected


def test_a_frozen_run_counts_fewer_operations(corpus: Path, base: Path, tmp_path: Path):
    from gptcore.train.parallel import ALONE
    from gptcore.train.state import TrainState

    shares = {
        kind: TrainState(tuned(corpus, base, tmp_path, trained=kind), ALONE, torch.device("cpu")).flops((1, 16))
        for kind in ("all", "lora", "last-block")
    }
    everything = GPT.from_pretrained(base).flops((1, 16))
    assert shares["all"] == everything
    # LoRA: forward and the gradients of inputs, two thirds, and little more for its own weights, which also count.
    assert 2 / 3 < shares["lora"] / everything < 1
    # The last of two blocks: forward, the gradients of half of the blocks' inputs, and those of its own weights.
    total, block = GPT.from_pretrained(base).num_parameters(), 49984 + 128
    assert shares["last-block"] / everything == pytest.approx((1 + 1 / 2 + block / total) / 3)


def test_epochs_decide_the_steps(corpus: Path, base: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="steps: got 0; accepted for the task language_model are 1 and more"):
        train(tuned(corpus, base, tmp_path / "run", steps=0), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"context": 33}, "context: got 33; accepted are up to the base's, 32"),
        ({"trained": "head"}, "trained: got 'head' for the task language_model, whose model has none"),
        ({"steps": -1}, "steps: got -1"),
        ({"epochs": 0.0}, "epochs: got 0.0"),
        ({"lora_rank": 0}, "lora_rank: got 0"),
        ({"model": "./nowhere"}, "there is no such folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_write_nothing(corpus: Path, base: Path, tmp_path: Path, changes: dict, match: str):
    with pytest.raises((ValueError, OSError), match=match):
        train(tuned(corpus, changes.pop("model", base), tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run").exists()


def test_text_must_have_the_tokenizer_of_the_base(corpus: Path, base: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for name, content in contents(base).items():
        (other / name).write_bytes(content)
    Tokenizer.train(["something else entirely, " * 50], vocab_size=280).save(other / "tokenizer.json")
    with pytest.raises(ValueError, match=r"data: .* was prepared with the tokenizer .*; accepted is the base's"):
        train(tuned(corpus, other, tmp_path / "run"), progress=False)


def test_another_base_does_not_resume(corpus: Path, base: Path, tmp_path: Path):
    train(tuned(corpus, base, tmp_path / "run"), progress=False)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name, content in contents(base).items():
        (moved / name).write_bytes(content)
    more = {"steps": 8, "resume": "always"}
    train(tuned(corpus, moved, tmp_path / "run", **more), progress=False)  # the same weights in another place
    torch.manual_seed(1)
    GPT(GPT.from_pretrained(base).config).save_pretrained(moved)
    with pytest.raises(ValueError, match=r"model: the base .* has other weights than the one that the run in"):
        train(tuned(corpus, moved, tmp_path / "run", **(more | {"steps": 10})), progress=False)


def test_a_run_goes_on_in_another_dtype(corpus: Path, base: Path, tmp_path: Path):
    """The frozen base is then held in it too, and is still the same base."""
    train(tuned(corpus, base, tmp_path / "run"), progress=False)
    more = train(tuned(corpus, base, tmp_path / "run", steps=8, dtype="bf16", resume="always"), progress=False)
    assert more.steps == 8


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_a_lora_run_is_a_base_with_its_adapters_merged(corpus: Path, base: Path, tmp_path: Path, trained: str):
    train(tuned(corpus, base, tmp_path / "first"), progress=False)
    merged = merge(GPT.from_pretrained(tmp_path / "first"))
    train(tuned(corpus, tmp_path / "first", tmp_path / "second", trained=trained), progress=False)
    second = GPT.from_pretrained(tmp_path / "second")
    if trained == "lora":  # the frozen weights are the first run's
        same = {name: weight for name, weight in second.state_dict().items() if ".lora_" not in name}
        assert same.keys() == merged.keys()
        assert all(torch.equal(same[name], merged[name]) for name in same)
        assert any(weight.any() for name, weight in second.state_dict().items() if name.endswith("lora_B"))
    else:
        changed = [name for name, weight in second.state_dict().items() if not torch.equal(weight, merged[name])]
        assert {"wte.weight", "h.0.attn.c_attn.weight", "ln_f.bias"} <= set(changed)


def merge(model: GPT) -> dict[str, torch.Tensor]:
    merge_lora(model)
    return model.state_dict()


def test_a_damaged_adapter_does_not_resume(corpus: Path, base: Path, tmp_path: Path):
    train(tuned(corpus, base, tmp_path / "run"), progress=False)
    (file,) = (tmp_path / "run/checkpoints/step-00000006").glob("adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors: is damaged: it has \d+ bytes of \d+"):
        train(tuned(corpus, base, tmp_path / "run", steps=8, resume="always"), progress=False)


@pytest.mark.slow
def test_a_lora_run_that_is_killed_ends_as_if_it_were_not(corpus: Path, base: Path, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gptcore.killed_runs", str(corpus), str(tmp_path), "2", "4", str(base)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n4 kills\n"), done.stdout
    same_end(tmp_path / "whole", tmp_path / "killed", "step-00000036", "adapter_model.safetensors")


def test_epochs_take_every_example_once():
    epochs = Epochs(10, seed=1)
    drawn = [i for index in range(5) for i in epochs.indices(4, index)]  # two epochs; a batch spans them
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn == [i for index in range(5) for i in Epochs(10, seed=1).indices(4, index)]
    assert drawn != [i for index in range(5) for i in Epochs(10, seed=2).indices(4, index)]
    assert Epochs(10, seed=1).indices(4, 3) == drawn[12:16]  # without the batches before


def test_examples_of_similar_length_come_together():
    lengths = torch.randint(1, 200, (101,), generator=torch.Generator().manual_seed(0)).tolist()
    epochs = Epochs(101, seed=3, lengths=lengths)
    batches = [epochs.indices(4, index) for index in range(101)]
    drawn = [i for batch in batches for i in batch]
    for epoch in range(4):
        assert sorted(drawn[101 * epoch : 101 * (epoch + 1)]) == list(range(101))
    padded = sum(4 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * 4 * sum(lengths)
    assert batches[1:25] != sorted(batches[1:25], key=lambda batch: lengths[batch[0]])


def test_config_yaml_repeats_a_run(corpus: Path, base: Path, tmp_path: Path):
    made = tuned(corpus, base, tmp_path / "run", lora_rank=4)
    train(made, progress=False)
    values = FinetuneConfig.read(tmp_path / "run/config.yaml")
    assert FinetuneConfig(**values) == made
    assert config(corpus, tmp_path).plain().keys() != made.plain().keys()
