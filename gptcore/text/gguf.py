"""Reads the tokenizer in a GGUF file (byte-level BPE or SentencePiece's BPE) into the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptcore.weights.gguf import read_fields

_PREFIX = "tokenizer.ggml."
# The ways to split text before bytes are merged. _DIGITS splits off each digit, then splits the rest as GPT-2 does.
_GPT2, _DIGITS, _LLAMA3 = "gpt2", "digits", "llama3"
# GGUF's names -> the way to split.
_PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
}
# A contraction; a word and the character before it; up to three digits; other signs and the line break after; white space.
_LLAMA3_PATTERN = (
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GGUF's token types; the others are bytes and unused tokens.
_ORDINARY, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"  # SentencePiece's spelling of a space
# transformers' names of special tokens -> GGUF's fields; "seperator" is GGUF's spelling.
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_tokenizer(path: Path, library: Any) -> tuple[Any, dict[str, Any]]:
    """The tokenizer in a file.

    Args:
        path: a GGUF file.
        library: the ``tokenizers`` package.

    Returns:
        The library's tokenizer, and the other arguments of `PretrainedTokenizer`.

    Raises:
        ValueError: another kind of tokenizer, an unknown way to split text, or a field that is missing or does not fit
            the others; names the field.
    """
    fields = read_fields(path, "tokenizer.")
    values = {name.removeprefix(_PREFIX): value for name, value in fields.items() if name.startswith(_PREFIX)}
    kind = values.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{path}: {_PREFIX}model: got {kind!r}; accepted are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE)"
        )
    try:
        tokens: list[str] = _list(values, "tokens")
        special = {name: _id(values, field, len(tokens)) for name, field in _SPECIAL_TOKENS.items() if field in values}
        stops = [_id(values, field, len(tokens)) for field in _STOPS if field in values]
        if kind == "llama" and len(tokens) > 2:  # the format's defaults
            special = {"unk_token": 0, "bos_token": 1, "eos_token": 2} | special
        types = _types(values, tokens, [*special.values(), *stops])
        if kind == "gpt2":
            inner = _byte_level(library, values, tokens)
        else:
            inner = _sentencepiece(library, values, tokens, types, special.get("unk_token"))
    except ValueError as error:
        raise ValueError(f"{path}: {_PREFIX}{error}") from error
    for token, token_type in zip(tokens, types):
        if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            added = library.AddedToken(token, normalized=False, special=token_type != _USER_DEFINED)
            (inner.add_special_tokens if added.special else inner.add_tokens)([added])
    add_bos = kind == "llama" or _PRE_TOKENIZERS[values.get("pre", "default")] == _LLAMA3  # the format's default
    if "bos_token" in special and values.get("add_bos_token", add_bos):
        bos = {"id": "bos", "ids": [special["bos_token"]], "tokens": [tokens[special["bos_token"]]]}
        inner.post_processor = library.processors.TemplateProcessing(single=["bos", "$A"], special_tokens=[bos])
    return inner, {
        "special_tokens_map": {name: tokens[i] for name, i in special.items()},
        "stop": stops,
        "chat_template": _templates(fields),
    }


def _byte_level(library: Any, values: dict[str, Any], tokens: list[str]) -> Any:
    """A byte-level BPE, split as the field ``pre`` says."""
    pre = values.get("pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(f"pre: got {pre!r}; accepted are {', '.join(map(repr, _PRE_TOKENIZERS))}")
    split = _PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in _list(values, "merges")]
    try:
        model = library.models.BPE(_ids(tokens), merges, ignore_merges=split == _LLAMA3)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"merges: do not fit the tokens ({error})") from error
    inner = library.Tokenizer(model)
    steps = library.pre_tokenizers
    if split == _LLAMA3:
        parts = [steps.Split(library.Regex(_LLAMA3_PATTERN), "isolated"), steps.ByteLevel(False, use_regex=False)]
    else:
        parts = [steps.Digits(individual_digits=True)] if split == _DIGITS else []
        parts.append(steps.ByteLevel(False))
    inner.pre_tokenizer = steps.Sequence(parts)
    inner.decoder = library.decoders.ByteLevel()
    return inner


def _sentencepiece(
    library: Any, values: dict[str, Any], tokens: list[str], types: list[int], unknown: int | None
) -> Any:
    """A BPE with merges in the order of the scores and bytes for unknown characters, as transformers converts it."""
    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if values.get(name):
            raise ValueError(f"{name}: is set; accepted are tokenizers that do not change the text")
    scores: list[float] = _list(values, "scores", len(tokens))
    ordinary = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind == _ORDINARY}
    merges = []
    for token in sorted(ordinary, key=lambda token: -scores[ordinary[token]]):
        halves = [(token[:at], token[at:]) for at in range(len(token) - 1, 0, -1)]
        merges += [(left, right) for left, right in halves if left in ordinary and right in ordinary]
    model = library.models.BPE(
        _ids(tokens),
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = library.Tokenizer(model)
    prefix_space = bool(values.get("add_space_prefix", True))
    steps = library.normalizers
    inner.normalizer = steps.Sequence([*([steps.Prepend(_SPACE)] if prefix_space else []), steps.Replace(" ", _SPACE)])
    decoders = library.decoders
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prefix_space else [])])
    return inner


def _ids(tokens: Iterable[str]) -> dict[str, int]:
    """Token -> id; the first id of a token that comes twice."""
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    return ids


def _types(values: dict[str, Any], tokens: Sequence[str], special: Iterable[int]) -> list[int]:
    """The type of each token. If the file has no types, the special tokens are control tokens, the others ordinary."""
    if "token_type" in values:
        return _list(values, "token_type", len(tokens))
    types = [_ORDINARY] * len(tokens)
    for i in special:
        types[i] = _CONTROL
    return types


def _list(values: dict[str, Any], name: str, length: int | None = None) -> list[Any]:
    """A field that must be a list, of this length if one is given."""
    found = values.get(name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name}: {'is missing' if found is None else 'is empty'}; accepted are files that have it")
    if length is not None and len(found) != length:
        raise ValueError(f"{name}: got {len(found)} for {length} tokens; accepted is one for each")
    return found


def _id(values: dict[str, Any], name: str, count: int) -> int:
    """A field that must be the id of one of `count` tokens."""
    if not 0 <= (i := int(values[name])) < count:
        raise ValueError(f"{name}: got {i}; accepted are 0 to {count - 1}, the file's tokens")
    return i


def _templates(fields: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name; the one without a name is ``default``."""
    field = "tokenizer.chat_template"
    named = {name.removeprefix(f"{field}."): value for name, value in fields.items() if name.startswith(f"{field}.")}
    return ({"default": fields[field]} if field in fields else {}) | named
