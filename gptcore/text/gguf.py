"""The tokenizer in a GGUF file, for the ``tokenizers`` library: byte-level BPE, and SentencePiece's BPE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptcore.weights.gguf import fields

# GGUF's names for ways to split text before bytes are merged.
_GPT2, _DIGITS, _LLAMA3 = "GPT-2's", "GPT-2's after each digit by itself", "Llama 3's"
_SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
}
# A contraction, a word with what stands before it, up to three digits, other signs with the line's end, white space.
_LLAMA3_PATTERN = (
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Kinds of tokens; others are bytes and unused ones.
_ORDINARY, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"  # SentencePiece's spelling of a space
# transformers' names of special tokens: GGUF's fields.
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read(path: Path, library: Any) -> tuple[Any, dict[str, Any]]:
    """The file's tokenizer, made with `library` (the ``tokenizers`` package), and what else a `PretrainedTokenizer` is told.

    Raises:
        ValueError: another kind of tokenizer, a way to split text that is not known here, or a field that is missing or
            does not fit the others; names it.
    """
    prefix = "tokenizer.ggml."
    every = fields(path, "tokenizer.")
    values = {name.removeprefix(prefix): value for name, value in every.items() if name.startswith(prefix)}
    kind = values.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{path}: {prefix}model: got {kind!r}; accepted are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE)"
        )
    try:
        tokens: list[str] = _list(values, "tokens")
        named = {name: _id(values, field, len(tokens)) for name, field in _NAMED.items() if field in values}
        stops = [_id(values, field, len(tokens)) for field in _STOPS if field in values]
        if kind == "llama" and len(tokens) > 2:  # what the format says where the file does not
            named = {"unk_token": 0, "bos_token": 1, "eos_token": 2} | named
        types = _types(values, tokens, [*named.values(), *stops])
        make = _byte_level if kind == "gpt2" else _sentencepiece
        inner = make(library, values, tokens, types, named)
    except ValueError as error:
        raise ValueError(f"{path}: {prefix}{error}") from error
    for token, token_type in zip(tokens, types):
        if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            added = library.AddedToken(token, normalized=False, special=token_type != _USER_DEFINED)
            (inner.add_special_tokens if added.special else inner.add_tokens)([added])
    begins = kind == "llama" or _SPLITS[values.get("pre", "default")] == _LLAMA3
    if "bos_token" in named and values.get("add_bos_token", begins):
        bos = {"id": "bos", "ids": [named["bos_token"]], "tokens": [tokens[named["bos_token"]]]}
        inner.post_processor = library.processors.TemplateProcessing(single=["bos", "$A"], special_tokens=[bos])
    return inner, {
        "special_tokens_map": {name: tokens[i] for name, i in named.items()},
        "stop": stops,
        "chat_template": _templates(every),
    }


def _byte_level(
    library: Any, values: dict[str, Any], tokens: list[str], types: list[int], named: dict[str, int]
) -> Any:
    split = values.get("pre", "default")
    if split not in _SPLITS:
        raise ValueError(f"pre: got {split!r}; accepted are {', '.join(map(repr, _SPLITS))}")
    way = _SPLITS[split]
    merges = [tuple(merge.split(" ", 1)) for merge in _list(values, "merges")]
    try:
        model = library.models.BPE(_ids(tokens), merges, ignore_merges=way == _LLAMA3)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"merges: do not fit the tokens ({error})") from error
    inner = library.Tokenizer(model)
    steps = library.pre_tokenizers
    if way == _LLAMA3:
        parts = [steps.Split(library.Regex(_LLAMA3_PATTERN), "isolated"), steps.ByteLevel(False, use_regex=False)]
    else:
        parts = [steps.Digits(individual_digits=True)] if way == _DIGITS else []
        parts.append(steps.ByteLevel(False))
    inner.pre_tokenizer = steps.Sequence(parts)
    inner.decoder = library.decoders.ByteLevel()
    return inner


def _sentencepiece(
    library: Any, values: dict[str, Any], tokens: list[str], types: list[int], named: dict[str, int]
) -> Any:
    """As transformers converts such a vocabulary: BPE whose merges follow the scores, and bytes for unknown characters."""
    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if values.get(name):
            raise ValueError(f"{name}: got it set; accepted are vocabularies that leave text as it is")
    scores: list[float] = _list(values, "scores", len(tokens))
    ordinary = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind == _ORDINARY}
    merges = []
    for token in sorted(ordinary, key=lambda token: -scores[ordinary[token]]):
        halves = [(token[:at], token[at:]) for at in range(len(token) - 1, 0, -1)]
        merges += [(left, right) for left, right in halves if left in ordinary and right in ordinary]
    model = library.models.BPE(
        _ids(tokens),
        merges,
        unk_token=tokens[named["unk_token"]] if "unk_token" in named else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = library.Tokenizer(model)
    leading = bool(values.get("add_space_prefix", True))
    steps = library.normalizers
    inner.normalizer = steps.Sequence([*([steps.Prepend(_SPACE)] if leading else []), steps.Replace(" ", _SPACE)])
    back = library.decoders
    parts = [back.Replace(_SPACE, " "), back.ByteFallback(), back.Fuse()]
    inner.decoder = back.Sequence([*parts, *([back.Strip(" ", 1, 0)] if leading else [])])
    return inner


def _ids(tokens: Iterable[str]) -> dict[str, int]:
    """Each token's id; the first where one comes twice."""
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    return ids


def _types(values: dict[str, Any], tokens: Sequence[str], special: Iterable[int]) -> list[int]:
    if "token_type" in values:
        return _list(values, "token_type", len(tokens))
    types = [_ORDINARY] * len(tokens)
    for i in special:
        types[i] = _CONTROL
    return types


def _list(values: dict[str, Any], name: str, length: int | None = None) -> list[Any]:
    found = values.get(name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name}: {'is missing' if found is None else 'is empty'}; accepted are files that have it")
    if length is not None and len(found) != length:
        raise ValueError(f"{name}: got {len(found)} for {length} tokens; accepted is one for each")
    return found


def _id(values: dict[str, Any], name: str, count: int) -> int:
    if not 0 <= (i := int(values[name])) < count:
        raise ValueError(f"{name}: got {i}; accepted are 0 to {count - 1}, the file's tokens")
    return i


def _templates(every: dict[str, Any]) -> dict[str, str]:
    name = "tokenizer.chat_template"
    named = {field.removeprefix(f"{name}."): value for field, value in every.items() if field.startswith(f"{name}.")}
    return ({"default": every[name]} if name in every else {}) | named
