"""Output folders: earlier results are never replaced without being asked for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from xattn.cli.checks import check_output
from xattn.cli.printing import note


def choose_output(
    given: Path | None, default: str, overwrite: bool, holds_results: Callable[[Path], bool]
) -> Path:
    """The folder to write to: ``given``, or ``default`` with a number if results are there already.

    Raises:
        ValueError: the folder ``given`` is a file, or holds results and ``overwrite`` was not asked for.
    """
    first = given or Path(default)
    check_output(first)
    if overwrite or not holds_results(first):
        return first
    if given is not None:
        raise ValueError(
            f"output: {given} holds results already; give another folder, or --overwrite to replace them"
        )
    names = (first.with_name(f"{first.name}-{number}") for number in count(2))
    free = next(folder for folder in names if not folder.exists())
    note(f"output: {first} holds earlier results; these go to {free}")
    return free
