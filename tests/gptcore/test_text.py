"""Text from a model: batches of different lengths, streams, stop strings, chat, exports, and attention maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcore import GPT, GPTConfig
from gptcore.evaluate.attention_map import draw_attention
from gptcore.evaluate.describe import cache_bytes_per_token, describe
from gptcore.generate import generate_text, pad_left, penalise, stream_text
from gptcore.generate.chat import Chat, converse
from gptcore.generate.text import _StreamDecoder
from gptcore.text.chat_template import render
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import Tokenizer
from tests.gptcore.runs import main
from tests.gptcore.small_tokenizers import byte_level

TEXT = "the cat sat on the mat and the dog sat on the log, naïve \U0001f600 1999. " * 30
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], vocab_size=290)


@pytest.fixture(scope="module")
def talker() -> PretrainedTokenizer:
    """A byte-level tokenizer with a chat template and tokens for roles."""
    made = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return PretrainedTokenizer(made, "talker", special_tokens_map={"eos_token": "<|im_end|>"}, chat_template=TEMPLATE)


def make(vocab_size: int, preset: str = "llama-tiny", **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, vocab_size=vocab_size, kernels="reference", **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform: a wrong token shows
    return model.eval()


@pytest.mark.parametrize("preset", ["tiny", "llama-tiny"])
@pytest.mark.parametrize("new", [6, 30], ids=["inside the context", "past it"])
def test_prompts_of_different_lengths_in_one_batch(preset: str, new: int):
    model = make(50, preset, context=24)
    prompts = [[5, 6, 7, 8, 9, 1, 2], [3], [11, 12, 13]]
    tokens, padding = pad_left(prompts)
    assert padding.tolist() == [0, 6, 4]
    out = model.generate(tokens, new, temperature=0.0, padding=padding)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), min(new, 24 - 7), temperature=0.0)[0, len(prompt) :]
        # Compared until the longest row outgrows the context: then all rows keep the newer half of the batch's window.
        assert out[row, 7 : 7 + len(alone)].tolist() == alone.tolist()
    assert out.shape == (3, 7 + new)


def test_empty_prompts_are_refused():
    for prompts, match in (([], "got none"), ([[1], []], "got an empty one")):
        with pytest.raises(ValueError, match=match):
            pad_left(prompts)


def test_the_repetition_penalty_follows_its_definition():
    logits = torch.tensor([[2.0, -2.0, 3.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -1.0]]
    model = make(50)
    free = model.generate(torch.tensor([[1, 2, 3]]), 30, temperature=0.0)[0].tolist()
    never = model.generate(torch.tensor([[1, 2, 3]]), 30, temperature=0.0, repetition_penalty=1e9)[0].tolist()
    assert len(set(free)) < len(free)
    assert len(set(never)) == len(never)
    # Padding is not part of a row's prompt: its id has no penalty.
    tokens, padding = pad_left([[1, 2, 3], [4]], fill=0)
    out = model.generate(tokens, 46, temperature=0.0, repetition_penalty=1e9, padding=padding)
    assert sorted(out[1, 2:].tolist()) == sorted(set(out[1, 2:].tolist()))
    assert 0 in out[1, 3:].tolist()


def push(tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    text = _StreamDecoder(tokenizer, stop)
    pieces = [text.push(i) for i in ids]
    finished = text.finished
    return [*pieces, "" if finished else text.end()], finished


def test_a_stream_has_whole_characters_and_no_part_of_a_stop_string(tokenizer: Tokenizer):
    ids = tokenizer.encode("the naïve \U0001f600 cat")
    pieces, finished = push(tokenizer, ids, ())
    assert "".join(pieces) == "the naïve \U0001f600 cat"
    assert not finished
    assert all("\ufffd" not in piece for piece in pieces)
    bytewise = [tokenizer.encode(c)[0] if c.isascii() else None for c in "a--b---c"]
    pieces, finished = push(tokenizer, [i for i in bytewise if i is not None], ("---", "xyz"))
    assert "".join(pieces) == "a--b"
    assert finished
    assert pieces[:4] == ["a", "", "", "--b"]  # held back while it might become the stop string
    pieces, finished = push(tokenizer, [*tokenizer.encode("on "), tokenizer.eot_token, 5], ())
    assert ("".join(pieces), finished) == ("on ", True)
    assert (
        "".join(push(tokenizer, [0xF0], ())[0]) == "\ufffd"
    )  # a text that ends inside a character: ids under 256 are bytes


def sentencepiece(*added: str) -> PretrainedTokenizer:
    """SentencePiece's kind of tokenizer: spaces belong to the word after them, unknown characters are bytes."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdehnot",
        "\u2581t",
        "\u2581th",
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("\u2581", "t"), ("\u2581t", "h")]
    made = Library(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *added)])
    return PretrainedTokenizer(made, "sp", special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize(
    "text", [" the cat", "  the", "the", " naïve \U0001f600\U0001f601 \u65e5\u672c on", " \n\n the "]
)
def test_a_stream_continues_the_text_of_its_prompt(text: str):
    tokenizer = sentencepiece("<pad>")
    for prompt in ("on the cat", "\u65e5", "no"):
        whole = tokenizer.encode_prompt(prompt + text)
        before = next(n for n in range(len(whole), 0, -1) if tokenizer.decode(whole[:n]) == prompt)
        shown = _StreamDecoder(tokenizer, (), whole[:before])
        pieces = [shown.push(i) for i in whole[before:]]
        assert "".join(pieces) + shown.end() == text
        assert all("\ufffd" not in piece for piece in pieces)
    # A text of its own begins as the tokenizer decodes it; special tokens and unknown ids give no text.
    pad = tokenizer.encode("<pad>", allowed_special="all")[-1]
    mine = [pad, *(i for token in tokenizer.encode(text) for i in (token, tokenizer.vocab_size + 7)), pad]
    assert "".join(push(tokenizer, mine, ())[0]) == text


def test_tokens_that_end_and_begin_inside_characters():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"\xa9\xc3": 256}
    tokenizer = Tokenizer("odd", r"(?s).+", ranks, {"<|endoftext|>": 257})
    ids = tokenizer.encode("\u00e9" * 9)
    assert ids == [0xC3, *[256] * 8, 0xA9]
    assert push(tokenizer, ids, ())[0] == ["", *["\u00e9"] * 9, ""]  # each character as soon as it is complete
    nonsense = "".join(push(tokenizer, [0xFF] * 9 + [0x61], ())[0])
    assert nonsense == "\ufffd" * 9 + "a"


