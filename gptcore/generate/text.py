"""Generates text from text: streams of whole characters, stop strings, batches of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gptcore.generate.decode import generate_stream, pad_left

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.text.pretrained import PretrainedTokenizer
    from gptcore.text.tokenizer import Tokenizer


class _StreamDecoder:
    """Decodes the tokens of one row as they come, and returns only text that later tokens cannot change.

    It holds back the bytes of an incomplete character, and text that may become a stop string. Special tokens give no
    text, nor do ids that the tokenizer does not have (rows that pad a model's vocabulary).

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end the text.
        before: the tokens before the text, whose text is not returned. Some decoders drop a space at the beginning of a
            text, so that a continuation must be decoded with the tokens before it.
    """

    def __init__(
        self, tokenizer: Tokenizer | PretrainedTokenizer, stop: Sequence[str], before: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.finished = False
        self._before = [
            i for i in before if i < tokenizer.vocab_size
        ]  # whole characters, decoded again with new tokens
        self._open: list[int] = []  # the tokens after them; the last may end inside a character
        self._taken = len(self._decoded())  # characters of the decoded text that were returned or are held
        self._waited = 0  # tokens since the last complete character
        self._held = ""  # text that may be the beginning of a stop string

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._before + self._open, skip_special=True)

    def push(self, token: int) -> str:
        """Adds a token, and returns the new text. A stop token or stop string sets `finished`, and is not returned."""
        if self.finished:
            return ""
        if token in self.tokenizer.stop_tokens:
            return self.end()
        if token >= self.tokenizer.vocab_size:
            return ""
        self._open.append(token)
        decoded = self._decoded()
        complete = len(decoded.rstrip("\ufffd"))  # U+FFFD at the end may be the beginning of an incomplete character
        self._waited = 0 if complete > self._taken else self._waited + 1
        if self._waited == 4:  # a character has at most four bytes: these are no characters
            complete, self._waited = len(decoded), 0
        text = decoded[self._taken : complete]
        self._taken = max(self._taken, complete)
        if text and complete == len(decoded):
            self._before, self._open = self._open, []
            self._taken = len(self._decoded())
        self._held += text
        found = [position for position in map(self._held.find, self.stop) if position >= 0]
        if found:
            self.finished = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, text) for text in self.stop), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def end(self) -> str:
        """Ends the text, and returns what was held back."""
        self.finished = True
        return self._held + self._decoded()[self._taken :]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    continues: bool = True,
    **sampling: Any,
) -> Iterator[str]:
    """Yields the continuation of a prompt in pieces of whole characters, as soon as they are complete.

    It ends at one of the tokenizer's stop tokens, or before one of the stop strings. Neither is yielded, nor are other
    special tokens.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        prompt: the ids of the prompt.
        max_new_tokens: number of tokens to generate at most.
        stop: strings that end the text.
        continues: True: the text goes on from the prompt, with a space before it where one belongs. False: it is a text
            of its own, as a reply is.
        sampling: as for `generate`, whose errors this raises too.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
    stream = generate_stream(model, ids, max_new_tokens, stop=tokenizer.stop_tokens, **sampling)

    def pieces() -> Iterator[str]:
        decoder = _StreamDecoder(tokenizer, stop, prompt if continues else ())
        for new in stream:
            if piece := decoder.push(int(new[0])):
                yield piece
            if decoder.finished:
                return
        if piece := decoder.end():
            yield piece

    return pieces()


def generate_text(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> list[str]:
    """Returns the continuation of each prompt, a text or its ids.

    The prompts run in one batch; other arguments are those of `stream_text`.
    """
    ids = [tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    tokens, padding = pad_left(ids)
    device = next(model.parameters()).device
    decoders = [_StreamDecoder(tokenizer, stop, before) for before in ids]
    texts = [""] * len(prompts)
    stream = generate_stream(
        model, tokens.to(device), max_new_tokens, padding=padding, stop=tokenizer.stop_tokens, **sampling
    )
    for new in stream:
        for row, token in enumerate(new.tolist()):
            texts[row] += decoders[row].push(token)
        if all(decoder.finished for decoder in decoders):
            break
    return [text if decoder.finished else text + decoder.end() for text, decoder in zip(texts, decoders)]
