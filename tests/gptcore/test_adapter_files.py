"""Adapters on disk: exchanged with the `peft` library, loaded with their base, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcore import GPT
from gptcore.assets import download
from gptcore.models import Classifier, from_pretrained
from gptcore.nn import has_lora, merge_lora
from gptcore.nn.lora import lora_layers
from gptcore.text import get_tokenizer
from gptcore.text.tokenizer import Tokenizer
from gptcore.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    WeightsError,
    adapter_state,
    load_adapter,
    read_adapter,
    save_adapter,
    save_folder,
    save_huggingface,
)
from gptcore.weights.files import description
from tests.gptcore.adapters import make, train_adapters
from tests.gptcore.runs import main

X = torch.arange(40).view(2, 20) % 61
LABELS = ("ham", "spam", "other")


def scores(model: Any) -> Tensor:
    """Logits of our model or of transformers'."""
    with torch.no_grad():
        out = model(X)
    return out if isinstance(out, Tensor) else out.logits


def adapted(kind: str, folder: Path, **options: Any) -> tuple[Any, Path, Path]:
    """A model with adapters, the folder of its base for transformers, and the folder of the adapters."""
    model = make(kind)
    if options.pop("classifier", False):
        model = Classifier.around(model, LABELS).eval()
    base, tuned = folder / "base", folder / "tuned"
    save_huggingface(base, model.config, model.state_dict(), {"eos_token_id": 60})
    train_adapters(model, **options)
    with torch.no_grad():
        for parameter in getattr(model, "head_parameters", list)():
            parameter.normal_(std=0.3)  # trained too
    save_adapter(tuned, model, str(base))
    return model, base, tuned


def transformers_model(kind: str, classifier: bool, base: Path) -> Any:
    import transformers

    name = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM"}[kind]
    if classifier:
        name = name.partition("LMHead")[0].partition("For")[0].removesuffix("Model") + "ForSequenceClassification"
    return getattr(transformers, name).from_pretrained(base).eval()


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_peft_loads_ours(kind: str, classifier: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    peft = pytest.importorskip("peft")
    for layers in ("all", "mlp"):
        folder = tmp_path / layers
        model, base, tuned = adapted(kind, folder, layers=layers, classifier=classifier)
        theirs = peft.PeftModel.from_pretrained(transformers_model(kind, classifier, base), tuned).eval()
        torch.testing.assert_close(scores(theirs), scores(model), rtol=1e-4, atol=1e-4)
        config = theirs.peft_config["default"]
        assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (3, 5, kind == "gpt2")
        own = peft.get_peft_model_state_dict(theirs)
        assert set(own) == set(load_file(tuned / ADAPTER))  # it adapts no other layer
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message).lower()]


