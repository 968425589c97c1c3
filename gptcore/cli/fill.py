"""``gptcore fill``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from gptcore.cli._options import Loading


@dataclass(frozen=True, kw_only=True)
class Fill(Loading):
    """Guess the word at each [MASK] of a text with a BERT.

    For example:
      gptcore fill --model runs/bert "The function returns a [MASK]."
      gptcore fill --model bert-base-uncased --count 3 "The [MASK] of France is [MASK]."
    """

    text: Positional[str]
    """Text with one [MASK] or more."""
    count: int = 5
    """Words to show for each [MASK]."""

    def run(self) -> int:
        from gptcore.generate.fill import fill
        from gptcore.models import BERT

        model, tokenizer = self.load(BERT)
        for number, words in enumerate(fill(model, tokenizer, self.text, self.count), start=1):
            print(f"{number}  " + ", ".join(f"{word} {share:.1%}" for word, share in words))
        return 0
