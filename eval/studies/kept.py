"""What a study keeps in its output folder: what is finished, which is read again and refused where
settings differ, and its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from xattn.eval.evaluation.split import Split
from xattn.runtime import strict_json
from xattn.runtime.files import check_folder, write_json, write_text

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


Found = dict[str, list[dict[str, Any]]]
"""What was measured of each row, seed by seed."""


def measure_rows(
    output: Path,
    settings: dict[str, Any],
    rows: Mapping[str, Callable[[Split, int], dict[str, Any]]],
    seeds: int,
) -> Found:
    """Measure every row with every seed; a file in ``output`` keeps each, and is read the next time.

    A row is called with the split that it takes its samples by, and a seed; its file holds what was fitted
    and scored, too.

    Raises:
        ValueError: ``output`` holds results of other settings, or a damaged file. RuntimeError: a row that
            scored nothing by its split.
    """
    check_folder(output)
    kept_record(output / "record.json", settings)
    found: Found = {}
    for name, measure in rows.items():
        for seed in range(seeds):
            file = output / f"{name}-{seed}.json"

            def drawn(measure: Any = measure, name: str = name, seed: int = seed) -> Any:
                split = Split(f"{name}, seed {seed},")
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    values = measure(split, seed)
                if not split.has_scored:
                    raise RuntimeError(f"{name}: nothing was scored by its split; see Split.score")
                return {**values, "split": split.record()}

            found.setdefault(name, []).append(kept_values(file, drawn))
    return found


def spread(values: list[float], digits: int = 3) -> str:
    """Values that print alike as one, others as "mean (least to most)"."""
    least, most = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return (
        least if least == most else f"{sum(values) / len(values):,.{digits}f} ({least} to {most})"
    )


def write_report(output: Path, lines: list[str]) -> Path:
    """``lines`` as report.md."""
    path = output / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def reported(output: Path, lines: list[str]) -> Iterator[str]:
    """Write ``lines`` as report.md, and give them and where they are."""
    path = write_report(output, lines)
    yield from lines
    yield f"\nreport: {path}"
