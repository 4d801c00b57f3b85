"""A choice of commands for tyro."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, Union

import tyro


def one_of(commands: Mapping[str, type[Any]]) -> Any:
    """The type "one of these", each by its name and with its docstring as the help."""
    named = [
        Annotated[command, tyro.conf.subcommand(name, description=command.__doc__)]
        for name, command in commands.items()
    ]
    return Union[tuple(named)]  # noqa: UP007


def parsed(commands: Mapping[str, type[Any]], arguments: Sequence[str], **about: Any) -> Any:
    """The command that ``arguments`` give; ``about`` goes to ``tyro.cli``.

    Raises:
        ValueError: options whose values are refused by their own class, instead of tyro's box.
        SystemExit: anything else that tyro has told, such as ``--help`` or an unknown option.
    """
    told = _Held()
    try:
        with redirect_stderr(told):
            return tyro.cli(one_of(commands), args=arguments, **about)
    except SystemExit as error:
        own = _own_error(error)
        if own is None:
            raise
        told = _Held()
        raise own from None
    finally:
        sys.stderr.write(told.getvalue())


class _Held(io.StringIO):
    """What is for stderr, with colours if that shows them."""

    def isatty(self) -> bool:
        return sys.__stderr__ is not None and sys.__stderr__.isatty()


def _own_error(error: BaseException | None) -> ValueError | None:
    """The error of this package that led to ``error``."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
        if isinstance(error, ValueError) and where.partition(".")[0] == "xattn":
            return error
        error = error.__context__
    return None
