"""The command line: `gptcore <verb>`. Each verb is a file here, with a dataclass whose fields are its options."""

from __future__ import annotations

import sys
from io import TextIOWrapper

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
        "fill": Fill,
        "embed": Embed,
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
