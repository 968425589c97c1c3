"""Small tokenizers: of single bytes, and others made with Hugging Face's library."""

from __future__ import annotations

from typing import Any

from gptcore.text import END_OF_TEXT, Tokenizer


def of_bytes(*special: str) -> Tokenizer:
    """Each byte is a token; then come the special tokens, the last of which ends a text."""
    ids = {token: 256 + i for i, token in enumerate((*special, END_OF_TEXT))}
    return Tokenizer("bytes", r"[\s\S]", {bytes([byte]): byte for byte in range(256)}, ids)


def byte_level(*special: str) -> Any:
    """A byte-level BPE without merges, and these special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return made


def with_bos(made: Any, bos: str) -> Any:
    """`made`, which now puts `bos` before a prompt."""
    from tokenizers import processors

    special = [(bos, made.token_to_id(bos))]
    made.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=special)
    return made
