"""``gptcore generate``."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional, UseAppendAction

from gptcore.cli._options import Loading, SamplingOptions


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingOptions, Loading):
    """Continue a text with a trained model.

    For example:
      gptcore generate --model runs/demo "The function returns"
      gptcore generate --model runs/demo --temperature 0 --max-new-tokens 50 "Return the"
      gptcore fetch smollm2-135m-instruct && gptcore generate --model smollm2-135m-instruct "The capital of France is"
      gptcore generate --model gpt2 --tokenizer gpt2 --top-p 0.9 --repetition-penalty 1.2 "Once upon a time"
      gptcore generate --model runs/demo --temperature 0 "The function returns" "The class has"
      gptcore generate --model runs/demo --stop . --stop ";" "The function returns"
      gptcore generate --model smollm2-135m-instruct --adapter runs/tuned --merge "Write a haiku."
    """

    prompts: Positional[tuple[str, ...]]
    """Text to continue. Several are continued as one batch, and printed when all are done."""
    max_new_tokens: int = 100
    """The most tokens to add."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """Stop before this string. Repeat it for several; write --stop=--- if it begins with a dash."""

    def run(self) -> int:
        from gptcore.generate import generate_text, stream_text
        from gptcore.models import GPT

        if not self.prompts or not all(self.prompts):
            raise ValueError("prompts: got an empty one; accepted are one or more, none empty")
        model, tokenizer = self.load(GPT)
        options = {"stop": self.stop, **self.options()}
        prompt, *others = self.prompts
        if others:
            texts = generate_text(model, tokenizer, self.prompts, self.max_new_tokens, **options)
            print("\n\n".join(prompt + text for prompt, text in zip(self.prompts, texts)))
            return 0
        pieces = stream_text(model, tokenizer, tokenizer.encode_prompt(prompt), self.max_new_tokens, **options)
        print(prompt, end="", flush=True)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:  # also after Ctrl-C or an error, what follows begins on a new line
            print(flush=True)
        return 0
