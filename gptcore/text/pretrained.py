"""Tokenizers that come with other people's weights, run by Hugging Face's ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from gptcore import _extras
from gptcore._files import atomic_writer
from gptcore.text.tokenizer import BYTE_SPELLING, TOKENIZER, check_fingerprint, checked_ids, whole_characters
from gptcore.weights.names import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION,
    MORE_CHAT_TEMPLATES,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
)

FORMAT = "gptcore-pretrained-tokenizer"
_VERSION = 1
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>")
"""Tokens with these names end a text (the first three) or a turn, whatever the configuration says."""
_SPECIAL_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""transformers' names for the special tokens."""
_SETTINGS = (
    "model_max_length",
    "padding_side",
    "clean_up_tokenization_spaces",
    "extra_special_tokens",
    "additional_special_tokens",
)
"""Other values of a tokenizer_config.json that an export copies."""


class PretrainedTokenizer:
    """Has the interface of `gptcore.Tokenizer`, and runs a ``tokenizers.Tokenizer``. Special tokens may have any ids.

    Args:
        tokenizer: the library's object. Truncation, padding and dropout are switched off in it.
        name: a name for people to read.
        special_tokens_map: the special tokens by transformers' names (``bos_token``, ``eos_token``, ...).
        stop: ids that end generation besides ``eos_token`` and the usual ones such as ``<|endoftext|>``.
        chat_template: a Jinja template that turns messages into a prompt, or several by name, of which ``default`` is
            used for chat; None if the model has none.
        settings: other values of ``tokenizer_config.json`` that an export writes again.

    Raises:
        ValueError: the tokenizer has no token that ends a text.
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
        self._tokenizer = _without_training_options(tokenizer)
        self.name = name
        self.special_tokens_map = dict(special_tokens_map or {})
        """Special tokens by transformers' names, as chat templates call them."""
        templates = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self.chat_templates = dict(templates or {})
        self.chat_template = self.chat_templates.get("default")
        self._settings = dict(settings or {})
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        end = self.special_tokens_map.get("eos_token", self.special_tokens_map.get("sep_token"))
        named = [vocabulary.get(token) for token in (*_END_TOKENS, end)]
        known = {*vocabulary.values()}  # a configuration's default may be no id of this tokenizer
        ends = list(dict.fromkeys(i for i in [*named, *stop] if i in known))
        if not ends:
            raise ValueError(f"{name}: has no token that ends a text (looked for {', '.join(_END_TOKENS)})")
        self.stop_tokens: tuple[int, ...] = tuple(sorted(ends))
        """Ids that end generation."""
        self.eot_token: int = ends[0]
        """The id that stands between documents."""
        self.vocab_size: int = 1 + max(vocabulary.values())
        """All ids are less than this; some below it may be unused."""
        self.base_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        """`vocab_size` without the tokens that were added later, for which a model may have no embedding."""

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens as a text may spell them."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    def with_chat_template(self, template: str) -> PretrainedTokenizer:
        """The same tokenizer with another chat template."""
        changed = copy(self)
        changed.chat_templates = self.chat_templates | {"default": template}
        changed.chat_template = template
        return changed

    def __repr__(self) -> str:
        return f"PretrainedTokenizer({self.name!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"

    def encode(self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """The token ids of `text`. A special token written in it is ordinary text unless `allowed_special` is "all"."""
        return self._encode(text, allowed_special, around=False)

    def encode_prompt(self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """`encode`, with the tokens that the model expects around a text (Llama 3: one before; BERT: one on each side)."""
        return self._encode(text, allowed_special, around=True)

    def _encode(self, text: str, allowed_special: Literal["all"] | Collection[str], around: bool) -> list[int]:
        if allowed_special not in ("all", ()):
            raise ValueError(f"allowed_special: got {allowed_special!r}; accepted are 'all' and ()")
        self._tokenizer.encode_special_tokens = allowed_special != "all"
        return self._tokenizer.encode(whole_characters(text), add_special_tokens=around).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[self.encode(text) for text in texts]``, on all processor cores."""
        self._tokenizer.encode_special_tokens = True
        whole = [whole_characters(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(whole, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids. Unused ids give no text, and special tokens none if `skip_special`.

        Raises:
            ValueError: if an id is not in 0 to ``vocab_size - 1``.
        """
        return self._tokenizer.decode(checked_ids(ids, self.vocab_size), skip_special_tokens=skip_special)

    def special_id(self, name: str) -> int:
        """The id of a special token by transformers' name, such as ``mask_token``.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        token_id = self._special_id(name)
        if token_id is None:
            raise ValueError(f"tokenizer: {self.name} has no {name}; accepted is one that has, such as BERT's")
        return token_id

    def _special_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(self.special_tokens_map.get(name, ""))

    def special_ids(self, rows: int) -> dict[str, int | list[int]]:
        """The ids of special tokens as transformers' configurations name them; generation ends at each ``eos_token_id``.

        Ids of `rows` and more, for which the model has no embedding, are left out.
        """
        stops = [i for i in self.stop_tokens if i < rows]
        ids: dict[str, Any] = {"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {}
        for name in ("bos_token", "pad_token"):
            token_id = self._special_id(name)
            if token_id is not None and token_id < rows:
                ids[f"{name}_id"] = token_id
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """A hash, 32 hexadecimal digits, of the tokens, their ids and the way to split text; the name does not matter."""
        return _fingerprint(json.loads(self._tokenizer.to_str()), self.eot_token)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to one JSON file, which appears complete or not at all."""
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
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings, **self.special_tokens_map}
        config.setdefault("eos_token", self._tokenizer.id_to_token(self.eot_token))
        if self.chat_templates:
            several = [{"name": name, "template": template} for name, template in self.chat_templates.items()]
            config["chat_template"] = self.chat_template if list(self.chat_templates) == ["default"] else several
        with atomic_writer(folder / TOKENIZER_CONFIG) as file:
            file.write(json.dumps(config, indent=2).encode())

    @classmethod
    def from_state(cls, state: dict[str, Any], path: Path) -> PretrainedTokenizer:
        """The tokenizer in a JSON file that `save` or Hugging Face wrote.

        Args:
            state: the file's contents.
            path: the file. Of Hugging Face's, the files beside it are read too.

        Raises:
            ValueError: a file is damaged.
            MissingPackageError: the ``tokenizers`` package is missing.
        """
        library = _library()
        if state.get("format") != FORMAT:
            return cls(_parse(library, state, path), path.parent.name, **_read_configs(path))
        if state.get("version") != _VERSION:
            raise ValueError(f"{path} has format version {state.get('version')!r}; this gptcore reads {_VERSION}")
        try:
            inner = _parse(library, state["tokenizer"], path)
            known = {name: state[name] for name in ("special_tokens_map", "stop", "settings") if name in state}
            if state.get("end"):  # an earlier version wrote this special token only
                known["special_tokens_map"] = {"eos_token": state["end"]}
            tokenizer = cls(inner, state["name"], chat_template=state["chat_template"], **known)
        except KeyError as error:
            raise ValueError(f"{path} is a damaged tokenizer file: {error!r}") from error
        # The fingerprint of the file's contents, which may have truncation or dropout: earlier versions saved them.
        check_fingerprint(path, _fingerprint(state["tokenizer"], tokenizer.eot_token), state.get("fingerprint"))
        return tokenizer

    @classmethod
    def from_gguf(cls, path: Path) -> PretrainedTokenizer:
        """The tokenizer in a GGUF file. Raises as `gptcore.text.gguf.read_tokenizer` does."""
        from gptcore.text.gguf import read_tokenizer

        inner, options = read_tokenizer(path, _library())
        return cls(inner, path.stem, **options)


def byte_level_bpe(pattern: str, tokens: list[bytes], special: dict[str, int]) -> Any:
    """Convert a tiktoken BPE to a ``tokenizers.Tokenizer``.

    tiktoken's vocabulary does not say which two tokens a merge joins. They are found by applying all earlier merges to
    the bytes of the new token.

    Args:
        pattern: the regular expression that splits text.
        tokens: the tokens in the order of their ids, which is the order of the merges.
        special: the special tokens and their ids.
    """
    library = _library()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelled = [_spell(token) for token in tokens]
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) > 1:
            left, right = _merged_pair(token, ranks, rank)
            merges.append((_spell(left), _spell(right)))
    inner = library.Tokenizer(library.models.BPE({text: i for i, text in enumerate(spelled)} | special, merges))
    steps = library.pre_tokenizers
    inner.pre_tokenizer = steps.Sequence(
        [steps.Split(library.Regex(pattern), "isolated"), steps.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = library.decoders.ByteLevel()
    inner.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token in special])
    return inner


