"""Text that `gptcore prepare` made, for the tasks that learn from text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gptcore.data.prepare import open_split
from gptcore.data.report import read_report
from gptcore.data.token_file import TokenFile
from gptcore.text import PretrainedTokenizer, Tokenizer
from gptcore.text.tokenizer import TOKENIZER, get_tokenizer


class PreparedText:
    """Token files, tokenizer and report of a prepared folder.

    Args:
        folder: the folder that ``gptcore prepare --out`` made.
        context: tokens of a row.
        expected: the tokenizer of a base that is fine-tuned, which must be the folder's too; None: any.

    Raises:
        ValueError: a folder whose files do not belong together, too little text for one row, or another tokenizer.
        FileNotFoundError: a file that is missing.
    """

    def __init__(self, folder: Path, context: int, expected: Tokenizer | PretrainedTokenizer | None = None) -> None:
        self.folder = folder
        self.report = read_report(folder)
        self.tokenizer = get_tokenizer(folder / TOKENIZER)
        if expected is not None and expected.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(
                f"data: {folder} was prepared with the tokenizer {self.tokenizer.name}; accepted is the base's, "
                f"{expected.name} (gptcore prepare --tokenizer FOLDER_OF_THE_BASE)"
            )
        self.train, self.val = self._open("train", context), self._open("val", context)

    @property
    def digest(self) -> str:
        """Changes with the tokens; see `TokenFile.digest`."""
        return f"{self.train.digest()}-{self.val.digest()}"

    @property
    def fingerprint(self) -> str:
        """Changes with the tokenizer."""
        return self.tokenizer.fingerprint

    @property
    def baseline(self) -> tuple[str, float]:
        """The loss of a model that only knows the frequency of each token, nats per token."""
        return "unigram entropy", self.report.unigram_entropy

    def _open(self, split: Literal["train", "val"], context: int) -> TokenFile:
        """Opens the token files of a split. They must come from the tokenizer and hold enough for one row."""
        tokens = open_split(self.folder, split)
        if tokens.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(f"data: {tokens.path} was made with another tokenizer than {self.folder / TOKENIZER}")
        next(tokens.windows(context))
        return tokens
