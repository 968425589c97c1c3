"""Generation with text in and out: whole characters as they become certain, stop strings, batches of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gptcore.generate.decode import generate_stream, pad_left

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.text.pretrained import PretrainedTokenizer
    from gptcore.text.tokenizer import Tokenizer


class _Text:
    """The text of one row as its tokens come: whole characters, nothing that may turn out to be a stop string, and
    nothing for special tokens and for ids that the tokenizer does not have (rows that pad a model's vocabulary).

    `before` are the tokens that it goes on from: some decoders leave out the space at the beginning of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer | PretrainedTokenizer, stop: Sequence[str], before: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.finished = False
        # Whole characters, decoded again with what comes.
        self._before = [i for i in before if i < tokenizer.vocab_size]
        self._open: list[int] = []  # tokens since then; the last may end inside a character
        self._taken = len(self._decoded())  # how much of their text has been taken
        self._waited = 0  # for how many tokens nothing was
        self._held = ""  # text that may be the beginning of a stop string

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._before + self._open, skip_special=True)

    def push(self, token: int) -> str:
        """The text that `token` makes certain; sets `finished` at a stop token or string, which are not part of it."""
        if self.finished:
            return ""
        if token in self.tokenizer.stop_tokens:
            return self.end()
        if token >= self.tokenizer.vocab_size:
            return ""
        self._open.append(token)
        decoded = self._decoded()
        certain = len(decoded.rstrip("\ufffd"))  # what follows may be bytes of a character that is not there yet
        self._waited = 0 if certain > self._taken else self._waited + 1
        if self._waited == 4:  # a character has at most four bytes
            certain, self._waited = len(decoded), 0
        text = decoded[self._taken : certain]
        self._taken = max(self._taken, certain)
        if text and certain == len(decoded):
            self._before, self._open = self._open, []
            self._taken = len(self._decoded())
        self._held += text
        places = [place for place in map(self._held.find, self.stop) if place >= 0]
        if places:
            self.finished = True
            return self._held[: min(places)]
        keep = max((_overlap(self._held, text) for text in self.stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        self.finished = True
        return self._held + self._decoded()[self._taken :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
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
    """Yields the continuation of `prompt`, token ids, in pieces of whole characters as they become certain.

    Ends at one of the tokenizer's stop tokens or before one of the strings in `stop`, neither of which is yielded, nor are
    other special tokens; ids that the tokenizer does not have are nothing. The other arguments and errors are those of
    `generate`.

    Args:
        continues: what is yielded goes on from the prompt's text, with a space before it where one belongs; False: it is a
            text of its own, as a reply is.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
    stream = generate_stream(model, ids, max_new_tokens, stop=tokenizer.stop_tokens, **sampling)

    def pieces() -> Iterator[str]:
        text = _Text(tokenizer, stop, prompt if continues else ())
        for new in stream:
            if piece := text.push(int(new[0])):
                yield piece
            if text.finished:
                return
        if piece := text.end():
            yield piece

    return pieces()


def generate_text(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> list[str]:
    """The continuation of each of `prompts`, in one batch whatever their lengths; arguments as `stream_text`."""
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    tokens, padding = pad_left(ids)
    device = next(model.parameters()).device
    texts = [_Text(tokenizer, stop, before) for before in ids]
    shown = [""] * len(prompts)
    stream = generate_stream(
        model, tokens.to(device), max_new_tokens, padding=padding, stop=tokenizer.stop_tokens, **sampling
    )
    for new in stream:
        for row, token in enumerate(new.tolist()):
            shown[row] += texts[row].push(token)
        if all(text.finished for text in texts):
            break
    return [done if text.finished else done + text.end() for done, text in zip(shown, texts)]
