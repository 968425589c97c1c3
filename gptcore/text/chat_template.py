"""Turns the messages of a conversation into a prompt, by the chat template that came with a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    """A `Role`."""
    content: str


def render(
    template: str, messages: list[Message], *, special_tokens: Mapping[str, str] | None = None, reply: bool = True
) -> str:
    """Returns the text of a conversation, the same as transformers' ``apply_chat_template``.

    Args:
        template: a Jinja chat template. It may come from anywhere, so it runs in Jinja's sandbox.
        messages: the conversation.
        special_tokens: a tokenizer's `special_tokens_map`, for templates that use ``bos_token``, ``eos_token``, ...
        reply: end with the beginning of the assistant's next message.

    Raises:
        ValueError: the template is invalid, or refuses these messages; the message has the template's own words.
    """
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": reply}
    try:
        return _compiled(template).render({**(special_tokens or {}), **variables})
    except Exception as error:  # a template is a program, which can raise any error
        raise ValueError(f"chat_template: {error}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Jinja's sandbox with the functions and options that transformers gives to chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training. Here its contents are rendered unchanged."""

        tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a mutable set

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def strftime_now(format_string: str) -> str:
        return datetime.now().strftime(format_string)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ):
        """Plain JSON. Jinja's own filter of this name escapes characters for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