def test_models_with_more_rows_or_fewer_than_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Padded vocabularies, and an added <pad> without a row, are decoded as transformers does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = sentencepiece().vocab_size
    for rows, added in ((base + 60, ()), (base, ("<pad>",))):
        tokenizer, model, folder = sentencepiece(*added), make(rows, context=64), tmp_path / str(rows)
        with torch.no_grad():
            model.wte.weight[3:259] = 0  # the model never samples bytes, whose text depends on the bytes after them
        model.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
        with pytest.raises(SystemExit):
            main(["export", "--model", str(folder), "--out", str(folder / "hf")])
        theirs = AutoModelForCausalLM.from_pretrained(folder / "hf")
        their_tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
        expected = {}
        for prompt in ("the cat", "on"):
            ids = torch.tensor([tokenizer.encode_prompt(prompt)])
            ids = theirs.generate(ids, max_new_tokens=50, do_sample=False)
            assert rows == base or int(ids.max()) >= base  # an id without a token was sampled
            expected[prompt] = their_tokenizer.decode(ids[0], skip_special_tokens=True)
        options = ["--dtype", "fp32", "--kernels", "reference", "--max-new-tokens", "50", "--temperature", "0"]
        for prompts in (["the cat"], ["the cat", "on"]):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                main(["generate", "--model", str(folder), *options, *prompts])
            assert stop.value.code == 0
            assert capsys.readouterr().out == "\n\n".join(expected[prompt] for prompt in prompts) + "\n"
    with pytest.raises(ValueError, match=f"tokens: got id {base}; accepted are 0 to {base - 1}"):
        list(stream_text(model, tokenizer, tokenizer.encode("<pad>", allowed_special="all"), 1))
    small = make(base - 1)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save(tmp_path / "small" / "tokenizer.json")
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(tmp_path / "small"), "the"])
    assert f"tokenizer: has {base} tokens; accepted are at most the model's {base - 1}" in capsys.readouterr().err


