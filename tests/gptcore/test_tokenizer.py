"""Tokenizers: decoding gives back the encoded text, saved files load again, errors say what is wrong with a file."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.text import tokenizer as tokenizer_module
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer
from tests.gptcore.small_tokenizers import byte_level

TEXT = "the cat sat on the mat, the dog sat on the log; naïve café 🙂🙂\n" * 20
BYTES = {bytes([byte]): byte for byte in range(256)}
GPT2_STYLE = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


def test_training_merges_the_most_frequent_pair_first() -> None:
    # " ab" comes often and nothing else repeats: first (a, b) or ( , a), then the rest of the word.
    tokenizer = Tokenizer.train([" ab" * 10], 259, pattern=GPT2_STYLE)
    assert tokenizer.vocab_size == 259
    assert tokenizer.eot_token == 258
    assert tokenizer.encode(" ab ab") == [257, 257]
    assert tokenizer.decode([257]) == " ab"


def test_ids_are_contiguous_and_the_special_token_is_last(trained: Tokenizer) -> None:
    assert (trained.vocab_size, trained.eot_token) == (280, 279)
    assert trained.decode([trained.eot_token]) == END_OF_TEXT
    pieces = [trained.decode([i]) for i in range(280)]
    assert all(pieces)
    assert len(trained.encode(TEXT)) < len(TEXT) / 2


def test_merges_do_not_cross_the_pattern() -> None:
    tokenizer = Tokenizer.train(["ab12" * 50], 259, pattern=r"\p{L}+|\p{N}+|\s+")
    assert {tokenizer.decode([i]) for i in range(256, 258)} == {"ab", "12"}
    assert tokenizer.vocab_size == 259


@given(st.text())
def test_encode_then_decode_is_the_same_text(text: str) -> None:
    tokenizer = Tokenizer("bytes", GPT2_STYLE, {**BYTES, b"th": 256, b"the": 257}, {END_OF_TEXT: 258})
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n \t", "naïve", "日本語", "👩‍👩‍👧‍👦🏳️‍🌈", "\0", END_OF_TEXT, "a" * 100_000]
)
def test_round_trip_of_awkward_texts(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.encode_batch([text, "x", text]) == [ids, trained.encode("x"), ids]
    assert trained.eot_token not in ids


def test_a_character_cut_in_half_is_replaced() -> None:
    tokenizer = Tokenizer("bytes", GPT2_STYLE, BYTES, {END_OF_TEXT: 256})
    ids = tokenizer.encode("a🙂")
    assert ids == list(b"a\xf0\x9f\x99\x82")
    assert tokenizer.decode(ids[:3]) == "a\ufffd"


def test_special_tokens_are_encoded_only_when_allowed(trained: Tokenizer) -> None:
    text = f"one{END_OF_TEXT}two"
    expected = [*trained.encode("one"), trained.eot_token, *trained.encode("two")]
    assert trained.encode(text, allowed_special={END_OF_TEXT}) == expected
    assert trained.encode(text, allowed_special="all") == expected
    with pytest.raises(ValueError, match=r"allowed_special names \['<\|pad\|>'\].*endoftext"):
        trained.encode(text, allowed_special={"<|pad|>"})


def test_special_tokens_have_ids_by_name(trained: Tokenizer) -> None:
    assert trained.special_id("eos_token") == trained.eot_token
    with pytest.raises(ValueError, match="tokenizer: bpe has no mask_token; accepted is one that has"):
        trained.special_id("mask_token")  # as `gptcore fill` asks for


@pytest.mark.parametrize("token", [-1, 280, 2**40])
def test_decoding_an_id_outside_the_vocabulary(trained: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token} is not in the vocabulary \(0 to 279\)"):
        trained.decode([0, token])


@pytest.mark.parametrize("vocab_size", [256, 0, -5])
def test_a_vocabulary_too_small_to_train(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size must be at least 257 .*got {vocab_size}"):
        Tokenizer.train([TEXT], vocab_size)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_on_nothing(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        Tokenizer.train(texts, 300)


def test_smallest_vocabulary_is_bytes_and_end_of_text() -> None:
    tokenizer = Tokenizer.train([TEXT], 257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("abc")) == 3


def test_too_few_merges_are_reported() -> None:
    with pytest.warns(UserWarning, match="vocab_size=1000: the tokenizer has 258 tokens"):
        tokenizer = Tokenizer.train(["ab"], 1000)
    assert (tokenizer.vocab_size, tokenizer.eot_token) == (258, 257)


def test_an_error_in_the_corpus_reaches_the_caller() -> None:
    def texts() -> Any:
        yield TEXT
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        Tokenizer.train(texts(), 300)


def test_ctrl_c_does_not_wait_for_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[bytes] = []

    class Trainer:
        """Stands for compiled code that runs long and does not react to signals."""

        def train_from_iterator(self, texts: Iterator[str], *_: object, **__: object) -> None:
            next(texts)
            Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            finished.extend(map(partial(hashlib.pbkdf2_hmac, "sha256", b"", b""), [3_000_000]))

    monkeypatch.setattr("rustbpe.Tokenizer", Trainer)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train(["some text"] * 9, 300)
    assert finished == []


@pytest.mark.parametrize(
    ("ranks", "special", "message"),
    [
        ({**BYTES, b"ab": 257}, {END_OF_TEXT: 256}, "mergeable_ranks must have the ids 0, 1, 2"),
        ({b"a": 0}, {END_OF_TEXT: 1}, "all 256 single bytes; 255 are missing"),
        (BYTES, {END_OF_TEXT: 300}, "ids that follow the 256 ordinary tokens"),
        (BYTES, {"<|other|>": 256}, "special_tokens must hold '<|endoftext|>'"),
    ],
)
def test_inconsistent_vocabularies_are_refused(ranks: dict[bytes, int], special: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Tokenizer("broken", GPT2_STYLE, ranks, special)


def test_an_invalid_pattern() -> None:
    with pytest.raises(ValueError, match="pattern is not a valid regular expression"):
        Tokenizer("broken", "(", BYTES, {END_OF_TEXT: 256})


def test_save_and_load_give_the_same_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    for loaded in (Tokenizer.load(path), get_tokenizer(path), get_tokenizer(str(tmp_path))):
        assert loaded.encode(TEXT) == trained.encode(TEXT)
        assert (loaded.name, loaded.vocab_size, loaded.eot_token) == ("bpe", 280, 279)
        assert loaded.fingerprint == trained.fingerprint


def test_the_fingerprint_depends_on_the_vocabulary_and_not_on_the_name() -> None:
    def fingerprint(name: str = "a", pattern: str = r"\S+|\s+", swap: bool = False, eot: str = END_OF_TEXT) -> str:
        ranks = {**BYTES, b"a": 98, b"b": 97} if swap else BYTES
        special = {eot: 256} if eot == END_OF_TEXT else {eot: 256, END_OF_TEXT: 257}
        return Tokenizer(name, pattern, ranks, special).fingerprint

    assert len(bytes.fromhex(fingerprint())) == 16
    assert fingerprint() == fingerprint(name="b")
    variants = [
        fingerprint(),
        fingerprint(pattern=r"\S+|\s"),
        fingerprint(swap=True),
        fingerprint(eot="<|x|>"),
    ]
    assert len(set(variants)) == 4


def _edit(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not a tokenizer file, or is truncated"),
        (lambda data: b"", "is not a tokenizer file, or is truncated"),
        (lambda data: b"\xff\xfe\x00" + data, "is not a tokenizer file, or is truncated"),
        (lambda data: b"[1, 2]", "is not a gptcore tokenizer file"),
        (lambda data: b'{"model": {"type": "BPE"}}', "is not a gptcore tokenizer file"),
        (_edit(version=2), "has format version 2; this gptcore reads 1"),
        (_edit(pattern=r"\S+|\s+"), "damaged.*fingerprint"),
        (_edit(pattern=None), "is a damaged tokenizer file"),
        (_edit(mergeable_ranks=["!"]), "is a damaged tokenizer file"),
        (_edit(mergeable_ranks=["YQ=="]), "255 are missing"),
        (_edit(special_tokens=[]), "is a damaged tokenizer file"),
        (lambda data: data.replace(b'"special_tokens"', b'"specials"'), "special_tokens"),
    ],
)
def test_loading_a_damaged_file(
    trained: Tokenizer, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_missing_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file at .*none\.json"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"tokenizer must be 'gpt2'.* where there is none"):
        get_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer must be 'gpt2', a tokenizer file.*got 'gpt5'"):
        get_tokenizer("gpt5")


def test_a_failed_save_keeps_the_old_file(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        trained.save(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("tokenizer.json", "old")]


def test_saving_into_a_missing_folder(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write .*the folder .*none does not exist"):
        trained.save(tmp_path / "none" / "tokenizer.json")


def _gpt2_spelling(byte: int) -> str:
    """The character that stands for a byte in GPT-2's files, from the ranges in its released code."""
    ranges = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in ranges else chr(256 + sorted(set(range(256)) - set(ranges)).index(byte))


