"""What a text becomes: its tokens, the neighbours of a word's embedding, and pictures."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch

from gptcore.evaluate.nearest import nearest_tokens
from gptcore.models import GPT, GPTConfig
from gptcore.text import Tokenizer
from tests.gptcore.test_cli import gptcore


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    pytest.importorskip("rustbpe")
    return Tokenizer.train(["the cat and the dog and the fish " * 40], vocab_size=290)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    """Its embeddings are drawn at random, but that of " dog" lies close to that of " cat", and " fish" opposite."""
    torch.manual_seed(0)
    made = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size))
    (cat,), (dog,), (fish,) = (tokenizer.encode(word) for word in (" cat", " dog", " fish"))
    weight = made.wte.weight.data
    weight[dog] = 3 * weight[cat] + 0.2 * weight[cat].norm() * torch.nn.functional.normalize(weight[dog], dim=0)
    weight[fish] = -weight[cat]
    return made


def test_the_nearest_tokens_lie_in_the_same_direction(model: GPT, tokenizer: Tokenizer):
    ((first, cosine), *others) = nearest_tokens(model, tokenizer, ["cat"], count=200)[0]
    weight = torch.nn.functional.normalize(model.wte.weight.detach(), dim=-1)
    (cat,), (dog,) = tokenizer.encode(" cat"), tokenizer.encode(" dog")
    assert first == "dog"
    assert cosine == pytest.approx(float(weight[cat] @ weight[dog]), abs=1e-6)
    values = [cosine, *(value for _, value in others)]
    assert values == sorted(values, reverse=True)
    names = [name for name, _ in others]
    assert names[-1] == "fish"  # the opposite comes last
    assert "cat" not in names  # not the word itself
    assert len({name.lower() for name in names}) == len(names)
    assert not any("\ufffd" in name or name == "<|endoftext|>" or not name.strip() for name in names)


def test_a_word_of_several_tokens_has_their_mean(model: GPT, tokenizer: Tokenizer):
    ids = tokenizer.encode("zq")
    assert len(ids) == 2
    weight = torch.nn.functional.normalize(model.wte.weight.detach(), dim=-1)
    mean = torch.nn.functional.normalize(weight[ids].mean(0), dim=-1)
    (name, cosine) = nearest_tokens(model, tokenizer, ["zq"], count=1)[0][0]
    others = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).strip() == name]
    assert cosine == pytest.approx(max(float(weight[i] @ mean) for i in others), abs=1e-6)


@pytest.mark.parametrize(
    ("words", "count", "match"),
    [
        ([], 1, "words: got none"),
        (["a", " "], 1, "words: got an empty one"),
        (["a"], 0, "count: got 0"),
    ],
)
def test_bad_words_are_named(model: GPT, tokenizer: Tokenizer, words: list[str], count: int, match: str):
    with pytest.raises(ValueError, match=match):
        nearest_tokens(model, tokenizer, words, count)


def test_the_commands(capsys, model: GPT, tokenizer: Tokenizer, tmp_path: Path):
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    status, shown, _ = gptcore(capsys, "nearest", "--model", tmp_path, "--count", 1, "cat", "--dtype", "fp32")
    assert (status, shown) == (0, "cat: dog 1.00\n")
    status, shown, _ = gptcore(capsys, "tokens", "--tokenizer", tmp_path, "the cat")
    ids = tokenizer.encode("the cat")
    assert (status, shown.splitlines()) == (
        0,
        ["|the| cat|", " ".join(map(str, ids)), "2 tokens, 7 bytes, 3.50 bytes per token"],
    )
    picture = tmp_path / "attention.svg"
    arguments = ("--layers", 1, "--heads", 0, "--out", picture, "the cat and the dog")
    status, shown, _ = gptcore(capsys, "attention-map", "--model", tmp_path, *arguments)
    assert status == 0
    words = [
        (text.text or "").strip() for text in xml.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}text")
    ]
    assert [words.count(word) for word in ("cat", "dog", "the")] == [2, 2, 4]  # along both sides, as text
    again = picture.read_bytes()
    gptcore(capsys, "attention-map", "--model", tmp_path, *arguments)
    assert picture.read_bytes() == again  # the same figure is the same file
