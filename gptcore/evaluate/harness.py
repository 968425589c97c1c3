"""EleutherAI's lm-evaluation-harness on models of gptcore: a model type ``gptcore`` for its tasks.

The harness's own command, with this model type added to it::

    python -m gptcore.evaluate.harness --model gptcore --model_args pretrained=runs/demo --tasks hellaswag --num_fewshot 5

From Python: import this module, then ``lm_eval.simple_evaluate(model="gptcore", model_args={"pretrained": ...}, ...)``.
Needs the package lm-eval: ``pip install 'gptcore[eval]'``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from gptcore import _extras
from gptcore.generate import Request, generate_text, log_likelihoods
from gptcore.models import GPT
from gptcore.nn import Kernels, check_kernels
from gptcore.text import get_tokenizer
from gptcore.text.chat_template import Message, render
from gptcore.weights import locate

_NEEDED_BY = "gptcore.evaluate.harness"
_model = _extras.load("lm_eval.api.model", _NEEDED_BY)
_registry = _extras.load("lm_eval.api.registry", _NEEDED_BY)
_utils = _extras.load("lm_eval.utils", _NEEDED_BY)

_LOG = logging.getLogger(__name__)
_MAX_NEW_TOKENS = 256
"""Of tasks that name no number; the harness's own default."""
_NAMES_OF_MAX = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


@_registry.register_model("gptcore")
class HarnessModel(_model.TemplateLM):
    """A GPT as the harness sees it.

    Args:
        pretrained: what ``gptcore generate --model`` takes: a run, a folder of weights, a GGUF file or a name.
        tokenizer: ``gpt2`` or the path of a saved tokenizer; None: the model's own.
        kernels: the kernels that run.
        dtype: of the weights: ``auto`` (bfloat16, on a CPU with the reference kernels float32), ``float32`` or ``bfloat16``.
        device: ``cpu``, ``cuda``, ...; None: a GPU if there is one. Without a GPU it is the CPU.
        batch_size: texts that are generated together; "auto" or less than 2: 16. Likelihoods are batched by tokens.
        max_batch_size: not used; the harness passes it to every model.
        model: a model that is loaded already, with `tokenizer` its tokenizer, instead of `pretrained`.

    Raises:
        ValueError, OSError: as the loading of a model does.
    """

    def __init__(
        self,
        pretrained: str = "",
        tokenizer: Any = None,
        kernels: Kernels = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        model: GPT | None = None,
    ) -> None:
        super().__init__()
        if dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype: got {dtype!r}; accepted are auto, float32 and bfloat16")
        if model is None:
            if not pretrained:
                raise ValueError("pretrained: got none; accepted is what gptcore generate --model takes")
            check_kernels(kernels)
            if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
                device = "cuda" if torch.cuda.is_available() else "cpu"  # the harness asks for cuda:0 everywhere
            plain = dtype == "auto" and (torch.device(device).type, kernels) == ("cpu", "reference")
            wide = dtype == "float32" or plain
            place = locate(pretrained)
            tokenizer = get_tokenizer(tokenizer or place)
            weights = torch.float32 if wide else torch.bfloat16
            model = GPT.from_pretrained(place, dtype=weights, kernels=kernels).to(device).eval()
        self.model, self.tokenizer = model, tokenizer
        self._device = model.output_weight.device
        self._name = str(pretrained) or type(model).__name__
        self._batch_size = batch_size if isinstance(batch_size, int) and batch_size > 1 else 16

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads."""
        return self.model.config.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        named = "eos_token" in self.tokenizer.special_tokens_map
        return self.tokenizer.special_id("eos_token") if named else self.tokenizer.stop_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or the one that ends a text."""
        named = "bos_token" in self.tokenizer.special_tokens_map
        return self.tokenizer.special_id("bos_token") if named else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's caches."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, special tokens in it included.

        A tokenizer that puts BOS before a prompt does so, unless `add_special_tokens` is False or the text begins with it.
        """
        bos = self.tokenizer.special_tokens_map.get("bos_token")
        if add_special_tokens is False or (add_special_tokens is None and bos and string.startswith(bos)):
            return self.tokenizer.encode(string, allowed_special="all")
        return self.tokenizer.encode_prompt(string, allowed_special="all")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses, for the harness's report."""
        return self.tokenizer.chat_template if chat_template else ""

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError("--apply_chat_template: the model has no chat template; accepted are models that have one")
        special = self.tokenizer.special_tokens_map
        return render(template, chat_history, special_tokens=special, reply=add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is what greedy decoding gives.

        A context that is too long loses its first tokens, as in the harness's own models; a warning says how many did.
        """
        candidates: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        cut = 0
        for i, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token need not be read
            if room < 1:
                raise ValueError(
                    f"continuation: got {len(continuation)} tokens; accepted are up to the context, {self.max_length}"
                )
            cut += len(context) > room
            candidates.setdefault(tuple(context[-room:]), []).append((i, continuation))
        if cut:
            _LOG.warning("%d of %d contexts were too long and lost their first tokens", cut, len(requests))
        together = [Request(context, [candidate for _, candidate in ends]) for context, ends in candidates.items()]
        results = [(0.0, False)] * len(requests)
        with _bar(len(requests), disable_tqdm) as bar:
            scored = log_likelihoods(self.model, together, advance=bar.update)
        for ends, scores in zip(candidates.values(), scored):
            for (i, _), score in zip(ends, scores):
                results[i] = score.log_likelihood, score.greedy
                if (texts := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[i])
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text. A long text is read in windows as long as the context."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            parts = _utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(_utils.make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model adds to each text until one of the task's stop strings."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # by options: those of a batch are the same
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with _bar(len(requests), disable_tqdm) as bar:
            for group in groups.values():
                stop, most, sampling = _generation(requests[group[0]].args[1], self.max_length)
                prompts = {i: self.tok_encode(requests[i].args[0])[-(self.max_length - most) :] for i in group}
                order = sorted(group, key=lambda i: -len(prompts[i]))
                for start in range(0, len(order), self._batch_size):
                    batch = order[start : start + self._batch_size]
                    ids = [prompts[i] or [self.prefix_token_id] for i in batch]
                    texts = generate_text(self.model, self.tokenizer, ids, most, stop=stop, **sampling)
                    for i, text in zip(batch, texts):
                        results[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return results


def _generation(options: dict[str, Any], context: int) -> tuple[list[str], int, dict[str, Any]]:
    """The stop strings, the most tokens and the fields of `Sampling` in a task's ``generation_kwargs``."""
    options = dict(options)
    until = options.pop("until", None) or []
    stop = [until] if isinstance(until, str) else list(until)
    numbers = [value for name in _NAMES_OF_MAX if (value := options.pop(name, None)) is not None]
    most = int(numbers[0]) if numbers else _MAX_NEW_TOKENS
    if not 0 < most < context:
        raise ValueError(f"max_gen_toks: got {most}; accepted are 1 to {context - 1}, one less than the context")
    sample = options.pop("do_sample", float(options.get("temperature") or 0.0) > 0)
    if unknown := sorted(set(options) - set(_SAMPLING)):
        raise ValueError(f"{unknown[0]}: is no option of generation here; accepted are until, {', '.join(_SAMPLING)}")
    if not sample:
        options["temperature"] = 0.0
    return stop, most, options


def _bar(total: int, hidden: bool) -> Any:
    """A progress bar like the harness's own."""
    return _model.tqdm(total=total, disable=hidden)


def main() -> None:
    """Runs the harness's command line."""
    _extras.load("lm_eval.__main__", _NEEDED_BY).cli_evaluate()


if __name__ == "__main__":
    main()
