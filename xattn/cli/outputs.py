"""Output folders: earlier results are never replaced without being asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from xattn.cli.checks import check_output
from xattn.cli.printing import note
from xattn.runtime.stores import StorePath, place_of
from xattn.runtime.uploads import check_remote_output, uploaded


class Output(NamedTuple):
    """The local ``folder`` that a command writes to, and where results are in the end."""

    folder: Path
    place: Path | StorePath


@contextmanager
def output_folder(
    given: Path | None,
    default: str,
    overwrite: bool,
    whole: str,
    begins: bytes = b"",
    owned: Callable[[str], bool] = lambda name: False,
) -> Iterator[Output]:
    """The folder to write to: ``given``, or ``default`` with a number if results are there already.

    The results of a URL are written to a local folder and uploaded when the block ends.

    Args:
        whole: the file that results have once they are whole.
        begins: what stands near the beginning of that file if xattn wrote it.
        owned: see :func:`xattn.runtime.uploads.upload`.

    Raises:
        ValueError: the folder ``given`` is a file, or holds results and ``overwrite`` was not asked for.
    """
    place = None if given is None else place_of(given, "output")
    if not isinstance(place, StorePath):
        folder = _local_folder(place, default, overwrite, whole)
        yield Output(folder, folder)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"output: got {place}; several processes write to a folder that they share, give a local one"
        )
    check_remote_output(place, whole, overwrite, begins)
    with uploaded(place, whole, owned) as local:
        yield Output(local, place)


def pack_output(
    given: Path | None, default: str, overwrite: bool
) -> AbstractContextManager[Output]:
    """:func:`output_folder` of a command that writes a pack."""
    from xattn.packs.format import FORMAT, MANIFEST, is_pack_file

    begins = f'"{FORMAT}"'.encode()
    return output_folder(given, default, overwrite, MANIFEST, begins, is_pack_file)


def refuse_remote(command: str, output: Path | None) -> None:
    """One line for a command that goes on in its output folder, and so needs one on disk."""
    place = None if output is None else place_of(output, "output")
    if isinstance(place, StorePath):
        raise ValueError(
            f"output: got {place}, but xattn {command} writes to disk as it goes; give a local folder, "
            f"and copy it there when it is done"
        )


def _local_folder(given: Path | None, default: str, overwrite: bool, whole: str) -> Path:
    first = given or Path(default)
    check_output(first)
    if overwrite or not (first / whole).is_file():
        return first
    if given is not None:
        raise ValueError(
            f"output: {given} holds results already; give another folder, or --overwrite to replace them"
        )
    names = (first.with_name(f"{first.name}-{number}") for number in count(2))
    free = next(folder for folder in names if not folder.exists())
    note(f"output: {first} holds earlier results; these go to {free}")
    return free
