"""``gptcore embed``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from gptcore.cli._options import Loading


@dataclass(frozen=True, kw_only=True)
class Embed(Loading):
    """Turn texts into vectors with a BERT and compare them.

    The table shows the cosine of each pair of vectors.

    For example:
      gptcore fetch minilm-l6 && gptcore embed --model minilm-l6 "A cat sleeps." "A kitten is asleep." "Shares fell today."
      gptcore embed --model minilm-l6 --out vectors.safetensors "one text" "another"
    """

    texts: Positional[tuple[str, ...]]
    """One text or more."""
    out: Path | None = None
    """Safetensors file to write the vectors to: `vectors` (texts, width) float32."""

    def run(self) -> int:
        from safetensors.torch import save

        from gptcore._files import atomic_writer
        from gptcore.evaluate.embed import embed, similarity_table
        from gptcore.models import BERT

        model, tokenizer = self.load(BERT)
        vectors = embed(model, tokenizer, self.texts)
        print(similarity_table(self.texts, vectors))
        if self.out is not None:
            with atomic_writer(self.out) as file:
                file.write(save({"vectors": vectors}))
            print(f"{self.out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")
        return 0
