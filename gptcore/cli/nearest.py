"""``gptcore nearest``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from gptcore.cli._options import Loading


@dataclass(frozen=True, kw_only=True)
class Nearest(Loading):
    """List the tokens whose embeddings are nearest to a word's.

    A word's embedding is that of its token, as it stands in a text after a space. A word of several tokens takes the mean of
    theirs. The number is the cosine of the two embeddings: 1 for the same direction, 0 for none in common.

    For example:
      gptcore nearest --model runs/demo returns list
      gptcore nearest --model smollm2-135m-instruct --count 8 king Paris seven
    """

    words: Positional[tuple[str, ...]]
    """One word or more."""
    count: int = 10
    """Tokens to list for each word."""

    def run(self) -> int:
        from gptcore.evaluate.nearest import nearest_tokens
        from gptcore.models import Model

        model, tokenizer = self.load(Model)
        for word, tokens in zip(self.words, nearest_tokens(model, tokenizer, self.words, self.count)):
            print(f"{word}: " + ", ".join(f"{token} {cosine:.2f}" for token, cosine in tokens))
        return 0
