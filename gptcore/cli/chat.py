"""``gptcore chat``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import TextIOWrapper

from gptcore.cli._options import Loading, SamplingOptions


@dataclass(frozen=True, kw_only=True)
class Chat(SamplingOptions, Loading):
    """Talk with a model that was trained to converse.

    /reset begins anew, /quit or Ctrl-D ends the conversation, Ctrl-C ends a reply.

    For example:
      gptcore fetch smollm2-135m-instruct && gptcore chat --model smollm2-135m-instruct
      gptcore chat --model runs/tuned --system "You answer in one sentence." --temperature 0.2
      echo "What is a kernel?" | gptcore chat --model smollm2-135m-instruct --temperature 0
      gptcore chat --model smollm2-135m-instruct --adapter runs/tuned
    """

    system: str | None = None
    """System prompt, before the first turn; the chat template's own if left out."""
    max_new_tokens: int | None = None
    """The most tokens in a reply; 256, or half the context if that is less, if left out."""

    def run(self) -> int:
        from gptcore.generate.chat import Chat as Conversation
        from gptcore.generate.chat import converse
        from gptcore.models import GPT

        model, tokenizer = self.load(GPT)
        chat = Conversation(
            model, tokenizer, system=self.system, max_new_tokens=self.max_new_tokens, **self.options()
        )  # fmt: skip
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        prompt = "you> " if sys.stdin.isatty() else ""

        def ask() -> str:
            try:
                return input(prompt)
            except (EOFError, KeyboardInterrupt):
                print("\n" if prompt else "", end="", flush=True)  # ends the line of the prompt
                raise

        converse(chat, ask, lambda text: print(text, end="", flush=True))
        return 0
