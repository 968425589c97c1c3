"""``gptcore tokens``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Show the tokens of a text.

    A token is shown between bars, its id below. A part of a character is shown as �.

    For example:
      gptcore tokens --tokenizer data/python-docs "The function returns a list."
      gptcore tokens --tokenizer smollm2-135m-instruct "unbelievably"
    """

    text: Positional[str]
    """The text."""
    tokenizer: str
    """gpt2, a tokenizer file, a folder with a tokenizer.json, a .gguf file, or a model that gptcore fetch brought."""

    def run(self) -> int:
        from gptcore.text import get_tokenizer

        tokenizer = get_tokenizer(self.tokenizer)
        ids = tokenizer.encode(self.text)
        print("|" + "|".join(tokenizer.decode([i]) for i in ids) + "|")
        print(" ".join(map(str, ids)))
        size = len(self.text.encode())
        print(f"{len(ids)} tokens, {size} bytes" + (f", {size / len(ids):.2f} bytes per token" if ids else ""))
        return 0
