"""Answers of models to fixed questions, side by side: what training has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptcore._files import atomic_writer
from gptcore.generate.chat import Chat

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT
    from gptcore.text import PretrainedTokenizer, Tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Rewrite this sentence in the past tense: I walk to school.",
    "Give me two tips for staying healthy.",
    "Write one sentence about the sea.",
)
"""Questions that a small model may learn to answer."""


def answers(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    questions: Sequence[str] = QUESTIONS,
    max_new_tokens: int | None = None,
) -> list[str]:
    """Returns the model's answer to each question, in a conversation of its own.

    Decoding is greedy, so that the same model answers the same. An answer ends at a stop token, or after `max_new_tokens`.

    Args:
        model: the model.
        tokenizer: has a chat template. To compare a base with a model tuned from it, pass the tuned model's to both.
        questions: what the user says.
        max_new_tokens: the most tokens in an answer; None: 128, or half the context if that is less.

    Raises:
        ValueError: as `gptcore.generate.chat.Chat` and `Chat.reply`.
    """
    longest = max_new_tokens or min(128, model.config.context // 2)
    chat = Chat(model, tokenizer, max_new_tokens=longest, temperature=0.0)
    found = []
    for question in questions:
        chat.reset()
        found.append("".join(chat.reply(question)))
    return found


def write_answers(path: Path, questions: Sequence[str], columns: Mapping[str, Sequence[str]]) -> None:
    """Writes a Markdown file with each question and, under each model's name, its answer.

    Args:
        path: the file.
        questions: the questions.
        columns: for each model's name its answers, in the order of the questions.
    """
    lines = ["# Answers", ""]
    for number, question in enumerate(questions):
        lines += [f"## {question}", ""]
        for name, given in columns.items():
            quoted = [f"> {line}".rstrip() for line in (given[number] or "(nothing)").splitlines()]
            lines += [f"**{name}**", "", *quoted, ""]
    with atomic_writer(path) as file:
        file.write("\n".join(lines).encode())
