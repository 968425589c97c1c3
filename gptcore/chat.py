"""Talking with a model: messages to a prompt by the model's own template, and the loop that `gptcore chat` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.pretrained_tokenizer import PretrainedTokenizer
    from gptcore.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


def render(template: str, messages: list[Message], *, reply: bool = True) -> str:
    """The text that `template`, a model's Jinja chat template, makes of `messages`; with `reply` up to where the
    assistant's next turn begins.

    Templates come with weights from anywhere, so they run in Jinja's sandbox.

    Raises:
        ValueError: a template that is invalid, or refuses these messages; with its own words.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=reply)
    except TemplateError as error:
        raise ValueError(f"chat_template: {error}") from error


class Chat:
    """A conversation with a model.

    Args:
        model, tokenizer: the tokenizer must have a chat template.
        system: what the model is told before the first turn; None leaves it to the template.
        max_new_tokens: longest reply; the context must hold it beside the conversation.
        sampling: fields of `gptcore.generate.Sampling`.

    Raises:
        ValueError: a tokenizer without a chat template, or a context that cannot hold a reply.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | PretrainedTokenizer,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "model: has no chat template, it was not trained to converse; accepted are models with one"
            )
        if not 0 < max_new_tokens < model.config.context:
            raise ValueError(
                f"max_new_tokens: got {max_new_tokens}; accepted are 1 to {model.config.context - 1}, less than the context"
            )
        self.model, self.tokenizer, self.template = model, tokenizer, tokenizer.chat_template
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Message] = []
        self.forgotten = 0
        """How many of the oldest messages no longer fit into the context."""

    def reset(self) -> None:
        """Forgets the conversation, not the system message."""
        self.turns, self.forgotten = [], 0

    def reply(self, text: str) -> Iterator[str]:
        """Yields the model's answer to `text` in pieces; when it has ended, both are part of the conversation.

        Raises:
            ValueError: a message that alone does not fit into the context; the conversation stays as it was.
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
        for piece in stream_text(self.model, self.tokenizer, prompt, self.max_new_tokens, **self.sampling):
            answer += piece
            yield piece
        self.turns = [*turns[dropped:], {"role": "assistant", "content": answer}]
        self.forgotten += dropped

    def _prompt(self, turns: list[Message]) -> list[int]:
        return self.tokenizer.encode(render(self.template, self.system + turns), allowed_special="all")


def converse(chat: Chat, ask: Callable[[], str], show: Callable[[str], None]) -> None:
    """Asks, answers and shows until there is no more input; ``/reset`` begins anew, ``/quit`` ends.

    Args:
        chat: the conversation.
        ask: returns the next message; EOFError ends.
        show: takes pieces of text as they come.
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
                show("\n")
            except ValueError as error:
                show(f"({error})\n")
            except KeyboardInterrupt:  # ends the reply, not the conversation
                show("\n(interrupted)\n")
            if chat.forgotten > before:
                show(f"(the oldest {chat.forgotten} messages no longer fit into the context)\n")
