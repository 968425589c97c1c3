"""BERT: equal to transformers', trained on masked words, asked for words and for sentence vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gptkernels import available_backends
from gptkernels.testing import assert_within_budget

from gptcore import GPT
from gptcore.assets import fetch, find
from gptcore.evaluate.embed import embed, similarity_table
from gptcore.generate.fill import fill
from gptcore.models import BERT, BERTConfig, from_pretrained
from gptcore.tasks import MaskedLM, MaskedLMOptions
from gptcore.text import get_tokenizer
from gptcore.train import train
from gptcore.weights import WeightsError, locate, save_huggingface
from tests.gptcore.runs import config, main, make_words, records

pytest.importorskip("tokenizers", reason="needs the tokenizers package")
SIZES = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 40}
ROW = slice(None)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_words(tmp_path_factory.mktemp("words"))


def bert(corpus: Path, out: Path, **changes):
    return config(corpus, out, model="bert", **changes)


@pytest.mark.parametrize("kernels", available_backends())
@pytest.mark.parametrize("masked_words", [True, False])
def test_equals_transformers(tmp_path: Path, kernels: str, masked_words: bool):
    """With padding and two kinds of token: read from its files, and written so that it reads them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = transformers.BertForMaskedLM if masked_words else transformers.BertModel
    theirs = kind(transformers.BertConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases of zero would hide where they go
            parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BERT.from_pretrained(tmp_path / "theirs", kernels=kernels).eval()
    assert ours.config.masked_words == masked_words
    tokens, types = torch.randint(0, 101, (3, 17)), torch.randint(0, 2, (3, 17))
    lengths = torch.tensor([17, 5, 9])
    inside = torch.arange(17) < lengths[:, None]

    def plain(model) -> torch.Tensor:
        found = model(input_ids=tokens, attention_mask=inside.long(), token_type_ids=types)
        return (found.logits if masked_words else found.last_hidden_state)[inside]

    with torch.no_grad():
        call = ours if masked_words else ours.features
        found = call(tokens, lengths=lengths, token_types=types)[inside]
        assert_within_budget("out", found, plain(theirs), plain(theirs.double()))
    save_huggingface(tmp_path / "ours", ours.config, ours.state_dict())
    again = kind.from_pretrained(tmp_path / "ours")
    for name, tensor in theirs.float().state_dict().items():
        if not name.startswith("pooler."):  # which this model does without
            assert torch.equal(again.state_dict()[name], tensor), name


def test_other_berts_are_refused(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="relu"))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        WeightsError, match=r"config\.json: describes no model .*hidden_act: got 'relu'; accepted is 'gelu'"
    ):
        BERT.from_pretrained(tmp_path)
    model.config.hidden_act = "gelu"
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"config\.json: describes a bert; accepted is a gpt"):
        GPT.from_pretrained(tmp_path)
    assert isinstance(from_pretrained(tmp_path), BERT)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"n_head: got 5; accepted are divisors of width, 64", {"n_head": 5}),
        (r"n_head: got 1, heads of 512; accepted are heads of at most 256", {"n_head": 1, "width": 512}),
        (r"token_types: got 0; accepted are positive integers", {"token_types": 0}),
        (r"eps: got 0\.0; accepted are positive numbers", {"eps": 0.0}),
        (r"dropout: got 1\.0; accepted is 0 <= dropout < 1", {"dropout": 1.0}),
        (r"kernels: got 'cuda'; accepted are 'auto'", {"kernels": "cuda"}),
    ],
)
def test_bad_configurations(match: str, changes: dict):
    with pytest.raises(ValueError, match=match):
        BERTConfig.preset("tiny", **changes)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = BERT(BERTConfig.preset("tiny", vocab_size=50, kernels="reference")).eval()
    tokens = torch.randint(0, 50, (2, 9))
    alone = model.features(tokens[1:, :4])
    beside = model.features(tokens, lengths=torch.tensor([9, 4]))[1:, :4]
    torch.testing.assert_close(beside, alone)
    vectors = model.embed(tokens, lengths=torch.tensor([9, 4]))
    torch.testing.assert_close(vectors[1:], model.embed(tokens[1:, :4]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_tokens_are_hidden_as_the_paper_says(words: Path):
    """Of a row's tokens 15 % are to be guessed; of these 80 % are [MASK], 10 % random, 10 % as they were."""
    task = MaskedLM(MaskedLMOptions(sample_text=""), words, context=64)
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(("mask", "same", "other"), 0)
    for _ in range(40):
        state = generator.get_state()
        batch = task.batch(16, generator, ROW, 0)
        text, _ = task.text.train.batch(16, 62, torch.Generator().set_state(state))
        assert batch.tokens.shape == (16, 64)
        assert (batch.tokens[:, 0] == task.cls).all()
        assert (batch.tokens[:, -1] == task.sep).all()
        assert len(batch.positions.unique()) == len(batch.positions) == 16 * round(0.15 * 62)
        whole = torch.cat([torch.full((16, 1), task.cls), text, torch.full((16, 1), task.sep)], 1).flatten()
        counted = batch.targets != -100
        assert torch.equal(whole[batch.positions][counted], batch.targets[counted])
        assert (whole[batch.positions][~counted] == task.sep).all()
        changed = (batch.tokens.flatten() != whole).nonzero().flatten()
        assert set(changed.tolist()) <= set(batch.positions[counted].tolist())  # nothing else is touched
        there = batch.tokens.flatten()[batch.positions][counted]
        counts["mask"] += int((there == task.mask).sum())
        counts["same"] += int((there == batch.targets[counted]).sum())
        counts["other"] += int(((there != task.mask) & (there != batch.targets[counted])).sum())
    total = sum(counts.values())
    assert counts["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert counts["same"] / total == pytest.approx(0.1, abs=0.02)


def test_masks_are_drawn_afresh_in_training_and_stay_in_evaluation(words: Path):
    task = MaskedLM(MaskedLMOptions(sample_text=""), words, context=32)
    generator = torch.Generator().manual_seed(1)
    first, second = (task.batch(4, generator, ROW, 0) for _ in range(2))
    assert not torch.equal(first.positions, second.positions)
    again = task.batch(4, torch.Generator().manual_seed(1), ROW, 0)
    assert torch.equal(first.tokens, again.tokens)
    one, two = ([batch.tokens for batch in task.evaluation(4, 9)] for _ in range(2))
    assert sum(map(len, one)) == 9
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    # Two processes that share a batch hold its rows.
    halves = [task.batch(4, torch.Generator().manual_seed(1), rows, 0) for rows in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat([half.tokens for half in halves]), first.tokens)
    assert torch.equal(torch.cat([half.targets for half in halves]), first.targets)


def test_learns_masked_words(words: Path, tmp_path: Path):
    """It beats the guess by frequency, which a model cannot without looking at both sides."""
    options = {"context": 24, "batch_size": 16, "steps": 120, "warmup": 10, "eval_interval": 120, "eval_windows": 16}
    result = train(bert(words, tmp_path / "run", optimizer="muon", **options), progress=False)
    assert result.val_loss_full < result.baseline - 0.2


def test_fill_shows_the_likeliest_words(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = get_tokenizer(words)
    torch.manual_seed(0)
    model = BERT(BERTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, kernels="reference", dropout=0.5))
    text = "monday [MASK] wednesday [MASK]"
    first, second = fill(model, tokenizer, text, count=3)
    assert model.training
    ids = torch.tensor([tokenizer.encode_prompt(text, allowed_special="all")])
    assert ids[0].tolist().count(tokenizer.special_id("mask_token")) == 2
    shares = model.eval()(ids)[0].softmax(-1)[ids[0] == tokenizer.special_id("mask_token")]
    for found, share in zip((first, second), shares):
        values, words_there = share.topk(3)
        assert [word for word, _ in found] == [tokenizer.decode([i]) for i in words_there.tolist()]
        assert [value for _, value in found] == pytest.approx(values.tolist())
    with pytest.raises(ValueError, match=r"text: got 'no mask'; accepted is a text with one \[MASK\] or more"):
        fill(model, tokenizer, "no mask")
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(SystemExit) as stop:
        main(["fill", "--model", str(tmp_path), "--kernels", "reference", "--count", "1", text])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", first[0][0]], ["2", second[0][0]]]


def test_the_sample_fills_every_mask(words: Path):
    task = MaskedLM(MaskedLMOptions(sample_text="monday [MASK] wednesday [MASK]"), words, context=32)
    torch.manual_seed(0)
    model = BERT(BERTConfig.preset("tiny", kernels="reference", **task.model_changes()))
    shown = task.sample(model)
    assert shown.startswith("monday [MASK] wednesday [MASK] ")
    assert shown.count("%") == 6
    assert shown.count(";") == 1
    assert MaskedLM(MaskedLMOptions(sample_text=""), words, context=32).sample(model) == ""


def test_goes_on_after_a_stop_bit_for_bit(words: Path, tmp_path: Path):
    for name in ("whole", "part"):
        train(bert(words, tmp_path / name, dropout=0.1), progress=False)
    import shutil

    shutil.rmtree(tmp_path / "part/checkpoints/step-00000008")
    train(bert(words, tmp_path / "part", dropout=0.1, resume="always"), progress=False)
    for file in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(records(tmp_path / "part", "loss")) == 8


def test_data_without_a_mask_is_refused_before_anything_is_written(corpus: Path, tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=r"has no \[CLS\], \[SEP\] or \[MASK\]; accepted are folders that gptcore prepare --tokenizer wordpiece",
    ):
        train(bert(corpus, tmp_path / "run"), progress=False)
    assert not (tmp_path / "run").exists()


def test_vectors_have_the_order_of_the_texts(words: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    torch.manual_seed(0)
    tokenizer = get_tokenizer(words)
    model = BERT(BERTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, kernels="reference"))
    texts = ["monday tuesday wednesday", "friday", "sunday monday", "friday"]
    found = embed(model, tokenizer, texts, batch_size=2)
    for text, vector in zip(texts, found):
        torch.testing.assert_close(embed(model, tokenizer, [text])[0], vector)
    assert similarity_table(texts, found).splitlines()[2].split()[1:5][1::2] == ["1.00", "1.00"]
    with pytest.raises(ValueError, match=r"texts: got one of \d+ tokens .*accepted are up to the context, 64"):
        embed(model, tokenizer, ["monday " * 80])
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(SystemExit) as stop:
        main(["embed", "--model", str(tmp_path), "--out", str(tmp_path / "v.safetensors"), "monday", "sunday monday"])
    assert stop.value.code == 0
    assert "2 vectors of 64 numbers" in capsys.readouterr().out


@pytest.mark.network
def test_minilm_equals_transformers():
    """all-MiniLM-L6-v2's sentence vectors, against transformers' features averaged by hand."""
    transformers = pytest.importorskip("transformers")
    fetch("minilm-l6", progress=False)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply on Tuesday morning."]
    tokenizer = get_tokenizer(locate("minilm-l6"))
    model = BERT.from_pretrained("minilm-l6")
    found = embed(model, tokenizer, texts)
    theirs = transformers.BertModel.from_pretrained(find("minilm-l6")).eval()

    def averaged(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer.encode_prompt(text)])
        with torch.no_grad():
            return torch.nn.functional.normalize(theirs(ids).last_hidden_state.mean(1), dim=-1)[0]

    plain = torch.stack([averaged(text) for text in texts])
    theirs.double()
    assert_within_budget("vectors", found, plain, torch.stack([averaged(text) for text in texts]))
    cosines = found @ found.T
    assert cosines[0, 1] > 0.6
    assert cosines[0, 2] < 0.2
