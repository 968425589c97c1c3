"""The list of a command's verbs or kinds that its ``--help`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro


def choose(kinds: Mapping[str, type[Any]], prog: str, description: str, arguments: list[str]) -> Any:
    """Parses `arguments`, the first of which must be a name in `kinds`. Help and errors end the process.

    The help lists the first line of each class's docstring; the help of one of them shows all of it.
    """
    listed = []
    for name, kind in kinds.items():
        first_line = (kind.__doc__ or "").partition("\n")[0]
        listed.append(Annotated[Any, tyro.conf.subcommand(name, constructor=kind, description=first_line)])
    union: Any = Union[tuple(listed)]  # noqa: UP007 (made from a list)
    return tyro.cli(union, prog=prog, description=description, args=arguments)
