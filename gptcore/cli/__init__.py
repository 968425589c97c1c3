"""The command line: `gptcore <verb>`. Each verb is a file here, with a dataclass whose fields are its options."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated, Any, Union

import tyro

from gptcore._extras import MissingPackageError
from gptcore.cli.attention_map import AttentionMap
from gptcore.cli.chat import Chat
from gptcore.cli.embed import Embed
from gptcore.cli.export import Export
from gptcore.cli.fetch import Fetch
from gptcore.cli.fill import Fill
from gptcore.cli.generate import Generate
from gptcore.cli.info import Info
from gptcore.cli.prepare import Prepare
from gptcore.cli.train import Train
from gptcore.train.guard import drop_unwritten

VERBS: dict[str, type[Any]] = {
    "info": Info,
    "fetch": Fetch,
    "prepare": Prepare,
    "train": Train,
    "generate": Generate,
    "chat": Chat,
    "fill": Fill,
    "embed": Embed,
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
    if verb and verb[0] in VERBS:
        return tyro.cli(VERBS[verb[0]], prog=f"gptcore {verb[0]}", args=rest)
    # `gptcore --help` lists the first line of each verb's docstring; `gptcore VERB --help` shows all of it.
    listed = []
    for name, kind in VERBS.items():
        first_line = (kind.__doc__ or "").partition("\n")[0]
        listed.append(Annotated[Any, tyro.conf.subcommand(name, constructor=kind, description=first_line)])
    kinds: Any = Union[tuple(listed)]  # noqa: UP007 (made from a list)
    description = "Build language models from scratch, on fused kernels."
    return tyro.cli(kinds, prog="gptcore", description=description, args=arguments)
