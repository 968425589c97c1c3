"""Data, vocabularies and weights that `gptcore fetch` downloads: the catalogue, and the download itself."""

from gptcore.assets.catalogue import CATALOGUE, Entry
from gptcore.assets.download import cache_folder, fetch, find, table

__all__ = ["CATALOGUE", "Entry", "cache_folder", "fetch", "find", "table"]
