"""Conversations as token ids, the same for chat and for training, and the chat templates for models without one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from gptcore.text.chat_template import Message, render

if TYPE_CHECKING:
    from gptcore.text.pretrained import PretrainedTokenizer
    from gptcore.text.tokenizer import Tokenizer

TemplateName = Literal["auto", "alpaca", "chatml"]

_ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class Example(NamedTuple):
    """A conversation to learn from."""

    ids: list[int]
    """The conversation up to the end of its last reply."""
    replies: list[range]
    """For each of the assistant's messages the indices of its tokens in `ids`: its text and the stop token after it."""


class ChatFormat:
    """Turns conversations into token ids by a tokenizer's chat template.

    Text of a message that spells a special token, such as ``<|im_end|>``, stays text: only the template writes special tokens.

    Args:
        tokenizer: has a chat template.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, tokenizer: Tokenizer | PretrainedTokenizer) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "model: has no chat template, so it was not trained to converse; accepted are models with a chat template "
                "(one of several must be named 'default')"
            )
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template
        self._special = {"eos_token": tokenizer.decode([tokenizer.eot_token]), **tokenizer.special_tokens_map}
        self._stops = [text for token in tokenizer.stop_tokens if (text := tokenizer.decode([token]))]
        names = "|".join(re.escape(name) for name in tokenizer.special_tokens if len(name) > 1)
        # Finds the first character of each special token, also of those that overlap.
        self._spelled = re.compile(f"(?=(?:{names}))(.)", re.DOTALL) if names else None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids after which the model writes the assistant's next message.

        Raises:
            ValueError: the template refuses the messages.
        """
        marked, mark = self._marked(messages)
        text = self._render(marked, reply=True)
        try:
            before, ids, _ = self._replies(marked, mark)
            return self._extended(before, ids, text, mark)
        except ValueError:  # the template changes earlier messages, so that the conversation has no fixed beginning
            return self._encode(text, mark)

    def example(self, messages: Sequence[Message]) -> Example:
        """Returns a conversation's ids, and which of them are replies. Before each reply stand the ids of `prompt`.

        Raises:
            ValueError: the template refuses the messages, or does not allow to tell the replies from the rest.
        """
        _, ids, replies = self._replies(*self._marked(messages))
        return Example(ids, replies)

    def _replies(self, messages: list[Message], mark: str) -> tuple[str, list[int], list[range]]:
        """Returns text and ids up to the end of the last reply, and the indices of the replies."""
        text, ids, replies = "", [], []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:turn], reply=True)
            ids = self._extended(text, ids, prompt, mark)
            whole = self._render(messages[: turn + 1], reply=False)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"chat_template: message {turn + 1}: the conversation with the reply does not begin with the one before it, "
                    "so that the reply's tokens cannot be told from the rest; accepted are templates that only append"
                )
            ends = [(at, at + len(stop)) for stop in self._stops if (at := whole.find(stop, len(prompt))) >= 0]
            if not ends:
                raise ValueError(
                    f"chat_template: message {turn + 1}: no stop token follows the reply, so that the model would not learn to "
                    f"stop; accepted are templates that end it with {' or '.join(self._stops)}"
                )
            start, text = len(ids), whole[: min(ends)[1]]
            ids = self._extended(prompt, ids, text, mark)
            replies.append(range(start, len(ids)))
        return text, ids, replies

    def _extended(self, before: str, ids: list[int], text: str, mark: str) -> list[int]:
        """Returns the ids of `text`, of which `before` is the beginning and has these `ids`.

        Where the tokens of the whole text begin with others, because one spans the boundary, the rest is encoded by itself.
        """
        if not text.startswith(before):
            raise ValueError(
                "chat_template: changes the earlier messages of a longer conversation; accepted are templates that only append"
            )
        whole = self._encode(text, mark)
        return whole if whole[: len(ids)] == ids else ids + self._encode(text[len(before) :], mark)

    def _encode(self, text: str, mark: str) -> list[int]:
        parts = text.split(mark) if mark else [text]
        # Not encode_prompt: the template writes BOS itself.
        return [token for part in parts for token in self.tokenizer.encode(part, allowed_special="all")]

    def _render(self, messages: list[Message], reply: bool) -> str:
        return render(self.template, messages, special_tokens=self._special, reply=reply)

    def _marked(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Returns the messages with a mark inside each special token that their text spells, and the mark.

        The mark is "" if they spell none. `_encode` splits the text there, so that neither half is a special token.
        """
        spelled = self._spelled
        if spelled is None or not any(spelled.search(message["content"]) for message in messages):
            return list(messages), ""
        # Unicode keeps U+FDD0 to U+FDEF free for such uses: they are in no text that is meant to be exchanged.
        used = {character for message in messages for character in message["content"]}
        mark = next(character for character in map(chr, range(0xFDD0, 0xFDF0)) if character not in used)
        return [
            {"role": message["role"], "content": spelled.sub(rf"\1{mark}", message["content"])} for message in messages
        ], mark


def with_template(
    tokenizer: Tokenizer | PretrainedTokenizer, name: TemplateName
) -> tuple[Tokenizer | PretrainedTokenizer, str]:
    """Returns the tokenizer with the chat template of this name, and a line that says which it is.

    Args:
        tokenizer: the base's.
        name: ``alpaca``, headings in plain text, for any tokenizer; ``chatml``, with the tokens ``<|im_start|>`` and
            ``<|im_end|>``; ``auto``, the tokenizer's own, or alpaca if it has none.

    Raises:
        ValueError: chatml for a tokenizer that lacks its tokens.
    """
    if name == "auto" and tokenizer.chat_template is not None:
        return tokenizer, "the chat template is the base's own"
    if name == "chatml":
        missing = [token for token in _CHATML_TOKENS if token not in tokenizer.special_tokens]
        if missing:
            raise ValueError(
                f"template: got 'chatml' for a tokenizer without the special token {' and '.join(missing)}; "
                "accepted are 'alpaca', or a base whose tokenizer has them"
            )
    around = tokenizer.encode_prompt("a")  # some models expect a token before each text
    has_bos = "bos_token" in tokenizer.special_tokens_map and tokenizer.special_id("bos_token") == around[0]
    begins = "{{ bos_token }}" if has_bos else ""
    text = begins + (_CHATML if name == "chatml" else _ALPACA)
    remark = "the base has no chat template: alpaca is used" if name == "auto" else f"the chat template is {name}"
    return tokenizer.with_chat_template(text), remark
