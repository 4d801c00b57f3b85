"""A choice of commands for tyro."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro


def one_of(commands: Mapping[str, type[Any]]) -> Any:
    """The type "one of these", each by its name and with its docstring as the help."""
    named = [
        Annotated[command, tyro.conf.subcommand(name, description=command.__doc__)]
        for name, command in commands.items()
    ]
    return Union[tuple(named)]  # noqa: UP007
