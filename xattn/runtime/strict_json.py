"""JSON from files that may be damaged or hostile: any error in the text is a ``ValueError``.

JSON written by others is read with this module; the state of an evaluation is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEEPEST = 64  # levels; recursive functions display, compare and copy the values


def parse(
    data: bytes | str,
    *,
    nan: bool = False,
    table: Callable[[Sequence[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of JSON given as text, or as UTF-8 with or without a byte order mark.

    Args:
        nan: whether NaN and Infinity are accepted as numbers, as in a log of losses.
        table: builds an object from its (key, value) pairs; by default the last of equal keys wins.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deep, NaN or Infinity, or too many digits.

    >>> parse(b'{"a": [1, null]}')
    {'a': [1, None]}
    """
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    constant = None if nan else _refuse
    try:
        value = json.loads(text, parse_constant=constant, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        # Python's own message advises changing a setting.
        if type(error) is ValueError and "digits" in str(error):
            raise ValueError("a number in it has too many digits") from None
        raise
    check_depth(value)
    return value


def read(path: Path, argument: str, remedy: str, nan: bool = False) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: the file is damaged; the message names ``argument``, the file and the ``remedy``.
        OSError: the file cannot be read.
    """
    try:
        return parse(path.read_bytes(), nan=nan)
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is damaged ({error}); {remedy}") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON does not have")


def check_depth(value: Any) -> None:
    """Raise a ``ValueError`` for lists and tables of more than :data:`DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [v.values() if type(v) is dict else v for v in level if type(v) in (dict, list)]
        level = [v for values in inner for v in values if type(v) in (dict, list)]
        if not level:
            return
    raise ValueError("it is nested too deep")
