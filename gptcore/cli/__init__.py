"""The command line: `gptcore <verb>`. Each verb is a file here, with a dataclass whose fields are its options."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

import tyro

from gptcore._extras import MissingPackageError
from gptcore.cli._listing import choose
from gptcore.cli.attention_map import AttentionMap
from gptcore.cli.chat import Chat
from gptcore.cli.classify import Classify
from gptcore.cli.embed import Embed
from gptcore.cli.eval import Eval
from gptcore.cli.export import Export
from gptcore.cli.fetch import Fetch
from gptcore.cli.fill import Fill
from gptcore.cli.finetune import Finetune
from gptcore.cli.generate import Generate
from gptcore.cli.info import Info
from gptcore.cli.nearest import Nearest
from gptcore.cli.prepare import Prepare
from gptcore.cli.tokens import Tokens
from gptcore.cli.train import Train
from gptcore.train.guard import drop_unwritten

VERBS: dict[str, type[Any]] = {
    "info": Info,
    "fetch": Fetch,
    "prepare": Prepare,
    "tokens": Tokens,
    "train": Train,
    "finetune": Finetune,
    "generate": Generate,
    "chat": Chat,
    "classify": Classify,
    "fill": Fill,
    "embed": Embed,
    "nearest": Nearest,
    "eval": Eval,
    "export": Export,
    "attention-map": AttentionMap,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. An expected error prints one line and exits with status 2, Ctrl-C one line and 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # prints "?" for characters that the encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        command = _parse(arguments)
        status = command.run()
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        drop_unwritten()
        status = 141  # 128 + SIGPIPE, as shells report it
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, MissingPackageError) as error:
        print(f"gptcore: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("gptcore: interrupted", file=sys.stderr)
        status = 130  # 128 + SIGINT, as shells report it
    sys.exit(status)


def _parse(arguments: list[str]) -> Any:
    """Returns the verb that `arguments` name, with its options. Help and errors end the process."""
    verb, rest = arguments[:1], arguments[1:]
    if verb == ["train"]:
        return Train.parse(rest)
    if verb == ["finetune"]:
        return Finetune.parse(rest)
    if verb and verb[0] in VERBS:
        return tyro.cli(VERBS[verb[0]], prog=f"gptcore {verb[0]}", args=rest)
    return choose(VERBS, "gptcore", "Build language models from scratch, on fused kernels.", arguments)