def test_unused_ids_give_no_text():
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    made = Library(models.BPE({"a": 0, "b": 5, "</s>": 9}, []))
    made.decoder = decoders.Fuse()
    tokenizer = PretrainedTokenizer(made, "gaps")
    assert (tokenizer.vocab_size, tokenizer.stop_tokens) == (10, (9,))
    assert tokenizer.decode([0, 3, 5]) == "ab"
    assert "".join(push(tokenizer, [3, 0, 4, 5, 12, 9, 0], ())[0]) == "ab"
    model = make(16)
    text = "".join(stream_text(model, tokenizer, [0, 5], 60, seed=1, temperature=3.0))
    assert set(text) <= {"a", "b"}


def test_generated_text_is_the_text_of_the_tokens(tokenizer: Tokenizer):
    model = make(tokenizer.vocab_size)
    prompts = ["the cat sat", "log", "on the mat and the"]
    texts = generate_text(model, tokenizer, prompts, 20, temperature=0.0)
    for prompt, text in zip(prompts, texts):
        ids = tokenizer.encode(prompt)
        out = model.generate(torch.tensor([ids]), 20, temperature=0.0, stop=tokenizer.eot_token)[0, len(ids) :].tolist()
        out = out[: out.index(tokenizer.eot_token)] if tokenizer.eot_token in out else out
        assert text == tokenizer.decode(out)
        assert "".join(stream_text(model, tokenizer, ids, 20, temperature=0.0)) == text
    whole = next(text for text in texts if len(text) > 4)
    stopped = "".join(
        stream_text(
            model, tokenizer, tokenizer.encode(prompts[texts.index(whole)]), 20, stop=[whole[2:4]], temperature=0.0
        )
    )
    assert stopped == whole[: whole.index(whole[2:4])]


def test_a_conversation(talker: PretrainedTokenizer):
    model = make(talker.vocab_size, context=128)
    chat = Chat(model, talker, system="be brief", max_new_tokens=8, temperature=0.0)
    expected = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(TEMPLATE, [*chat.system, {"role": "user", "content": "hi"}]) == expected
    ids = talker.encode(expected, allowed_special="all")
    assert talker.decode(ids) == expected
    assert len(ids) < len(expected)  # special tokens are tokens, not characters
    answer = "".join(chat.reply("hi"))
    assert answer == "".join(stream_text(model, talker, ids, 8, temperature=0.0))
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    shown: list[str] = []
    says = iter(["", "again", "/reset", "x" * 200, "/quit", "never"])
    converse(chat, lambda: next(says), shown.append)
    assert "(a new conversation)\n" in shown
    assert any("message: got" in text and "accepted are up to 120" in text for text in shown)
    assert chat.turns == []
    assert next(says) == "never"
    for text in ("a" * 50, "b" * 50):
        "".join(chat.reply(text))
    assert chat.forgotten == 2  # the oldest question and answer made room
    assert chat.turns[0]["content"] == "b" * 50


def test_chat_refuses_models_and_options_that_cannot_converse(talker: PretrainedTokenizer):
    model = make(talker.vocab_size)
    with pytest.raises(ValueError, match="chat_template: no system"):
        render("{{ raise_exception('no system') }}", [])
    with pytest.raises(ValueError, match="chat_template"):
        render("{{ ().__class__.__mro__ }}{% for %}", [])
    with pytest.raises(ValueError, match=r"max_new_tokens: got 64; accepted are 1 to 63"):
        Chat(model, talker, max_new_tokens=64)
    plain = Tokenizer.train([TEXT], vocab_size=270)
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(model, plain)