def test_gpt2_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [_gpt2_spelling(byte) for byte in range(256)] + ["Ġt", "he", "Ġthe", END_OF_TEXT]
    contents = {
        "encoder.json": json.dumps({word: i for i, word in enumerate(words)}).encode(),
        "vocab.bpe": "#version: 0.2\nĠ t\nh e\nĠt he\n".encode(),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    with pytest.raises(FileNotFoundError, match=r"vocab_dir must hold encoder\.json and vocab\.bpe"):
        Tokenizer.gpt2(vocab_dir=tmp_path)
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"encoder\.json is not GPT-2's .*sha256 is {hashes['encoder.json']}"):
        Tokenizer.gpt2(vocab_dir=tmp_path)

    monkeypatch.setattr(tokenizer_module, "_GPT2_SHA256", hashes)  # a vocabulary small enough for a test
    tokenizer = Tokenizer.gpt2(vocab_dir=tmp_path)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_token) == ("gpt2", 260, 259)
    assert tokenizer.encode("the the\n\xad") == [ord("t"), 257, 258, 10, 0xC2, 0xAD]
    (tmp_path / "vocab.bpe").write_bytes(contents["vocab.bpe"] + b"\n")
    with pytest.raises(ValueError, match=r"vocab\.bpe is not GPT-2's vocab\.bpe"):
        Tokenizer.gpt2(vocab_dir=tmp_path)


