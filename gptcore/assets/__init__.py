"""Data, vocabularies and weights that `gptcore fetch` brings: the catalogue and the download."""

from gptcore.assets.catalogue import CATALOGUE, Entry
from gptcore.assets.download import cache_folder, fetch, find, table

__all__ = ["CATALOGUE", "Entry", "cache_folder", "fetch", "find", "table"]
