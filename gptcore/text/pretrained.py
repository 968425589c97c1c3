"""Tokenizers that came with other people's weights, run by Hugging Face's ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from gptcore import _extras
from gptcore._files import atomic_writer
from gptcore.text.tokenizer import BYTE_SPELLING, TOKENIZER, check_fingerprint, checked_ids, whole_characters

FORMAT = "gptcore-pretrained-tokenizer"
_VERSION = 1
# Tokens by these names end a text (the first three) or a turn, whatever else a model's configuration says.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")
# What transformers calls a model's special tokens, and what else of a tokenizer_config.json goes along to an export.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SETTINGS = ("model_max_length", "padding_side", "clean_up_tokenization_spaces")
_SETTINGS += ("extra_special_tokens", "additional_special_tokens")


class PretrainedTokenizer:
    """The interface of `gptcore.Tokenizer` over a ``tokenizers.Tokenizer``; special tokens may have any ids.

    Args:
        tokenizer: the library's object. Truncation, padding and dropout are switched off in it.
        name: for people to read.
        special_tokens_map: the special tokens by transformers' names (``bos_token``, ``eos_token``, ...).
        stop: ids after which the model's makers end generation, besides ``eos_token`` and ``<|endoftext|>`` or its like.
        chat_template: a Jinja template that turns messages into a prompt, or several by name, of which ``default``
            serves a conversation; None if the model has none.
        settings: other values that ``tokenizer_config.json`` had and an export is to have again.

    Raises:
        ValueError: no token that ends a text.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        *,
        special_tokens_map: Mapping[str, str] | None = None,
        stop: Iterable[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = _of_the_whole_text(tokenizer)
        self.name = name
        self.special_tokens_map = dict(special_tokens_map or {})
        """Special tokens by transformers' names, which chat templates know them by."""
        templates = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self.chat_templates = dict(templates or {})
        self.chat_template = self.chat_templates.get("default")
        self._settings = dict(settings or {})
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        end = self.special_tokens_map.get("eos_token", self.special_tokens_map.get("sep_token"))
        named = [vocabulary.get(token) for token in (*_ENDS, end)]
        known = {*vocabulary.values()}  # what a configuration says by default may be no token here
        ends = list(dict.fromkeys(i for i in [*named, *stop] if i in known))
        if not ends:
            raise ValueError(f"{name}: has no token that ends a text (looked for {', '.join(_ENDS)})")
        self.stop_tokens: tuple[int, ...] = tuple(sorted(ends))
        """Ids after which generation ends."""
        self.eot_token: int = ends[0]
        """The id that stands between documents."""
        self.vocab_size: int = 1 + max(vocabulary.values())
        """All ids are below it; there may be gaps among them."""
        self.base_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        """What ids of tokens are below, those that were added later left out: a model may have no rows for these."""

    def __repr__(self) -> str:
        return f"PretrainedTokenizer({self.name!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"

    def encode(self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """The token ids of `text`; special tokens written out in it are ordinary characters unless "all" are allowed."""
        if allowed_special not in ("all", ()):
            raise ValueError(f"allowed_special: got {allowed_special!r}; accepted are 'all' and none")
        self._tokenizer.encode_special_tokens = allowed_special != "all"
        return self._tokenizer.encode(whole_characters(text), add_special_tokens=False).ids

    def encode_prompt(self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """`encode`, with what the model wants to see around a text (Llama 3's begin-of-text token, BERT's two)."""
        if allowed_special not in ("all", ()):
            raise ValueError(f"allowed_special: got {allowed_special!r}; accepted are 'all' and none")
        self._tokenizer.encode_special_tokens = allowed_special != "all"
        return self._tokenizer.encode(whole_characters(text), add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[self.encode(text) for text in texts]``, on all processor cores."""
        self._tokenizer.encode_special_tokens = True
        whole = [whole_characters(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(whole, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; special tokens are written out unless they are to be skipped, ids in a gap are nothing.

        Raises:
            ValueError: if an id is not in 0 to ``vocab_size - 1``.
        """
        return self._tokenizer.decode(checked_ids(ids, self.vocab_size), skip_special_tokens=skip_special)

    def special_id(self, name: str) -> int:
        """The id of a special token by transformers' name, such as ``mask_token``.

        Raises:
            ValueError: the tokenizer has none.
        """
        i = self._tokenizer.token_to_id(self.special_tokens_map.get(name, ""))
        if i is None:
            raise ValueError(f"tokenizer: {self.name} has no {name}; accepted is one that has, such as BERT's")
        return i

    def special_ids(self, rows: int) -> dict[str, int | list[int]]:
        """What transformers' configurations say of special tokens; generation ends at each in ``eos_token_id``.

        Ids from `rows` on, for which the model has no embedding, are left out.
        """
        stops = [i for i in self.stop_tokens if i < rows]
        ids: dict[str, Any] = {"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {}
        for name in ("bos_token", "pad_token"):
            i = self._tokenizer.token_to_id(self.special_tokens_map.get(name, ""))
            if i is not None and i < rows:
                ids[f"{name}_id"] = i
        return ids

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
            "special_tokens_map": self.special_tokens_map,
            "stop": self.stop_tokens,
            "chat_template": self.chat_templates,
            "settings": self._settings,
            "tokenizer": json.loads(self._tokenizer.to_str()),
        }
        with atomic_writer(Path(path)) as file:
            file.write(json.dumps(state, ensure_ascii=False).encode())

    def save_huggingface(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` as transformers reads them."""
        with atomic_writer(folder / TOKENIZER) as file:
            file.write(self._tokenizer.to_str(pretty=True).encode())
        about = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings, **self.special_tokens_map}
        about.setdefault("eos_token", self._tokenizer.id_to_token(self.eot_token))
        if self.chat_templates:
            several = [{"name": name, "template": template} for name, template in self.chat_templates.items()]
            about["chat_template"] = self.chat_template if list(self.chat_templates) == ["default"] else several
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
            return cls(_parse(library, state, path), path.parent.name, **_beside(path))
        if state.get("version") != _VERSION:
            raise ValueError(f"{path} has format version {state.get('version')!r}; this gptcore reads {_VERSION}")
        try:
            inner = _parse(library, state["tokenizer"], path)
            known = {name: state[name] for name in ("special_tokens_map", "stop", "settings") if name in state}
            if state.get("end"):  # as it was written before the other special tokens were
                known["special_tokens_map"] = {"eos_token": state["end"]}
            tokenizer = cls(inner, state["name"], chat_template=state["chat_template"], **known)
        except KeyError as error:
            raise ValueError(f"{path} is a damaged tokenizer file: {error!r}") from error
        # Of what the file holds: before truncation and dropout were switched off, they were saved as part of it.
        check_fingerprint(path, _fingerprint(state["tokenizer"], tokenizer.eot_token), state.get("fingerprint"))
        return tokenizer

    @classmethod
    def from_gguf(cls, path: Path) -> PretrainedTokenizer:
        """The tokenizer in a GGUF file; raises as `gptcore.text.gguf.read`."""
        from gptcore.text import gguf

        inner, about = gguf.read(path, _library())
        return cls(inner, path.stem, **about)


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


def _beside(path: Path) -> dict[str, Any]:
    """What `PretrainedTokenizer` is told of a ``tokenizer.json`` in other files that Hugging Face keeps beside it."""
    about = _read_beside(path, "tokenizer_config.json")
    if "added_tokens_decoder" not in about:  # older folders name the special tokens in a file of their own
        about |= _read_beside(path, "special_tokens_map.json")
    special = {name: token.get("content") if isinstance(token := about.get(name), dict) else token for name in _NAMES}
    templates = about.get("chat_template")
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    files = {file.stem: file.read_text("utf-8") for file in path.parent.glob("additional_chat_templates/*.jinja")}
    if (file := path.with_name("chat_template.jinja")).is_file():
        files["default"] = file.read_text("utf-8")
    ends = (_read_beside(path, "generation_config.json") or _read_beside(path, "config.json")).get("eos_token_id")
    return {
        "special_tokens_map": {name: token for name, token in special.items() if isinstance(token, str)},
        "stop": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "chat_template": files or templates,
        "settings": {name: about[name] for name in _SETTINGS if name in about},
    }


def _read_beside(path: Path, name: str) -> dict[str, Any]:
    if not (file := path.with_name(name)).is_file():
        return {}
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error
