"""The classifier: equal to transformers' models for sequence classification, blind to padding, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptkernels import available_backends
from gptkernels.testing import assert_within_budget
from torch import nn

from gptcore import GPT, GPTConfig
from gptcore.models import BERT, BERTConfig, Classifier, ClassifierConfig, from_pretrained
from gptcore.weights import WeightsError, save_huggingface

LABELS = ("ham", "junk", "spam")
LENGTHS = torch.tensor([17, 5, 1])
BASES = {
    "gpt2": GPTConfig.preset("tiny", vocab_size=50, kernels="reference"),
    "llama": GPTConfig.preset("llama-tiny", vocab_size=50, tied=False, kernels="reference"),
    "bert": BERTConfig.preset("tiny", vocab_size=50, kernels="reference"),
}


def make(kind: str, **changes) -> Classifier:
    torch.manual_seed(0)
    values = {"backbone": BASES[kind], "labels": LABELS}
    return scattered(Classifier(ClassifierConfig.from_dict(values | changes))).eval()


def scattered(model: nn.Module) -> nn.Module:
    """Every parameter is random: biases of zero would hide where they go."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def transformers_model(kind: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shared = {"vocab_size": 50, "num_labels": 3, "id2label": dict(enumerate(LABELS))}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=40, pad_token_id=49, **shared)
        return scattered(transformers.GPT2ForSequenceClassification(config)).eval()
    if kind == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=49, **sizes, **shared)
        return scattered(transformers.LlamaForSequenceClassification(config)).eval()
    return scattered(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **shared))).eval()


@pytest.mark.parametrize("kernels", available_backends())
@pytest.mark.parametrize("kind", BASES)
def test_equals_transformers(tmp_path: Path, kind: str, kernels: str):
    """On a padded batch: read from its files, and written so that it reads them."""
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", kernels=kernels).eval()
    assert isinstance(ours, Classifier)
    assert ours.config.labels == LABELS
    inside = torch.arange(17) < LENGTHS[:, None]
    tokens = torch.randint(0, 49, (3, 17)).masked_fill(~inside, 49)  # 49 is the id of padding

    def plain(model: nn.Module) -> torch.Tensor:
        return model(input_ids=tokens, attention_mask=inside.long()).logits

    with torch.no_grad():
        found = ours(tokens, lengths=LENGTHS)
        assert_within_budget("logits", found, plain(theirs), plain(theirs.double()))
    save_huggingface(tmp_path / "ours", ours.config, ours.state_dict(), {"eos_token_id": [49, 3]})
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert again.config.id2label == dict(enumerate(LABELS))
    assert again.config.label2id == {"ham": 0, "junk": 1, "spam": 2}
    for name, tensor in theirs.float().state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():  # transformers finds the last token of each row by the id of padding in config.json
        torch.testing.assert_close(again(input_ids=tokens, attention_mask=inside.long()).logits, plain(theirs))


