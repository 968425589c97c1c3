"""Reads what assistants are trained on: conversations, and pairs of a preferred and a rejected answer.

Every row must be complete: one that is not stops the reading with an error that names the file and the line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, get_args

from gptcore import assets
from gptcore.data.readers import holds_records, read_objects, shown, text_of
from gptcore.text.chat_template import Message, Role

ROLES: tuple[str, ...] = get_args(Role)


class Conversation(NamedTuple):
    """Messages of which at least one is the assistant's."""

    name: str
    """File and line, for errors."""
    messages: list[Message]


class Preference(NamedTuple):
    """Two answers to the same messages."""

    name: str
    """File and line, for errors."""
    prompt: list[Message]
    """The conversation up to the answer."""
    chosen: str
    rejected: str


def read_conversations(source: Path) -> list[Conversation]:
    """Reads conversations from JSON Lines, or a JSON array, in one of two forms.

    - a chat: ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}``, with the
      roles ``system``, ``user`` and ``assistant``
    - as in Alpaca's data: ``{"instruction": "...", "input": "...", "output": "..."}``; ``input`` may be empty or missing

    Other fields are ignored.

    Args:
        source: the file, a folder with one such file, or the name of one that ``gptcore fetch`` brought.

    Raises:
        ValueError: a row is not in one of these forms, has an empty message or no message of the assistant; names file and row.
        FileNotFoundError: there is no such file.
    """
    path = find_records(source)
    found = [Conversation(name, _conversation(record, name)) for name, record in read_objects(path)]
    if not found:
        raise ValueError(f"data: {path} holds no conversation")
    return found


def read_preferences(source: Path) -> list[Preference]:
    """Reads preferences from JSON Lines, or a JSON array: ``{"prompt": "...", "chosen": "...", "rejected": "..."}``.

    `prompt` is the user's message, or a list of messages as in `read_conversations`. `chosen` and `rejected` are the
    assistant's answers: each a text, or a list of one message, before which the prompt's may stand again.

    Args:
        source: as in `read_conversations`.

    Raises:
        ValueError: a row is not in this form, or has an empty message or two equal answers; names file and row.
        FileNotFoundError: there is no such file.
    """
    path = find_records(source)
    found = [_preference(record, name) for name, record in read_objects(path)]
    if not found:
        raise ValueError(f"data: {path} holds no preference")
    return found


def find_records(source: Path) -> Path:
    """Returns the file of records that `source` names: itself, the only one in a folder, or that of a fetched name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder with several, or a file of another kind.
    """
    path = source if source.exists() else assets.find(str(source))
    if path is None:
        hint = f"; gptcore fetch {source} brings it" if str(source) in assets.CATALOGUE else ""
        raise FileNotFoundError(f"data: there is no file {source}{hint}")
    if path.is_file():
        if holds_records(path) and path.suffix != ".parquet":
            return path
        raise ValueError(f"data: got {path}; accepted are .jsonl, and .json with an array of objects")
    files = [file for file in sorted(path.glob("*.json*")) if file.is_file()]
    if len(files) != 1:
        raise ValueError(f"data: the folder {path} holds {len(files)} .json and .jsonl files; accepted is one")
    return files[0]


def _conversation(record: dict[str, Any], name: str) -> list[Message]:
    if "messages" in record:
        messages = _messages(record["messages"], name, "messages")
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(f"{name}: no message is the assistant's; accepted are conversations with one or more")
        return messages
    if "instruction" not in record:
        fields = ", ".join(record) or "none"
        raise ValueError(f"{name}: has neither the field 'messages' nor 'instruction'; its fields are {fields}")
    asked = _content(record, name, "instruction")
    more = text_of(record, name, "input") if "input" in record else ""
    return [
        {"role": "user", "content": f"{asked}\n\n{more}" if more.strip() else asked},
        {"role": "assistant", "content": _content(record, name, "output")},
    ]


def _preference(record: dict[str, Any], name: str) -> Preference:
    prompt: list[Message] = (
        [{"role": "user", "content": _content(record, name, "prompt")}]
        if isinstance(record.get("prompt", ""), str)
        else _messages(record["prompt"], name, "prompt")
    )
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{name}: the prompt ends with a message of the assistant; accepted are prompts that ask for one"
        )
    chosen, rejected = (_answer(record, name, field, prompt) for field in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError(f"{name}: chosen and rejected are the same; accepted are two different answers")
    return Preference(name, prompt, chosen, rejected)


def _answer(record: dict[str, Any], name: str, field: str, prompt: list[Message]) -> str:
    if isinstance(record.get(field, ""), str):
        return _content(record, name, field)
    messages = _messages(record[field], name, field)
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if [message["role"] for message in messages] != ["assistant"]:
        raise ValueError(
            f"{name}: {field}: must be one message of the assistant, before which the prompt's may stand; "
            f"got the roles {', '.join(message['role'] for message in messages) or 'of the prompt alone'}"
        )
    return messages[0]["content"]


def _messages(value: Any, name: str, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: the field {field!r} must be a list of messages; got {shown(value)}")
    found: list[Message] = []
    for number, message in enumerate(value, 1):
        where = f"{name}, {field} {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: must be an object with role and content; got {shown(message)}")
        role = text_of(message, where, "role")
        if role not in ROLES:
            raise ValueError(f"{where}: the role is {role!r}; accepted are {', '.join(ROLES)}")
        found.append({"role": role, "content": _content(message, where, "content")})
    return found


def _content(record: dict[str, Any], name: str, field: str) -> str:
    text = text_of(record, name, field)
    if not text.strip():
        raise ValueError(f"{name}: the field {field!r} is empty; accepted are texts")
    return text
