"""A conversation with a model, and the loop that `gptcore chat` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gptcore.text.chat_format import ChatFormat
from gptcore.text.chat_template import Message

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.text.pretrained import PretrainedTokenizer
    from gptcore.text.tokenizer import Tokenizer


class Chat:
    """A conversation with a model.

    Args:
        model: the model.
        tokenizer: the model's tokenizer, which must have a chat template.
        system: the system message, which comes before the first turn; None leaves it to the template.
        max_new_tokens: longest reply. The context must hold it beside the conversation. None: 256, or half the context if that
            is less.
        sampling: fields of `gptcore.generate.Sampling`.

    Raises:
        ValueError: a tokenizer without a chat template, a template that refuses the system message, or a context that
            cannot hold a reply.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | PretrainedTokenizer,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> None:
        self._format = ChatFormat(tokenizer)
        if max_new_tokens is None:
            max_new_tokens = min(256, model.config.context // 2)
        if not 0 < max_new_tokens < model.config.context:
            raise ValueError(
                f"max_new_tokens: got {max_new_tokens}; accepted are 1 to {model.config.context - 1}, one less than the context"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Message] = []
        self._prompt([{"role": "user", "content": "Hello"}])  # raises now if the template refuses the system message
        self.forgotten = 0
        """Number of the oldest messages that were dropped, because they no longer fit into the context."""

    def reset(self) -> None:
        """Forgets the conversation and keeps the system message."""
        self.turns, self.forgotten = [], 0

    def reply(self, text: str) -> Iterator[str]:
        """Yields the model's answer to `text` in pieces, then adds message and answer to the conversation.

        Raises:
            ValueError: a message that does not fit into the context even alone; the conversation stays as it was.
        """
        from gptcore.generate import stream_text

        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        room = self.model.config.context - self.max_new_tokens
        dropped = 0
        while len(prompt := self._prompt(turns[dropped:])) > room:
            dropped += 2  # a question and its answer
            if dropped >= len(turns):
                raise ValueError(f"message: got {len(prompt)} tokens; accepted are up to {room} beside a reply")
        answer = ""
        stream = stream_text(self.model, self.tokenizer, prompt, self.max_new_tokens, continues=False, **self.sampling)
        for piece in stream:
            answer += piece
            yield piece
        self.turns = [*turns[dropped:], {"role": "assistant", "content": answer}]
        self.forgotten += dropped

    def _prompt(self, turns: list[Message]) -> list[int]:
        return self._format.prompt(self.system + turns)


def converse(chat: Chat, ask: Callable[[], str], show: Callable[[str], None]) -> None:
    """Reads messages and shows the model's answers until the input ends or ``/quit``. ``/reset`` begins anew.

    Args:
        chat: the conversation.
        ask: returns the next message; EOFError ends the loop.
        show: prints a piece of text.
    """
    while True:
        try:
            text = ask().strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
            show("(a new conversation)\n")
        elif text:
            before = chat.forgotten
            try:
                for piece in chat.reply(text):
                    show(piece)
            except ValueError as error:
                show(f"({error})")
            except KeyboardInterrupt:  # ends the reply and not the conversation
                show("\n(interrupted)")
            finally:
                show("\n")
            if chat.forgotten > before:
                show(f"(the oldest {chat.forgotten} messages no longer fit into the context)\n")
