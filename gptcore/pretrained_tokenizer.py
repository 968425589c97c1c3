"""Tokenizers that came with other people's weights, run by Hugging Face's ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from gptcore import _extras
from gptcore._files import atomic_writer
from gptcore.tokenizer import BYTE_SPELLING, check_fingerprint, checked_ids

FORMAT = "gptcore-pretrained-tokenizer"
_VERSION = 1
# Tokens by these names end a text (the first three) or a turn, whatever else a model's configuration says.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")
# How GGUF's names for ways to split text are done. (gpt2: one regular expression, built into ByteLevel.)
_SPLITS = {"smollm": ("digits", "gpt2"), "gpt-2": ("gpt2",), "gpt2": ("gpt2",)}


class PretrainedTokenizer:
    """The interface of `gptcore.Tokenizer` over a ``tokenizers.Tokenizer``; special tokens may have any ids.

    Args:
        tokenizer: the library's object. Truncation, padding and dropout are switched off in it.
        name: for people to read.
        end: the token that ends a text, if the model says; otherwise ``<|endoftext|>`` or its like is looked for.
        chat_template: a Jinja template that turns messages into a prompt; None if the model has none.

    Raises:
        ValueError: no token that ends a text.
    """

    def __init__(self, tokenizer: Any, name: str, *, end: str | None = None, chat_template: str | None = None) -> None:
        self._tokenizer = _of_the_whole_text(tokenizer)
        self.name = name
        self.chat_template = chat_template
        ids = [tokenizer.token_to_id(token) for token in (*_ENDS, *([end] if end else []))]
        found = list(dict.fromkeys(i for i in ids if i is not None))
        if not found:
            raise ValueError(f"{name}: has no token that ends a text (looked for {', '.join(_ENDS)})")
        self.stop_tokens: tuple[int, ...] = tuple(found)
        """Ids after which generation ends."""
        self.eot_token: int = found[0]
        """The id that stands between documents."""
        self._end = end
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"PretrainedTokenizer({self.name!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"

    def encode(self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """The token ids of `text`; special tokens written out in it are ordinary characters unless "all" are allowed."""
        if allowed_special not in ("all", ()):
            raise ValueError(f"allowed_special: got {allowed_special!r}; accepted are 'all' and none")
        self._tokenizer.encode_special_tokens = allowed_special != "all"
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """`encode`, with what the model wants to see before a text (Llama 3's begin-of-text token)."""
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[self.encode(text) for text in texts]``, on all processor cores."""
        self._tokenizer.encode_special_tokens = True
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are written out.

        Raises:
            ValueError: if an id is not in 0 to ``vocab_size - 1``.
        """
        return self._tokenizer.decode(checked_ids(ids, self.vocab_size), skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that depend on the tokens, their ids and how text is split, and not on the name."""
        return _fingerprint(json.loads(self._tokenizer.to_str()), self.eot_token)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to one JSON file, which is either complete or not there at all."""
        state = {
            "format": FORMAT,
            "version": _VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "end": self._end,
            "chat_template": self.chat_template,
            "tokenizer": json.loads(self._tokenizer.to_str()),
        }
        with atomic_writer(Path(path)) as file:
            file.write(json.dumps(state, ensure_ascii=False).encode())

    def save_huggingface(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` as transformers reads them."""
        with atomic_writer(folder / "tokenizer.json") as file:
            file.write(self._tokenizer.to_str(pretty=True).encode())
        end = self._end or self._tokenizer.id_to_token(self.eot_token)
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
        if self.chat_template:
            about["chat_template"] = self.chat_template
        with atomic_writer(folder / "tokenizer_config.json") as file:
            file.write(json.dumps(about, indent=2).encode())

    @classmethod
    def from_state(cls, state: dict[str, Any], path: Path) -> PretrainedTokenizer:
        """What `save` wrote, or a ``tokenizer.json`` of Hugging Face's with what lies beside it at `path`.

        Raises:
            ValueError: it is damaged.
            MissingPackageError: the ``tokenizers`` package is missing.
        """
        library = _library()
        if state.get("format") != FORMAT:
            end, template = _beside(path)
            return cls(_parse(library, state, path), path.parent.name, end=end, chat_template=template)
        if state.get("version") != _VERSION:
            raise ValueError(f"{path} has format version {state.get('version')!r}; this gptcore reads {_VERSION}")
        try:
            inner = _parse(library, state["tokenizer"], path)
            tokenizer = cls(inner, state["name"], end=state["end"], chat_template=state["chat_template"])
        except KeyError as error:
            raise ValueError(f"{path} is a damaged tokenizer file: {error!r}") from error
        # Of what the file holds: before truncation and dropout were switched off, they were saved as part of it.
        check_fingerprint(path, _fingerprint(state["tokenizer"], tokenizer.eot_token), state.get("fingerprint"))
        return tokenizer

    @classmethod
    def from_gguf(cls, path: Path) -> PretrainedTokenizer:
        """The byte-level BPE in a GGUF file.

        Raises:
            ValueError: another kind of tokenizer, or a way to split text that is not known here.
        """
        from gptcore.weights.gguf_file import fields

        library = _library()
        values = {name.removeprefix("tokenizer."): v for name, v in fields(path, "tokenizer.").items()}
        kind, split = values.get("ggml.model"), values.get("ggml.pre", "gpt-2")
        if kind != "gpt2":
            raise ValueError(f"{path}: tokenizer.ggml.model: got {kind!r}; accepted is 'gpt2' (byte-level BPE)")
        if split not in _SPLITS:
            raise ValueError(f"{path}: tokenizer.ggml.pre: got {split!r}; accepted are {', '.join(map(repr, _SPLITS))}")
        tokens = values["ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in values["ggml.merges"]]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        inner = library.Tokenizer(library.models.BPE(vocabulary, merges, fuse_unk=False))
        steps = library.pre_tokenizers
        made = {"digits": lambda: steps.Digits(individual_digits=True), "gpt2": lambda: steps.ByteLevel(False)}
        inner.pre_tokenizer = steps.Sequence([made[step]() for step in _SPLITS[split]])
        inner.decoder = library.decoders.ByteLevel()
        control = 3  # token types of GGUF: 1 ordinary, 3 control
        special = [t for t, token_type in zip(tokens, values["ggml.token_type"]) if token_type == control]
        inner.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
        end = tokens[int(values["ggml.eos_token_id"])] if "ggml.eos_token_id" in values else None
        return cls(inner, path.stem, end=end, chat_template=values.get("chat_template"))


def byte_level_bpe(pattern: str, tokens: list[bytes], special: dict[str, int]) -> Any:
    """A ``tokenizers.Tokenizer`` of a BPE that tiktoken runs: `tokens` in the order of their ids, which is that of merging.

    Which two tokens a merge joins is not written down in such a vocabulary: they are what the token's bytes become under
    all earlier merges.
    """
    library = _library()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelled = [_spell(token) for token in tokens]
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            left, right = _join(token, ranks, rank)
            merges.append((_spell(left), _spell(right)))
    inner = library.Tokenizer(library.models.BPE({text: i for i, text in enumerate(spelled)} | special, merges))
    steps = library.pre_tokenizers
    inner.pre_tokenizer = steps.Sequence(
        [steps.Split(library.Regex(pattern), "isolated"), steps.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = library.decoders.ByteLevel()
    inner.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
    return inner


def _join(token: bytes, ranks: dict[bytes, int], limit: int) -> tuple[bytes, bytes]:
    """The two parts that merges of a rank under `limit` leave of `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
        best = min(pairs)
        if best >= limit:
            raise ValueError(f"tokenizer: the token {token!r} is no merge of two earlier ones; it cannot be exported")
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spell(token: bytes) -> str:
    return "".join(BYTE_SPELLING[byte] for byte in token)


def _of_the_whole_text(tokenizer: Any) -> Any:
    """`tokenizer`, without what its makers' training left in the file: a longest length, padding, merges left to chance."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def _fingerprint(tokenizer: dict[str, Any], end: int) -> str:
    return hashlib.sha256(json.dumps([tokenizer, end], sort_keys=True).encode()).hexdigest()[:32]


def _library() -> Any:
    return _extras.load("tokenizers", "this tokenizer")


def _parse(library: Any, state: dict[str, Any], path: Path) -> Any:
    try:
        return library.Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is a damaged tokenizer file: {error}") from error


def _beside(path: Path) -> tuple[str | None, str | None]:
    """The end token and the chat template that Hugging Face keeps in other files of the folder."""
    about: dict[str, Any] = {}
    if (config := path.with_name("tokenizer_config.json")).is_file():
        try:
            about = json.loads(config.read_bytes())
        except ValueError as error:
            raise ValueError(f"{config} is truncated or damaged: {error}") from error
    end = about.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    template = about.get("chat_template")
    if (file := path.with_name("chat_template.jinja")).is_file():
        template = file.read_text()
    return end, template if isinstance(template, str) else None
