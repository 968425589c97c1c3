"""Trains a WordPiece tokenizer, BERT's kind, with the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Iterable

from gptcore import _extras
from gptcore.text.pretrained import PretrainedTokenizer

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""BERT's special tokens by transformers' names. Their ids are 0 to 4."""


def train_wordpiece(texts: Iterable[str], vocab_size: int, *, name: str = "wordpiece") -> PretrainedTokenizer:
    """Trains a tokenizer of lower-case word pieces. ``[SEP]`` ends a text.

    Args:
        texts: the corpus, which is read once.
        vocab_size: the number of tokens, the five special tokens included.
        name: a name for people to read.

    Raises:
        ValueError: a corpus without text.
        MissingPackageError: the ``tokenizers`` package is missing.

    Source: Devlin et al., "BERT", arXiv 1810.04805; the pieces: Wu et al., "Google's Neural Machine Translation System",
    arXiv 1609.08144.
    """
    library = _extras.load("tokenizers", "a WordPiece tokenizer")
    inner = library.Tokenizer(library.models.WordPiece(unk_token=SPECIAL["unk_token"]))
    inner.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    inner.decoder = library.decoders.WordPiece()
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    inner.train_from_iterator(counted(), trainer)
    if characters == 0:
        raise ValueError("cannot train a tokenizer: the corpus is empty")
    begin, end = (inner.token_to_id(SPECIAL[name]) for name in ("cls_token", "sep_token"))
    inner.post_processor = library.processors.BertProcessing((SPECIAL["sep_token"], end), (SPECIAL["cls_token"], begin))
    return PretrainedTokenizer(inner, name, special_tokens_map=SPECIAL)
