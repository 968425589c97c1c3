"""Tokenizers in GGUF files give the ids of the tokenizer that the file was made from; errors name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import get_tokenizer

TEXT = "the cat's mat, the CAT'S hat; in 1999 and 20245 it sat -- on\n\n the mat!\r\n  \tthe end. " * 20
TEXTS = [
    TEXT[:200],
    "the  cat ",
    "",
    " ",
    "na\u00efve \u65e5\u672c \U0001f600 12345",
    "a\n \n b",
    "<s> is text",
    "it's IT'S\u2019s 1a2",
]
SPECIAL = ["<s>", "</s>"]
# The pattern in Llama 3's tokenizer.json.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write(path: Path, model: str = "gpt2", **values: Any) -> Path:
    """Write a GGUF file without weights; a value of None leaves the field out."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    for name, value in values.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(*steps: Any) -> tuple[Any, dict[str, Any]]:
    """A byte-level BPE of the tokenizers library that splits text by `steps`, and its fields in a GGUF file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(list(steps)), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=290, show_progress=False, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    tokens = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    types = [3 if token in SPECIAL else 1 for token in tokens]
    made.encode_special_tokens = True
    fields = {"token_list": tokens, "token_types": types, "token_merges": merges, "bos_token_id": 0, "eos_token_id": 1}
    return made, fields


@pytest.mark.parametrize("name", ["llama-bpe", "default", None, "gpt-2", "smollm"])
def test_byte_level_bpe(name: str | None, tmp_path: Path):
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = {"llama-bpe": (pre_tokenizers.Split(Regex(LLAMA3), "isolated"), unsplit)}
    steps["smollm"] = (pre_tokenizers.Digits(individual_digits=True), plain)
    original, fields = byte_level(*steps.get(name or "", (plain,)))
    tokenizer = get_tokenizer(write(tmp_path / "t.gguf", tokenizer_pre=name, **fields))
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Llama 3 has BOS before a text unless the file says otherwise; the others only if it says so.
    began = {given: get_tokenizer(write(tmp_path / "t.gguf", tokenizer_pre=name, add_bos_token=given, **fields))
             for given in (None, True, False)}  # fmt: skip
    ids = original.encode("the").ids
    for given, expected in ((None, name == "llama-bpe"), (True, True), (False, False)):
        assert began[given].encode_prompt("the") == ([0, *ids] if expected else ids)
        assert began[given].encode("the") == ids


def sentencepiece() -> tuple[Any, dict[str, Any]]:
    """A BPE with bytes for unknown characters as SentencePiece trains it, converted as transformers does, and its fields."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    lines = [line for line in TEXT.splitlines() if line]
    learnt.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    pieces = list(dict.fromkeys("".join(pair) for pair in merges))  # two merges may spell one piece
    letters = sorted(token for token in learnt.get_vocab() if len(token) == 1)
    control, byte = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    tokens = [*control, *byte, *pieces, *letters, "<|tool|>"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))] + [0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters)) + [4]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = learnt.normalizer
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    made.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    made.encode_special_tokens = True
    return made, {"token_list": tokens, "token_scores": scores, "token_types": types}


def test_sentencepiece(tmp_path: Path):
    original, fields = sentencepiece()
    tokenizer = get_tokenizer(write(tmp_path / "t.gguf", "llama", tokenizer_pre="default", **fields))
    assert isinstance(tokenizer, PretrainedTokenizer)
    for text in (*TEXTS, "on <|tool|> the mat", "\u2581 the"):
        assert tokenizer.encode(text) == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == original.decode(original.encode(text).ids)
    assert tokenizer.encode_prompt("the") == [1, *original.encode("the").ids]
    assert tokenizer.special_tokens_map == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.stop_tokens == (2,)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = get_tokenizer(tmp_path)
    assert again.encode_prompt(TEXT) == tokenizer.encode_prompt(TEXT)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    plain = get_tokenizer(write(tmp_path / "t.gguf", "llama", add_space_prefix=False, add_bos_token=False, **fields))
    ids = plain.encode_prompt("the mat")
    assert plain.decode(ids) == "the mat"
    assert not fields["token_list"][ids[0]].startswith("\u2581")


def test_a_file_may_leave_out_token_types(tmp_path: Path):
    """Then the tokens that other fields name are special. The file also has an end-of-turn token and two chat templates."""
    from tokenizers import pre_tokenizers

    original, fields = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    fields |= {"token_types": None, "bos_token_id": None, "eot_token_id": 0}
    templates = [{"name": "default", "template": "hello"}, {"name": "rag", "template": "by documents"}]
    tokenizer = get_tokenizer(write(tmp_path / "t.gguf", chat_template=templates, **fields))
    assert isinstance(tokenizer, PretrainedTokenizer)
    assert tokenizer.encode("a</s>") == original.encode("a</s>").ids
    assert tokenizer.encode("a</s>", allowed_special="all")[1:] == [1]
    assert tokenizer.stop_tokens == (0, 1)
    assert tokenizer.chat_templates == {"default": "hello", "rag": "by documents"}


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"tokenizer\.ggml\.model: got 't5'; accepted are 'gpt2'.*and 'llama'", {"model": "t5"}),
        (r"tokenizer\.ggml\.pre: got 'tekken'; accepted are 'default'.*'llama-bpe'", {"tokenizer_pre": "tekken"}),
        (r"tokenizer\.ggml\.tokens: is missing", {"token_list": None}),
        (r"tokenizer\.ggml\.merges: is missing", {"token_merges": None}),
        (r"tokenizer\.ggml\.merges: do not fit the tokens", {"token_merges": ["q zz"]}),
        (r"tokenizer\.ggml\.merges: do not fit the tokens", {"token_merges": ["qq"]}),
        (r"tokenizer\.ggml\.token_type: got 1 for 290 tokens", {"token_types": [1]}),
        (r"tokenizer\.ggml\.eos_token_id: got 290; accepted are 0 to 289", {"eos_token_id": 290}),
        (r"tokenizer\.ggml\.scores: is missing", {"model": "llama"}),
        (r"tokenizer\.ggml\.remove_extra_whitespaces: is set",
         {"model": "llama", "token_scores": [0.0] * 290, "remove_extra_whitespaces": True}),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_say_which_field_is_wrong(match: str, change: dict[str, Any], tmp_path: Path):
    from tokenizers import pre_tokenizers

    _, fields = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    path = write(tmp_path / "t.gguf", **(fields | change))
    with pytest.raises(ValueError, match=match) as error:
        get_tokenizer(path)
    assert str(path) in str(error.value)