TARGETS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj", "up_proj"],
    "bert": ["query", "value", "attention.output.dense"],
}


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_we_load_pefts(kind: str, classifier: bool, tmp_path: Path):
    """With some parts of a layer only, a scale of alpha / sqrt(rank), and a classifier's head trained whole."""
    peft = pytest.importorskip("peft")
    own = make(kind)
    own = Classifier.around(own, LABELS).eval() if classifier else own
    save_huggingface(tmp_path / "base", own.config, own.state_dict(), {"eos_token_id": 60})
    task = "SEQ_CLS" if classifier else None if kind == "bert" else "CAUSAL_LM"
    config = peft.LoraConfig(task_type=task, r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS[kind])
    theirs = peft.get_peft_model(transformers_model(kind, classifier, tmp_path / "base"), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "tuned")
    model = from_pretrained(tmp_path / "tuned", kernels="reference").eval()  # its configuration names the base
    assert type(model) is type(own)
    torch.testing.assert_close(scores(model), scores(theirs), rtol=1e-4, atol=1e-4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora" in name or name.startswith(("score", "classifier")) for name in trained)
    # Written by us again, it is the same adapter.
    save_adapter(tmp_path / "again", model, str(tmp_path / "base"))
    before, after = load_file(tmp_path / "tuned" / ADAPTER), load_file(tmp_path / "again" / ADAPTER)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert all(".pooler." in name for name in set(after) - set(before))  # BERT's pooler is part of our head
    merge_lora(model)
    torch.testing.assert_close(scores(model), scores(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pefts_classifier_on_a_language_model(kind: str, tmp_path: Path):
    """The base has no head: it comes whole from the adapter, and peft names no classes."""
    peft = pytest.importorskip("peft")
    base = make(kind)
    save_huggingface(tmp_path / "base", base.config, base.state_dict())
    theirs = transformers_model(kind, True, tmp_path / "base")
    theirs.config.pad_token_id = 60
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS[kind])).eval()
    theirs.save_pretrained(tmp_path / "tuned")
    model = from_pretrained(tmp_path / "tuned", kernels="reference").eval()
    assert model.config.labels == ("LABEL_0", "LABEL_1")
    torch.testing.assert_close(scores(model), scores(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_round_trip_is_exact(kind: str, tmp_path: Path):
    model, base, tuned = adapted(kind, tmp_path, classifier=True, alpha=4.7, dropout=0.1)
    again = from_pretrained(base, adapter=tuned, kernels="reference").eval()
    assert {n: layer.config.dropout for n, layer in lora_layers(again).items()} == dict.fromkeys(
        lora_layers(model), 0.1
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(scores(again), scores(model))
    state = adapter_state(model, read_adapter(tuned))
    assert set(state) == {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_adapters_and_head_stay_float32_beside_a_bf16_base(tmp_path: Path):
    model, base, tuned = adapted("llama", tmp_path, classifier=True)
    again = from_pretrained(base, adapter=tuned, dtype=torch.bfloat16, kernels="reference").eval()
    for name, parameter in again.named_parameters():
        whole = "lora" in name or name.startswith("score")
        assert parameter.dtype == (torch.float32 if whole else torch.bfloat16)
        assert not whole or torch.equal(parameter, model.get_parameter(name))
    torch.testing.assert_close(scores(again), scores(model), rtol=0.1, atol=0.1)


def run_folder(model: Any, base: Path, run: Path) -> None:
    """A folder as a LoRA run leaves it: the adapters, and the description of the whole model."""
    save_adapter(run, model, str(base))
    (run / "config.json").write_text(json.dumps(description(model.config)))


def test_a_classifiers_run_loads_the_base_and_its_head(tmp_path: Path):
    """The base is no classifier; names and number of classes come from the run."""
    for kind in ("gpt2", "llama", "bert"):
        base, run = tmp_path / kind / "base", tmp_path / kind / "run"
        language_model = make(kind)
        save_folder(base, language_model.config, language_model.state_dict())
        model = Classifier.around(language_model, LABELS).eval()
        train_adapters(model)
        run_folder(model, base, run)
        again = from_pretrained(run, kernels="reference").eval()
        assert again.config.labels == LABELS
        assert torch.equal(scores(again), scores(model))
        with pytest.raises(WeightsError, match=r"run/config\.json: describes a classifier; accepted is a gpt"):
            GPT.from_pretrained(run)


def test_an_adapter_of_an_adapted_model_loads_both(tmp_path: Path):
    """Tuned with instructions, then with preferences: the first adapter is merged under the second."""
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    model = make("llama")
    save_folder(base, model.config, model.state_dict())
    train_adapters(model)
    run_folder(model, base, first)
    merge_lora(model)
    train_adapters(model, rank=2, layers="attention")
    run_folder(model, first, second)
    again = GPT.from_pretrained(second, kernels="reference").eval()
    assert len(lora_layers(again)) == 4
    assert torch.equal(scores(again), scores(model))
    assert torch.equal(scores(GPT.from_pretrained(first, adapter=second, kernels="reference").eval()), scores(model))
    with pytest.raises(WeightsError, match=r"adapter: got .*first twice"):
        from_pretrained(first, adapter=first)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(path: Path, old: str, new: str) -> None:
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


def drop(path: Path, end: str) -> None:
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith(end)}, path)


def as_pickle(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04not read.")


CONFIG_OF = "adapter_config.json: describes no adapter this version can load "
BAD: dict[str, tuple[Any, str]] = {
    "dora": (lambda f: edit(f / ADAPTER_CONFIG, use_dora=True), CONFIG_OF + r"\(use_dora: got True"),
    "other kind": (lambda f: edit(f / ADAPTER_CONFIG, peft_type="IA3"), CONFIG_OF + r"\(peft_type: got 'IA3'; accepted is"),
    "ranks": (lambda f: edit(f / ADAPTER_CONFIG, rank_pattern={"q_proj": 2}), r"rank_pattern: got \{'q_proj': 2\}"),
    "bias": (lambda f: edit(f / ADAPTER_CONFIG, bias="all"), "bias: got 'all'; accepted are 'none'"),
    "changed base": (lambda f: edit(f / ADAPTER_CONFIG, init_lora_weights="pissa"), "init_lora_weights: got 'pissa'"),
    "rank": (lambda f: edit(f / ADAPTER_CONFIG, r=4), r"lora_A\.weight has shape \(3, 48\); accepted .* is \(4, 48\)"),
    "no JSON": (lambda f: (f / ADAPTER_CONFIG).write_text("{"), CONFIG_OF),
    "no object": (lambda f: (f / ADAPTER_CONFIG).write_text("[]"), CONFIG_OF),
    "no rank": (lambda f: (f / ADAPTER_CONFIG).write_text('{"peft_type": "LORA"}'), CONFIG_OF + r"\('r' is missing"),
    "no config": (lambda f: (f / ADAPTER_CONFIG).unlink(), "adapter_config.json: there is no such file"),
    "pickle": (as_pickle, r"adapter_model\.bin: is a pickle, which can run any code when it is read"),
    "no tensors": (lambda f: (f / ADAPTER).unlink(), r"adapter_model\.safetensors: there is no such file"),
    "cut": (lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:-10]), "is damaged or no safetensors file"),
    "foreign": (lambda f: rename(f / ADAPTER, "base_model.model.", ""), "is no name of an adapter's tensor"),
    "a layer more": (lambda f: rename(f / ADAPTER, "layers.1.", "layers.2."), r"layers\.2\..* belongs to no layer of this GPT"),
    "half": (lambda f: drop(f / ADAPTER, "layers.1.mlp.up_proj.lora_B.weight"), r"up_proj\.lora_B\.weight is missing"),
    "nothing": (lambda f: save_file({}, f / ADAPTER), "has no low-rank tensors"),
    "dora tensors": (
        lambda f: rename(f / ADAPTER, "1.mlp.up_proj.lora_B.weight", "1.mlp.up_proj.lora_magnitude_vector"),
        "lora_magnitude_vector belongs to no GPT with low-rank adapters",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    return adapted("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_and_changes_nothing(case: str, llama: tuple[Any, Path, Path], tmp_path: Path):
    break_it, match = BAD[case]
    for name in (ADAPTER, ADAPTER_CONFIG):
        (tmp_path / name).write_bytes((llama[2] / name).read_bytes())
    break_it(tmp_path)
    model = make("llama")
    before = model.state_dict()
    with pytest.raises(WeightsError, match=match) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not has_lora(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_of_another_base_names_the_tensor_and_both_shapes(llama: tuple[Any, Path, Path]):
    name = r"base_model\.model\.model\.layers\.0\.\S+"
    with pytest.raises(WeightsError, match=rf"{name} has shape \(32, 3\); accepted for this model is \(64, 3\)"):
        load_adapter(make("llama", width=64), llama[2])
    with pytest.raises(WeightsError, match=rf"{name} belongs to no layer of this GPT that can be adapted: 2 layers"):
        load_adapter(make("gpt2"), llama[2])
    model = make("llama")
    train_adapters(model, rank=2)
    with pytest.raises(WeightsError, match=r"lora_[AB] has shape \(\d+, \d+\); accepted is"):
        adapter_state(model, read_adapter(llama[2]))
    other = make("llama")
    train_adapters(other, layers="mlp")
    with pytest.raises(WeightsError, match=r"has h\.\d\.attn\.\S+, which the model has not"):
        adapter_state(other, read_adapter(llama[2]))


def test_a_weight_that_is_trained_whole_is_no_part_of_an_adapter(tmp_path: Path):
    model = make("gpt2")
    with pytest.raises(WeightsError, match="model: has no adapters"):
        save_adapter(tmp_path / "new", model, "base")
    train_adapters(model)
    model.wte.weight.requires_grad_(True)
    with pytest.raises(WeightsError, match=r"wte\.weight: is trained whole"):
        save_adapter(tmp_path / "new", model, "base")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("base", "match"),
    [
        ("/no/such/base", r"is an adapter that needs its base '/no/such/base', which .*: there is no such folder"),
        (
            "smollm2-135m-instruct",
            "needs its base 'smollm2-135m-instruct', .* run: gptcore fetch smollm2-135m-instruct",
        ),
        (None, "names no base_model_name_or_path; accepted then is --model BASE --adapter"),
    ],
)
def test_a_missing_base_is_said(base: str, match: str, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "cache_folder", lambda: tmp_path / "empty")
    for name in (ADAPTER, ADAPTER_CONFIG):
        (tmp_path / name).write_bytes((llama[2] / name).read_bytes())
    edit(tmp_path / ADAPTER_CONFIG, base_model_name_or_path=base)
    with pytest.raises(WeightsError, match=match):
        from_pretrained(tmp_path)
    edit(tmp_path / ADAPTER_CONFIG, base_model_name_or_path=str(tmp_path))
    with pytest.raises(WeightsError, match="it is the adapter itself"):
        from_pretrained(tmp_path)


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model with adapters, the folder of its base with a tokenizer, and that of the run."""
    pytest.importorskip("rustbpe")  # what trains the tokenizer
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], vocab_size=265)
    model = make("llama", vocab_size=tokenizer.vocab_size)
    save_folder(folder / "base", model.config, model.state_dict())
    tokenizer.save(folder / "base" / "tokenizer.json")
    train_adapters(model)
    run_folder(model, folder / "base", folder / "run")
    return model, folder / "base", folder / "run"


def test_commands_take_an_adapter(runs: tuple[Any, Path, Path], capsys: pytest.CaptureFixture[str]):
    """Given beside the base, or as a run that names it; apart or merged. The base's tokenizer serves all."""
    _, base, run = runs
    common = ("--kernels", "reference", "--temperature", 0, "--max-new-tokens", 12, "the cat")
    shown = {}
    for name, options in {
        "base": ("--model", base),
        "beside": ("--model", base, "--adapter", run),
        "run": ("--model", run),
        "merged": ("--model", run, "--merge"),
    }.items():
        assert cli("generate", *options, *common) == 0
        shown[name] = capsys.readouterr().out
    assert shown["beside"] == shown["run"] == shown["merged"] != shown["base"]
    assert cli("generate", "--model", base, "--merge", *common) == 2
    assert "merge: " in capsys.readouterr().err
    assert cli("generate", "--model", base, "--adapter", base.parent / "none", *common) == 2
    assert "none/adapter_config.json: there is no such file" in capsys.readouterr().err
    assert get_tokenizer(run).vocab_size == get_tokenizer(base).vocab_size


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_export_writes_merged_weights(dtype: str, runs: tuple[Any, Path, Path], tmp_path: Path):
    """transformers loads them; in bfloat16 each weight is the float32 sum, rounded once."""
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    _, base, run = runs
    ours = GPT.from_pretrained(run, kernels="reference").eval()
    assert cli("export", "--model", base, "--adapter", run, "--out", tmp_path / "one", "--dtype", dtype) == 0
    assert cli("export", "--model", run, "--out", tmp_path / "two", "--dtype", dtype) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert not any("lora" in name for name in one)
    if dtype == "keep":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
        torch.testing.assert_close(scores(theirs), scores(ours), rtol=1e-4, atol=1e-4)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "one")("the cat").input_ids
    else:
        merge_lora(ours)
        found = one["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(found, ours.get_parameter("h.0.mlp.c_proj.weight").bfloat16())


def test_an_adapters_own_tokenizer_goes_with_it(runs: tuple[Any, Path, Path], tmp_path: Path):
    pytest.importorskip("tokenizers")
    model, base, _ = runs
    save_adapter(tmp_path / "tuned", model, str(base))
    other = Tokenizer.train(["a dog ran " * 20], vocab_size=262)
    other.save(tmp_path / "tuned" / "tokenizer.json")
    assert cli("export", "--model", base, "--adapter", tmp_path / "tuned", "--out", tmp_path / "out") == 0
    assert get_tokenizer(tmp_path / "out").vocab_size == other.vocab_size
