"""Talking with a model: messages to a prompt by the model's own template, and the loop that `gptcore chat` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.text.pretrained import PretrainedTokenizer
    from gptcore.text.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


def render(
    template: str, messages: list[Message], *, special_tokens: Mapping[str, str] | None = None, reply: bool = True
) -> str:
    """The text that `template`, a model's Jinja chat template, makes of `messages`, as transformers'
    ``apply_chat_template`` does.

    Args:
        template: comes with weights from anywhere, so it runs in Jinja's sandbox.
        messages: the conversation.
        special_tokens: what the template may call ``bos_token``, ``eos_token``, ...: a tokenizer's `special_tokens_map`.
        reply: end where the assistant's next turn begins.

    Raises:
        ValueError: a template that is invalid, or refuses these messages; with its own words.
    """
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": reply}
    try:
        return _environment().from_string(template).render({**(special_tokens or {}), **given})
    except Exception as error:  # a stranger's program may fail in any way
        raise ValueError(f"chat_template: {error}") from error


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja's sandbox with what transformers gives to chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says, for training; what is inside is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ):
        """JSON as it is; Jinja's own filter escapes what means something in HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


class Chat:
    """A conversation with a model.

    Args:
        model, tokenizer: the tokenizer must have a chat template.
        system: what the model is told before the first turn; None leaves it to the template.
        max_new_tokens: longest reply; the context must hold it beside the conversation.
        sampling: fields of `gptcore.generate.Sampling`.

    Raises:
        ValueError: a tokenizer without a chat template, one that refuses the system message, or a context that cannot
            hold a reply.
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
                "model: has no chat template, it was not trained to converse; accepted are models with one "
                "(of several, one named 'default')"
            )
        if not 0 < max_new_tokens < model.config.context:
            raise ValueError(
                f"max_new_tokens: got {max_new_tokens}; accepted are 1 to {model.config.context - 1}, less than the context"
            )
        self.model, self.tokenizer, self.template = model, tokenizer, tokenizer.chat_template
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Message] = []
        self._prompt([{"role": "user", "content": "Hello"}])  # a template that refuses the system message says so now
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
        stream = stream_text(self.model, self.tokenizer, prompt, self.max_new_tokens, continues=False, **self.sampling)
        for piece in stream:
            answer += piece
            yield piece
        self.turns = [*turns[dropped:], {"role": "assistant", "content": answer}]
        self.forgotten += dropped

    def _prompt(self, turns: list[Message]) -> list[int]:
        named = self.tokenizer.special_tokens_map
        text = render(self.template, self.system + turns, special_tokens=named)  # begins with BOS where that is wanted
        return self.tokenizer.encode(text, allowed_special="all")


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
            except ValueError as error:
                show(f"({error})")
            except KeyboardInterrupt:  # ends the reply, not the conversation
                show("\n(interrupted)")
            finally:
                show("\n")
            if chat.forgotten > before:
                show(f"(the oldest {chat.forgotten} messages no longer fit into the context)\n")
