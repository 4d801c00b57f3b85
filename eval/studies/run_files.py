"""Files of a study's output folder: finished results, the report, and the raw values behind it.

Finished results are loaded in the next run, and refused if they were made with other settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xattn.eval.evaluation.split import Split
from xattn.runtime import strict_json
from xattn.runtime.files import check_folder, write_json, write_rows, write_text

AGAIN = "delete it, to measure again"


def kept_record(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether ``file`` already holds ``record``; the file is written if it does not exist."""
    record = json.loads(json.dumps(record))
    if file.is_file():
        if strict_json.read(file, "output", "choose a new folder") == record:
            return True
        raise ValueError(f"output: {file} has other settings or photos; choose a new folder")
    write_json(file, record)
    return False


def kept_values(file: Path, measure: Callable[[], Any]) -> Any:
    """The values in ``file``; if there is no such file, measure them now and write it."""
    if not file.is_file():
        write_json(file, measure())
    return strict_json.read(file, "output", AGAIN)


def joined(
    parts: Sequence[Mapping[str, Sequence[float | None]]],
) -> dict[str, NDArray[np.float64]]:
    """The values of all parts by name, concatenated; None becomes NaN."""
    return {
        name: np.concatenate([np.array(part[name], dtype=np.float64) for part in parts])
        for name in parts[0]
    }


def finished_values(file: Path, record: Mapping[str, Any]) -> Any:
    """The values that ``file`` holds for ``record``; None if there is no such file."""
    if not file.is_file():
        return None
    kept = strict_json.read(file, "output", AGAIN)
    if not isinstance(kept, dict) or kept.get("record") != record:
        raise ValueError(f"output: {file} has other settings or photos; choose a new folder")
    return kept["values"]


Found = dict[str, list[dict[str, Any]]]
"""The measurements of each row, one item per seed."""
Rows = Sequence[Mapping[str, Any]]
"""The rows of a table, as values by column."""


def measure_rows(
    output: Path,
    settings: dict[str, Any],
    rows: Mapping[str, Callable[[Split, int], dict[str, Any]]],
    seeds: int,
) -> Found:
    """Measure every row with every seed; each result is kept in a file in ``output`` and loaded
    next time.

    A row is called with a seed and the split that hands out its samples; the file also records
    which samples were fitted and scored.
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


def raw_rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The measurements as rows of a table: the numbers of each row and seed, then its samples.

    Lists of one length share their rows: row i holds item i of each, as ``sample`` i ``of`` that
    length.

    >>> found = {"softmax": [{"seconds": 2.0, "tests": {"right": [1, 0]}}]}
    >>> for line in raw_rows(found):
    ...     print(line)
    {'row': 'softmax', 'seed': 0, 'seconds': 2.0}
    {'row': 'softmax', 'seed': 0, 'sample': 0, 'of': 2, 'tests right': 1}
    {'row': 'softmax', 'seed': 0, 'sample': 1, 'of': 2, 'tests right': 0}
    """
    rows: list[dict[str, Any]] = []
    for name, runs in found.items():
        for seed, values in enumerate(runs):
            flat = dict(_flat({key: value for key, value in values.items() if key != "split"}))
            lists = {key: value for key, value in flat.items() if isinstance(value, list)}
            start = {"row": name, "seed": seed}
            rows.append(start | {key: flat[key] for key in flat if key not in lists})
            for length in dict.fromkeys(map(len, lists.values())):
                columns = {key: value for key, value in lists.items() if len(value) == length}
                for i in range(length):
                    items = {key: _text(value[i]) for key, value in columns.items()}
                    rows.append(start | {"sample": i, "of": length} | items)
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def _text(item: Any) -> Any:
    return json.dumps(item) if isinstance(item, list) else item


def spread(values: list[float], digits: int = 3) -> str:
    """One number if all values print alike, else "mean (least to most)"."""
    least, most = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return (
        least if least == most else f"{sum(values) / len(values):,.{digits}f} ({least} to {most})"
    )


def write_report(output: Path, lines: Sequence[str], tables: Mapping[str, Rows]) -> list[Path]:
    """Write ``lines`` as report.md, and the raw values as a CSV file for each of ``tables``."""
    write_text(output / "report.md", "\n".join(lines) + "\n")
    files = [write_rows(output / f"{name}.csv", rows) for name, rows in tables.items()]
    return [output / "report.md", *files]


def reported(
    output: Path, lines: list[str], tables: Mapping[str, Rows], *others: Path
) -> Iterator[str]:
    """Write ``lines`` and ``tables``; yield the lines, then a line with the paths of these files
    and of ``others``."""
    files = [*write_report(output, lines, tables), *others]
    yield from lines
    yield f"\nreport: {', '.join(map(str, files))}"