def test_attention_is_drawn(tokenizer: Tokenizer, tmp_path: Path):
    model = make(tokenizer.vocab_size, attention_impl="explicit")
    out = tmp_path / "map.png"
    weights = draw_attention(model, tokenizer, "the cat sat on the mat", out, layers=[1], heads=[0, 3])
    count = len(tokenizer.encode("the cat sat on the mat"))
    assert weights.shape == (1, 2, count, count)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, count))
    assert (weights.triu(1) == 0).all()
    assert out.read_bytes().startswith(b"\x89PNG")
    out.unlink()
    for changes, match in (({"layers": [2]}, r"layers: got \[2\]; accepted are one or more of 0 to 1"),
                           ({"heads": []}, r"heads: got \[\]"),
                           ({"text": ""}, "text: got no tokens; accepted are 1 to 64")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            draw_attention(model, tokenizer, **({"text": "a", "out": out} | changes))
    assert list(tmp_path.iterdir()) == []


def test_a_map_of_many_tokens_has_two_pixels_per_token(tmp_path: Path):
    tokenizer = Tokenizer.train([TEXT], vocab_size=257)  # bytes
    model = make(257, attention_impl="explicit", context=600)
    draw_attention(model, tokenizer, "a" * 512, tmp_path / "map.png", layers=[1], heads=[0])
    width, height = (int.from_bytes((tmp_path / "map.png").read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert 1024 < width < 1700  # two pixels a token
    assert 1024 < height < 1700
    with pytest.raises(ValueError, match="text: got 513 tokens; accepted are 1 to 512"):
        draw_attention(model, tokenizer, "a" * 513, tmp_path / "map.png")


def test_labels_are_not_read_as_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """matplotlib would read text between dollar signs as a formula."""
    from matplotlib.axes import Axes

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"$\\": 256, b"$\\q": 257, b"$\\q$": 258}
    tokenizer = Tokenizer("dollars", r"(?s)\S+|\s+", ranks, {"<|endoftext|>": 259})
    shown = []
    set_xticks = Axes.set_xticks
    monkeypatch.setattr(Axes, "set_xticks", lambda *a, **k: (shown.extend(a[2:]), set_xticks(*a, **k))[1])
    model = make(260, attention_impl="explicit")
    draw_attention(model, tokenizer, "$\\q$\n$$ :end:", tmp_path / "map.png", layers=[0], heads=[0])
    assert shown == [["$\\\\q$", "\\n", "$", "$", " ", *":end:"]]


def test_a_model_is_described():
    model = make(50, tied=False)
    shown = describe(model)
    assert f"{model.num_parameters():,}" in shown
    assert "output layer" in shown
    assert "rotary" in shown
    # 2 (keys, values) * 2 layers * 2 heads * 16 dimensions * 2 bytes
    assert cache_bytes_per_token(model, 2) == 256
    assert "256 B  a token" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("attention ")]
    assert ["attention", "reference"] in rows


def test_documents_and_turns_may_end_with_different_tokens():
    """Llama 3 has a token for the end of a text and one for the end of a turn; generation ends at both."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    made = Library(models.BPE({"a": 0}, []))
    made.add_special_tokens(["<|eot_id|>", "<|end_of_text|>"])
    tokenizer = PretrainedTokenizer(made, "llama 3", special_tokens_map={"eos_token": "<|eot_id|>"})
    assert tokenizer.eot_token == made.token_to_id("<|end_of_text|>")
    assert set(tokenizer.stop_tokens) == {1, 2}
    with pytest.raises(ValueError, match="has no token that ends a text"):
        PretrainedTokenizer(Library(models.BPE({"a": 0}, [])), "none")
