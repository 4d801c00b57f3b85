"""A choice of commands for tyro, whose refusals are one line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, NoReturn, Union

import tyro

from xattn.cli.options import canonical, check_read
from xattn.runtime.names import did_you_mean

BOX = re.compile(r"[│╭╮╰╯─]+")


def one_of(commands: Mapping[str, type[Any]]) -> Any:
    """The type "one of these", each by its name and with its docstring as the help."""
    named = [
        Annotated[command, tyro.conf.subcommand(name, description=command.__doc__)]
        for name, command in commands.items()
    ]
    return Union[tuple(named)]  # noqa: UP007


def parsed(
    commands: Mapping[str, type[Any]], words: Sequence[str], prog: str, description: str
) -> Any:
    """The command that ``words`` give: the name of one of ``commands``, photos and options.

    Raises:
        ValueError: what it refuses, in one line that names the word and the remedy.
        SystemExit: after ``--help``.
    """
    if not words or words[0] in ("-h", "--help"):
        return _read(one_of(commands), ["--help"], prog, description)
    name, *rest = words
    if name not in commands:
        raise ValueError(f"command: {prog} has no {name!r}; {did_you_mean(name, commands)}")
    command, place = commands[name], f"{prog} {name}"
    rest = canonical(place.partition(" ")[2], command, rest)
    found = _read(command, rest, place, command.__doc__ or "")
    check_read(found, rest)
    return found


def _read(kind: Any, words: Sequence[str], prog: str, description: str) -> Any:
    told = _Held()
    try:
        with redirect_stderr(told):
            return tyro.cli(kind, args=words, prog=prog, description=description)
    except SystemExit as error:
        if error.code:
            _refuse(error, told.getvalue(), prog)
        raise


class _Held(io.StringIO):
    """What is for stderr, with colours if that shows them."""

    def isatty(self) -> bool:
        return sys.__stderr__ is not None and sys.__stderr__.isatty()


def _refuse(error: BaseException, told: str, prog: str) -> NoReturn:
    """Raise what this package has refused on the way to ``error``, or what tyro's box says in a line."""
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
        if isinstance(cause, ValueError) and where.partition(".")[0] == "xattn":
            raise cause from None
        cause = cause.__context__
    text = " ".join(BOX.sub(" ", told).split())
    raise ValueError(
        f"arguments: {text or 'got some that cannot be read'}; see {prog} --help"
    ) from None