def _merged_pair(token: bytes, ranks: dict[bytes, int], rank: int) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes `token`: all merges before `rank` are applied to its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= rank:
            raise ValueError(f"tokenizer: the token {token!r} is no merge of two earlier ones; it cannot be exported")
        index = pair_ranks.index(lowest)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]


def _spell(token: bytes) -> str:
    return "".join(BYTE_SPELLING[byte] for byte in token)


def _without_training_options(tokenizer: Any) -> Any:
    """Switch off truncation, padding and dropout, which a file may still have from the model's training."""
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


def _read_configs(path: Path) -> dict[str, Any]:
    """The arguments of `PretrainedTokenizer` from the files beside a Hugging Face ``tokenizer.json``."""
    config = _read_json(path.with_name(TOKENIZER_CONFIG))
    if "added_tokens_decoder" not in config:
        config |= _read_json(path.with_name(SPECIAL_TOKENS))
    special = {
        name: token.get("content") if isinstance(token := config.get(name), dict) else token for name in _SPECIAL_NAMES
    }
    templates = config.get("chat_template")
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    files = {file.stem: file.read_text("utf-8") for file in path.parent.glob(MORE_CHAT_TEMPLATES)}
    if (file := path.with_name(CHAT_TEMPLATE)).is_file():
        files["default"] = file.read_text("utf-8")
    model_config = _read_json(path.with_name(GENERATION)) or _read_json(path.with_name(CONFIG))
    ends = model_config.get("eos_token_id")
    return {
        "special_tokens_map": {name: token for name, token in special.items() if isinstance(token, str)},
        "stop": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "chat_template": files or templates,
        "settings": {name: config[name] for name in _SETTINGS if name in config},
    }


def _read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; {} if it does not exist."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
