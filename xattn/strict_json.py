"""JSON from files that may be damaged or hostile: whatever is wrong with the text is a ``ValueError``."""

from __future__ import annotations

import json
from typing import Any


def parse(data: bytes) -> Any:
    """The value of UTF-8 JSON.

    Raises:
        ValueError: no UTF-8, no JSON, nested too deep, NaN or Infinity, or a number of too many digits.

    >>> parse(b'{"a": [1, null]}')
    {'a': [1, None]}
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}, which JSON does not have")
