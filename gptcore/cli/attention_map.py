"""``gptcore attention-map``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from gptcore.cli._options import Loading


@dataclass(frozen=True, kw_only=True)
class AttentionMap(Loading):
    """Draw which tokens of a text attend to which.

    The picture, a PNG or SVG, has a heatmap for each layer and head.

    For example:
      gptcore attention-map --model runs/demo "The function returns a list"
      gptcore attention-map --model smollm2-135m-instruct --layers 5 --heads 3 "The cat sat because it was tired"
    """

    text: Positional[str]
    """Text that the model reads; up to 512 tokens, the most that the picture can show."""
    out: Path = Path("attention.png")
    """File of the picture."""
    layers: UseAppendAction[tuple[int, ...]] = ()
    """Layer to draw, counted from 0; repeat it for several; all if left out."""
    heads: UseAppendAction[tuple[int, ...]] = ()
    """Head to draw, counted from 0; repeat it for several; all if left out. With one layer and head the tokens are shown."""

    def run(self) -> int:
        from gptcore.evaluate.attention_map import draw_attention
        from gptcore.models import GPT

        model, tokenizer = self.load(GPT, attention_impl="explicit")
        chosen = {"layers": self.layers or None, "heads": self.heads or None}
        weights = draw_attention(model, tokenizer, self.text, self.out, **chosen)
        layers, heads, tokens, _ = weights.shape
        print(f"{self.out}: {layers} layers, {heads} heads, {tokens} tokens")
        return 0
