"""Tokenizers: text to token ids and back."""

from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer

__all__ = ["END_OF_TEXT", "PretrainedTokenizer", "Tokenizer", "get_tokenizer"]