def test_regressions_and_several_right_classes_are_refused(tmp_path: Path):
    transformers_model("bert").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, match in (
        ({"problem_type": "regression"}, r"problem_type: got 'regression'; accepted is 'single_label_classification'"),
        ({"id2label": {"0": "score"}}, r"labels: got \('score',\); accepted are two or more distinct names"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(WeightsError, match=match):
            from_pretrained(tmp_path)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kernels", [name for name in available_backends() if name != "triton"])  # interpreted: slow
@pytest.mark.parametrize("kind", BASES)
def test_padding_changes_nothing(kind: str, kernels: str, explicit: bool):
    """Neither the logits nor any gradient depend on the padding's tokens, or on how many there are."""
    model = make(kind, kernels=kernels, attention_impl="explicit" if explicit else "fused")
    tokens, targets = torch.randint(0, 50, (3, 17)), torch.tensor([2, 0, 1])

    def results(tokens: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(tokens, lengths=LENGTHS)
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]  # type: ignore[union-attr]

    found = results(tokens)
    others = results(torch.where(torch.arange(17) < LENGTHS[:, None], tokens, 49 - tokens))
    model.zero_grad()
    alone = [model(tokens[i : i + 1, :length]) for i, length in enumerate(LENGTHS)]  # each text without padding
    nn.functional.cross_entropy(torch.cat(alone), targets, reduction="sum").backward()
    expected = [torch.cat(alone).detach(), *(parameter.grad for parameter in model.parameters())]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(others, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", BASES)
def test_a_classifier_shares_the_weights_of_its_base(tmp_path: Path, kind: str):
    """Without the output layer, which no loss reaches; the head is float32 whatever the base is."""
    torch.manual_seed(0)
    base = (BERT if kind == "bert" else GPT)(BASES[kind]).bfloat16()  # type: ignore[arg-type]
    names = set(base.state_dict())
    model = Classifier.around(base, ["no", "yes"])
    assert set(base.state_dict()) == names
    assert model.backbone.wte.weight.data_ptr() == base.wte.weight.data_ptr()
    assert not [name for name in model.state_dict() if "lm_head" in name or "backbone.head" in name]
    assert {parameter.dtype for parameter in model.head_parameters()} == {torch.float32}
    tokens = torch.randint(0, 50, (2, 9))
    assert torch.equal(model(tokens), torch.zeros(2, 2))  # all classes are equally probable at the start
    model(tokens, targets=torch.tensor([0, 1])).backward()
    last = model.score if kind != "bert" else model.classifier
    assert last.weight.grad is not None
    assert last.weight.grad.abs().max() > 0.01
    scattered(model)
    head = {id(parameter) for parameter in model.head_parameters()}
    others = {id(p) for name, p in model.named_parameters() if name.startswith("backbone.")}
    assert head | others == {id(p) for p in model.parameters()}
    logits = model(tokens, lengths=torch.tensor([9, 4]))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, kernels="reference")
    assert again.config == model.config
    assert torch.equal(again(tokens, lengths=torch.tensor([9, 4])), logits)
    with pytest.raises(ValueError, match="model: got a classifier; accepted are gpt, bert"):
        Classifier.around(model, ["no", "yes"])


def test_changes_reach_the_backbone(tmp_path: Path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["backbone"]["model_type"] == "gpt"
    assert "kernels" not in described["backbone"]
    changed = from_pretrained(tmp_path, kernels="reference", dropout=0.25)
    assert changed.config.backbone.dropout == 0.25
    assert (changed.config.context, changed.config.backbone.vocab_size) == (64, 50)
    with pytest.raises(ValueError, match="heads: is no field of GPTConfig"):
        ClassifierConfig.from_description(model.config.description(), {"heads": 3})


@pytest.mark.parametrize("labels", [(), ("one",), ("a", "a"), ("a", ""), ("a", 1)])
def test_bad_labels(labels: tuple):
    with pytest.raises(ValueError, match=r"labels: got .*; accepted are two or more distinct names"):
        ClassifierConfig(BASES["bert"], labels)


def test_lengths_outside_the_row_are_refused():
    model = make("gpt2")
    for lengths in ([3, 0], [3, 5]):
        with pytest.raises(ValueError, match=r"lengths: got \[3, .\]; accepted are 1 to 4, the row's tokens"):
            model(torch.zeros(2, 4, dtype=torch.long), lengths=torch.tensor(lengths))


def test_class_weights_equal_repeated_examples():
    """A class of weight 3 counts as if each of its texts were there three times."""
    model = make("llama")
    tokens, targets = torch.randint(0, 50, (3, 6)), torch.tensor([0, 2, 0])
    weights = torch.tensor([1.0, 2.0, 3.0])
    repeated = torch.tensor([0, 1, 1, 1, 2])
    for reduction in ("mean", "sum"):
        weighted = model(tokens, targets=targets, weights=weights, reduction=reduction)
        plain = model(tokens[repeated], targets=targets[repeated], reduction=reduction)
        torch.testing.assert_close(weighted, plain)
    each = model(tokens, targets=targets, weights=weights, reduction="none")
    expected = nn.functional.cross_entropy(model(tokens), targets, weight=weights, reduction="none")
    torch.testing.assert_close(each, expected)


def test_flops_leave_out_the_output_layer():
    """Six for each weight of the blocks and each token, attention, and the head once a text."""
    model = make("gpt2")
    blocks = sum(p.numel() for p in model.blocks.parameters()) + sum(
        p.numel() for p in model.backbone.ln_f.parameters()
    )
    expected = 2 * 10 * (6 * blocks + 6 * 2 * 64 * 10) + 2 * 6 * 64 * 3
    assert model.flops((2, 10)) == expected