def test_a_pretrained_tokenizer_that_an_earlier_version_saved(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    made = PretrainedTokenizer(
        Library(models.BPE({"a": 0, "<|end|>": 1}, [])), "x", special_tokens_map={"eos_token": "<|end|>"}
    )
    made.save(tmp_path / "tokenizer.json")
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    for name in ("special_tokens_map", "stop", "settings"):
        del state[name]
    state |= {"end": "<|end|>", "chat_template": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    again = get_tokenizer(tmp_path)
    assert (again.stop_tokens, again.special_tokens_map, again.fingerprint) == (
        (1,),
        {"eos_token": "<|end|>"},
        made.fingerprint,
    )


def test_half_characters_are_replaced() -> None:
    """Command lines and JSON may hold halves of surrogate pairs."""
    for tokenizer in (
        PretrainedTokenizer(byte_level("</s>"), "x"),
        Tokenizer("bytes", GPT2_STYLE, BYTES, {END_OF_TEXT: 256}),
    ):
        for text, expected in (("a\ud800b", "a\ufffdb"), ("\udcff", "\ufffd"), ("\ud83d\ude42", "\U0001f642")):
            encodings = [tokenizer.encode(text), tokenizer.encode_prompt(text), *tokenizer.encode_batch([text])]
            if isinstance(tokenizer, Tokenizer):
                encodings.append(tokenizer.encode_array(text).tolist())
            assert {tokenizer.decode(ids) for ids in encodings} == {expected}


def test_gpt2_with_neither_cache_nor_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_: str) -> bytes:
        raise ConnectionError("Name or service not known")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("gptcore.assets.find", lambda name: None)  # gpt2-bpe may have been fetched on this machine
    monkeypatch.setattr("tiktoken.load.read_file", offline)
    with pytest.raises(ConnectionError, match=r"Name or service(.|\n)*TIKTOKEN_CACHE_DIR(.|\n)*vocab_dir(.|\n)*'bpe'"):
        get_tokenizer("gpt2")
