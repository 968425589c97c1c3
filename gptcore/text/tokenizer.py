"""Turns text into token ids and back: GPT-2's byte-pair encoding, or one that is trained on your own text.

Every tokenizer here is a byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes as in GPT-2,
Radford et al. 2019). ``tiktoken`` runs it, and ``rustbpe`` trains it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptcore._files import atomic_writer
from gptcore.weights.names import TOKENIZER

if TYPE_CHECKING:
    from gptcore.text.pretrained import PretrainedTokenizer

END_OF_TEXT = "<|endoftext|>"
"""The special token that ends every document. It is the last id of every vocabulary."""
END_OF_TURN = "<|im_end|>"
"""The special token that ends a message in ChatML, if a vocabulary has it."""

_FORMAT = "gptcore-tokenizer"
_VERSION = 1
_BYTES = 256

# The files that OpenAI released with GPT-2. tiktoken checks the same hashes when it downloads them.
_GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Tokenizer:
    """A byte-level BPE tokenizer: it encodes any text, and decoding gives the same text back.

    Args:
        name: a name for people to read.
        pattern: the regular expression that splits text into pieces. Merges never cross from one piece to the next.
        mergeable_ranks: the bytes of each ordinary token -> its id. Ids are 0, 1, 2, ... in the order of the merges, and
            all 256 single bytes must be there.
        special_tokens: name -> id of the tokens that stand for no text. Their ids follow those of ``mergeable_ranks``,
            and ``<|endoftext|>`` must be one of them.
        chat_template: a Jinja template that turns messages into a prompt; None if the model is not trained to converse.

    Raises:
        ValueError: if the ids are not contiguous from 0, a single byte or ``<|endoftext|>`` is missing,
            or the pattern is no valid regular expression.
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        mergeable_ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        chat_template: str | None = None,
    ) -> None:
        import tiktoken

        if sorted(mergeable_ranks.values()) != list(range(len(mergeable_ranks))):
            raise ValueError("mergeable_ranks must have the ids 0, 1, 2, ... each exactly once")
        missing = [byte for byte in range(_BYTES) if bytes([byte]) not in mergeable_ranks]
        if missing:
            raise ValueError(f"mergeable_ranks must hold all 256 single bytes; {len(missing)} are missing")
        self.vocab_size = len(mergeable_ranks) + len(special_tokens)
        """The number of tokens, special ones included; ids are 0 to ``vocab_size - 1``."""
        if sorted(special_tokens.values()) != list(range(len(mergeable_ranks), self.vocab_size)):
            raise ValueError(
                f"special_tokens must have the ids that follow the {len(mergeable_ranks)} ordinary tokens, "
                f"each exactly once; got {special_tokens}"
            )
        if END_OF_TEXT not in special_tokens:
            raise ValueError(f"special_tokens must hold {END_OF_TEXT!r}; got {sorted(special_tokens)}")
        self.name = name
        self.eot_token = special_tokens[END_OF_TEXT]
        """The id of ``<|endoftext|>``, which stands between documents."""
        ends = (END_OF_TEXT, END_OF_TURN)
        self.stop_tokens: tuple[int, ...] = tuple(special_tokens[end] for end in ends if end in special_tokens)
        """Ids that end generation."""
        self.special_tokens: frozenset[str] = frozenset(special_tokens)
        """The special tokens as a text may spell them."""
        self.chat_template = chat_template
        """The Jinja template that turns messages into a prompt; None if there is none."""
        self.special_tokens_map: dict[str, str] = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        """Special tokens by transformers' names."""
        self.base_size = len(mergeable_ranks)
        """The number of tokens without the special ones."""
        self._pattern = pattern
        self._mergeable_ranks = mergeable_ranks
        self._special_tokens = special_tokens
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=mergeable_ranks, special_tokens=special_tokens
            )
        except ValueError as error:
            raise ValueError(f"pattern is not a valid regular expression: {error}") from error

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"

    def encode(self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """The token ids of ``text``.

        A special token written in the text is ordinary text, so that a document may quote ``<|endoftext|>``; only the
        special tokens in ``allowed_special`` (all of them for ``"all"``) become ids.

        Raises:
            ValueError: if ``allowed_special`` names a token that is not special here.
        """
        if allowed_special == "all":
            return self._encoding.encode(text, allowed_special="all", disallowed_special=())
        unknown = set(allowed_special) - self._special_tokens.keys()
        if unknown:
            raise ValueError(
                f"allowed_special names {sorted(unknown)}; accepted are this tokenizer's special tokens, "
                f"{sorted(self._special_tokens)}"
            )
        return self._encoding.encode(text, allowed_special=set(allowed_special), disallowed_special=())

    def encode_prompt(self, text: str, *, allowed_special: Literal["all"] | Collection[str] = ()) -> list[int]:
        """The same as `encode`: models that are trained here expect no token before a text."""
        return self.encode(text, allowed_special=allowed_special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[self.encode(text) for text in texts]``, on all processor cores."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """``encode(text)`` as an array, ``(tokens,)``. It releases the GIL, so several threads can encode at once."""
        return self._encoding.encode_to_numpy(whole_characters(text), disallowed_special=())

    def special_id(self, name: str) -> int:
        """The id of a special token by transformers' name, such as ``eos_token``.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        if name not in self.special_tokens_map:
            raise ValueError(f"tokenizer: {self.name} has no {name}; accepted is one that has, such as BERT's")
        return self._special_tokens[self.special_tokens_map[name]]

    def special_ids(self, rows: int) -> dict[str, int | list[int]]:
        """The ids of special tokens as transformers' configurations name them.

        Ids of `rows` and more, for which the model has no embedding, are left out.
        """
        return {f"{name}_id": self.eot_token for name in self.special_tokens_map if self.eot_token < rows}

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids (a list, an array or a 1-D tensor). Special tokens give no text if ``skip_special``.

        Bytes that are not UTF-8, such as half a character at the end of the ids, become U+FFFD.

        Raises:
            ValueError: if an id is not in 0 to ``vocab_size - 1``.
        """
        tokens = checked_ids(ids, self.vocab_size)
        return self._encoding.decode([i for i in tokens if not skip_special or i < self.base_size], errors="replace")

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        changed = copy(self)
        changed.chat_template = template
        return changed

    @cached_property
    def fingerprint(self) -> str:
        """A hash, 32 hexadecimal digits, of the tokens, their ids and the pattern; name and template do not matter."""
        digest = hashlib.sha256()
        parts = [
            self._pattern.encode(),
            *self._tokens_in_order(),
            json.dumps(self._specials_in_order()).encode(),
        ]
        for part in parts:  # with its length first, so that different vocabularies never give the same bytes
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()[:32]

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to one JSON file, which appears complete or not at all."""
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "pattern": self._pattern,
            "special_tokens": dict(self._specials_in_order()),
            "mergeable_ranks": [base64.b64encode(token).decode() for token in self._tokens_in_order()],
        }
        if self.chat_template is not None:
            state["chat_template"] = self.chat_template
        with atomic_writer(Path(path)) as file:
            file.write(json.dumps(state, ensure_ascii=False, indent=0).encode())

    def save_huggingface(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` as transformers reads them."""
        from gptcore.text.pretrained import PretrainedTokenizer, byte_level_bpe

        inner = byte_level_bpe(self._pattern, self._tokens_in_order(), dict(self._specials_in_order()))
        names = self.special_tokens_map
        exported = PretrainedTokenizer(inner, self.name, special_tokens_map=names, chat_template=self.chat_template)
        exported.save_huggingface(folder)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer that :meth:`save` wrote, from a file or from the ``tokenizer.json`` in a folder.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, damaged, or not one of ours.
        """
        path = Path(path)
        if path.is_dir():
            path = path / TOKENIZER
        if not path.exists():
            raise FileNotFoundError(f"there is no tokenizer file at {path}")
        state = _read_state(path)
        try:
            ranks = {base64.b64decode(token, validate=True): i for i, token in enumerate(state["mergeable_ranks"])}
            template = state.get("chat_template")
            if not isinstance(template, str | None):
                raise ValueError(f"chat_template is {template!r}; it must be a text")
            tokenizer = cls(state["name"], state["pattern"], ranks, state["special_tokens"], template)
        except (KeyError, TypeError, AttributeError, ValueError, binascii.Error) as error:
            raise ValueError(f"{path} is a damaged tokenizer file: {error!r}") from error
        check_fingerprint(path, tokenizer.fingerprint, state.get("fingerprint"))
        return tokenizer

    @classmethod
    def gpt2(cls, vocab_dir: str | Path | None = None) -> Tokenizer:
        """The tokenizer of GPT-2: 50,257 tokens.

        Args:
            vocab_dir: a folder with ``encoder.json`` and ``vocab.bpe``. Without it, tiktoken reads the vocabulary from
                its cache (the folder ``TIKTOKEN_CACHE_DIR``), or downloads it into that cache.

        Raises:
            FileNotFoundError: if ``vocab_dir`` lacks one of the two files.
            ValueError: if one of them is not the file that was released with GPT-2.
            ConnectionError: if there is no ``vocab_dir``, no cached copy and no connection.
        """
        from tiktoken_ext import openai_public

        if vocab_dir is not None:
            ids = _read_gpt2_ids(Path(vocab_dir))
            special = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
            return cls("gpt2", openai_public.r50k_pat_str, _ranks_from_unicode(ids), special)
        try:
            arguments = openai_public.gpt2()  # the arguments that tiktoken.get_encoding("gpt2") passes to Encoding
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"GPT-2's vocabulary is not on this machine and could not be downloaded: {error}\n"
                "Do one of these: run `gptcore fetch gpt2-bpe`; connect to the internet once, and tiktoken caches it; "
                "set TIKTOKEN_CACHE_DIR to a folder with tiktoken's cached copy; or put encoder.json and vocab.bpe "
                "in a folder and call Tokenizer.gpt2(vocab_dir=folder). "
                "Training your own tokenizer ('bpe') needs none of this."
            ) from error
        return cls("gpt2", arguments["pat_str"], arguments["mergeable_ranks"], arguments["special_tokens"])

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, pattern: str | None = None, name: str = "bpe"
    ) -> Tokenizer:
        """Train a tokenizer on a stream of texts, which is read once.

        The vocabulary is the 256 bytes, then the merges, the most frequent first, then ``<|endoftext|>``. A small corpus
        may have too few pairs to merge: then a ``UserWarning`` comes, and the tokenizer has fewer tokens.

        Args:
            texts: the corpus. Merges never cross from one text to the next.
            vocab_size: the number of tokens, ``<|endoftext|>`` included; at least 257.
            pattern: the regular expression that splits text into pieces before merging; None takes GPT-4's.
            name: a name for people to read.

        Raises:
            ValueError: if ``vocab_size`` is less than 257, the corpus holds no text, or the pattern is invalid.
        """
        import rustbpe

        if vocab_size < _BYTES + 1:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}); got {vocab_size}")
        characters = 0
        given_up = threading.Event()

        def counted() -> Iterator[str]:
            nonlocal characters
            for text in texts:
                if given_up.is_set():
                    raise InterruptedError
                characters += len(text)
                yield text

        trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue] - compiled, no stubs
        # The trainer holds a buffer of texts in memory. Our texts may be long, so the buffer is short.
        train = partial(trainer.train_from_iterator, counted(), vocab_size - 1, buffer_size=256, pattern=pattern)
        try:
            _call_in_thread(train)
        except KeyboardInterrupt:
            given_up.set()
            raise
        if characters == 0:
            raise ValueError("cannot train a tokenizer: the corpus is empty")

        ranks: dict[bytes, int] = {}
        for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1]):
            # Two merges can give the same bytes: the first one gets the id, so that ids stay contiguous.
            ranks.setdefault(bytes(token), len(ranks))
        if len(ranks) + 1 < vocab_size:
            warnings.warn(
                f"the corpus has too few pairs to merge for vocab_size={vocab_size}: "
                f"the tokenizer has {len(ranks) + 1} tokens",
                stacklevel=2,
            )
        return cls(name, trainer.get_pattern(), ranks, {END_OF_TEXT: len(ranks)})

    def _tokens_in_order(self) -> list[bytes]:
        return sorted(self._mergeable_ranks, key=self._mergeable_ranks.__getitem__)

    def _specials_in_order(self) -> list[tuple[str, int]]:
        return sorted(self._special_tokens.items(), key=lambda item: item[1])


def _call_in_thread(function: Callable[[], None]) -> None:
    """Call a function in a thread, and wait for it. Ctrl-C ends the wait and not the thread.

    Compiled code that runs in the main thread for minutes would delay Ctrl-C until it returns.
    """
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:  # raised again in the main thread, below
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)  # a daemon thread does not keep the process from exiting
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def get_tokenizer(name_or_path: str | Path) -> Tokenizer | PretrainedTokenizer:
    """Load a tokenizer.

    Args:
        name_or_path: ``"gpt2"``, a tokenizer file (ours or Hugging Face's), a folder with a ``tokenizer.json`` or with an
            adapter, whose base has one, a GGUF file, or a model that ``gptcore fetch`` brought. GPT-2's vocabulary is taken
            from ``gptcore fetch gpt2-bpe`` if that was run.

    Raises:
        FileNotFoundError: if there is no such tokenizer; otherwise as :meth:`Tokenizer.gpt2` and :meth:`Tokenizer.load`.
    """
    from gptcore import assets
    from gptcore.text.pretrained import FORMAT, PretrainedTokenizer
    from gptcore.weights import is_adapter, locate, locate_base

    if str(name_or_path) == "gpt2":
        return Tokenizer.gpt2(assets.find("gpt2-bpe"))
    path = Path(name_or_path).expanduser()
    if not path.exists() and (fetched := assets.find(str(name_or_path))):
        path = locate(fetched)
    if path.suffix == ".gguf" and path.is_file():
        return PretrainedTokenizer.from_gguf(path)
    if path.is_dir():
        if not (path / TOKENIZER).exists() and is_adapter(path):
            return get_tokenizer(locate_base(path))
        path = path / TOKENIZER
    if not path.exists():
        raise FileNotFoundError(
            f"tokenizer must be 'gpt2', a tokenizer file, a folder with a {TOKENIZER} or a .gguf file; "
            f"got {str(name_or_path)!r}, where there is none"
        )
    state = _read_json(path)
    is_hugging_face = isinstance(state, dict) and "format" not in state and "model" in state
    if is_hugging_face or (isinstance(state, dict) and state.get("format") == FORMAT):
        return PretrainedTokenizer.from_state(state, path)
    return Tokenizer.load(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # broken JSON, or bytes that are not text
        raise ValueError(f"{path} is not a tokenizer file, or is truncated: {error}") from error


def _read_state(path: Path) -> dict[str, Any]:
    """The JSON object in a tokenizer file of our format and version."""
    state = _read_json(path)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f'{path} is not a gptcore tokenizer file (no "format": "{_FORMAT}" in it)')
    if state.get("version") != _VERSION:
        raise ValueError(f"{path} has format version {state.get('version')!r}; this gptcore reads {_VERSION}")
    return state


def _read_gpt2_ids(folder: Path) -> dict[str, int]:
    """The contents of ``encoder.json``, after the hashes of both files have been checked."""
    contents = {}
    for name, expected in _GPT2_SHA256.items():
        path = folder / name
        if not path.exists():
            raise FileNotFoundError(f"vocab_dir must hold {' and '.join(_GPT2_SHA256)}; there is no {path}")
        contents[name] = path.read_bytes()
        actual = hashlib.sha256(contents[name]).hexdigest()
        if actual != expected:
            raise ValueError(f"{path} is not GPT-2's {name}: its sha256 is {actual}, not {expected}")
    return json.loads(contents["encoder.json"])  # the ids have the order of the merges in vocab.bpe


def _byte_spelling() -> dict[int, str]:
    """Byte -> the character that stands for it in GPT-2's files.

    A byte whose Latin-1 character is printable and no space stands for itself. The other bytes have the characters from
    U+0100 on, in order (Radford et al. 2019, ``bytes_to_unicode`` in the released code).
    """
    plain = [byte for byte in range(_BYTES) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(_BYTES) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(_BYTES + i) for i, byte in enumerate(others)}


BYTE_SPELLING = _byte_spelling()


def _ranks_from_unicode(ids: dict[str, int]) -> dict[bytes, int]:
    byte_of = {character: byte for byte, character in BYTE_SPELLING.items()}
    return {bytes(byte_of[character] for character in token): i for token, i in ids.items()}


def whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs, which command lines and JSON may hold, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids as a list. Raises ``ValueError`` if one is not in 0 to ``vocab_size - 1``."""
    tokens = [int(token) for token in ids]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is not in the vocabulary (0 to {vocab_size - 1})")
    return tokens


def check_fingerprint(path: Path, actual: str, stated: Any) -> None:
    """Raise ``ValueError`` if the fingerprint of a tokenizer file's contents is not the one that it states."""
    if actual != stated:
        raise ValueError(
            f"{path} is a damaged tokenizer file: its contents have the fingerprint {actual}, but it says {stated!r}"
        )
