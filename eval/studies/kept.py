"""What a study has finished, in its output folder: read again, and refused where settings differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xattn.runtime import strict_json
from xattn.runtime.files import write_json

AGAIN = "delete it, to measure again"


def kept_record(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether ``file`` holds ``record``; it is written where there is none.

    Raises:
        ValueError: it holds another one.
    """
    record = json.loads(json.dumps(record))
    if file.is_file():
        if strict_json.read(file, "output", "choose a new folder") == record:
            return True
        raise ValueError(f"output: {file} has other settings or photos; choose a new folder")
    write_json(file, record)
    return False


def kept_values(file: Path, measure: Callable[[], Any]) -> Any:
    """What ``file`` holds, measured now if it is not there."""
    if not file.is_file():
        write_json(file, measure())
    return strict_json.read(file, "output", AGAIN)


def finished_values(file: Path, record: Mapping[str, Any]) -> Any:
    """The values that ``file`` holds beside ``record``; None if there is no such file.

    Raises:
        ValueError: it holds another record.
    """
    if not file.is_file():
        return None
    kept = strict_json.read(file, "output", AGAIN)
    if not isinstance(kept, dict) or kept.get("record") != record:
        raise ValueError(f"output: {file} has other settings or photos; choose a new folder")
    return kept["values"]
