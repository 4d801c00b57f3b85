"""Writes results as CSV, and as JSON from which they can be read again.

The JSON file contains p, q and d of every image, so that every value can be recomputed. Files are written
under a temporary name and then renamed, so a failed write does not change an existing file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results, Row, csv_text
from xattn.eval.evaluation.stream import Skipped
from xattn.eval.metrics.base import Column, MetricInfo, MetricInputs
from xattn.eval.protocol import Protocol
from xattn.runtime import strict_json
from xattn.runtime.files import write_text
from xattn.runtime.version import __version__

FORMAT = "xattn-results"
FORMAT_VERSION = 2


# ---------------------------------------------------------------- JSON


def to_dict(results: Results) -> dict[str, Any]:
    """Results, including per-image numbers, as plain values for JSON; NaN becomes None."""
    protocol = results.protocol
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "xattn": __version__,
        "protocol": {**protocol.to_dict(), "id": protocol.id},
        "formulas": {
            m: results.info(m).formula for m in dict.fromkeys(c.metric for c in results.columns)
        },
        "infos": {
            m: {k: _plain(v) for k, v in info._asdict().items()}
            for m, info in results.infos.items()
        },
        "backbone": results.backbone,
        "cost": results.cost,
        "n_resamples": results.n_resamples,
        "options": results.options,
        "summary": [{k: _plain(v) for k, v in row._asdict().items()} for row in results.rows()],
        "warnings": results.warnings(),
        "notes": results.notes,
        **({} if results.admitted is None else {"admitted": list(results.admitted)}),
        "skipped": [s._asdict() for s in results.skipped],
        "images": [image._asdict() for image in results.images],
        "methods": {name: _method_dict(method) for name, method in results.methods.items()},
    }


def from_dict(data: dict[str, Any]) -> Results:
    """Create results from the output of :func:`to_dict`.

    Raises:
        ValueError: the format or version is not the expected one, or a value is not valid.
    """
    if data.get("format") != FORMAT or data.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"results: got format {data.get('format')!r} version {data.get('version')!r}, but this "
            f"version reads {FORMAT} version {FORMAT_VERSION}; evaluate again"
        )
    methods = {}
    for name, record in data["methods"].items():
        if not isinstance(record["objective"], str | None):
            raise ValueError(
                f"results: the objective of {name} is {record['objective']!r}, which is not a name; "
                f"evaluate again"
            )
        methods[name] = MethodResult(
            forwards=record["forwards"],
            is_mask=record["is_mask"],
            objective=record["objective"],
            tied=record["tied"],
            requests=record["requests"],
            reasons={int(i): reason for i, reason in record["reasons"].items()},
            failed={int(i): reason for i, reason in record["failed"].items()},
            measured={
                Column(v["metric"], v["level"]): np.array(v["measured"], dtype=bool)
                for v in record["values"]
                if v["measured"] is not None
            },
            valid=np.array(record["valid"], dtype=bool),
            scores={key: _array(values) for key, values in record["scores"].items()},
            values={Column(v["metric"], v["level"]): _array(v["values"]) for v in record["values"]},
        )
    return Results(
        protocol=Protocol.from_dict(data["protocol"]),
        images=[ImageRecord(**image) for image in data["images"]],
        methods=methods,
        skipped=[Skipped(**s) for s in data["skipped"]],
        backbone=dict(data["backbone"]),
        cost=data["cost"],
        n_resamples=data["n_resamples"],
        options={key: dict(value) for key, value in data["options"].items()},
        notes={image: str(note) for image, note in data["notes"].items()},
        infos={m: _info(m, record) for m, record in data["infos"].items()},
        admitted=tuple(map(str, data["admitted"])) if "admitted" in data else None,
    )


def write_json(results: Results, path: str | Path) -> None:
    """Write complete results, including per-image numbers, as JSON.

    Raises:
        OSError: the file cannot be written; an existing file is left intact.

    Example:
        >>> import tempfile, torch, xattn
        >>> from xattn.eval import write_json
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, {"gradcam": "gradcam"}, images, progress=False)
        >>> write_json(results, f"{tempfile.mkdtemp()}/leaderboard.json")
    """
    text = json.dumps(to_dict(results), allow_nan=False, ensure_ascii=False, indent=1)
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Results:
    """Read results written by :func:`write_json`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is damaged or is not a results file.

    Example:
        >>> import tempfile, torch, xattn
        >>> from xattn.eval import read_json, write_json
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, {"gradcam": "gradcam"}, images, progress=False)
        >>> path = f"{tempfile.mkdtemp()}/leaderboard.json"
        >>> write_json(results, path)
        >>> read_json(path).methods.keys() == results.methods.keys()
        True
    """
    try:
        return from_dict(strict_json.parse(Path(path).read_bytes()))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        if str(error).startswith("results: "):
            raise
        raise ValueError(
            f"results: {path} is damaged or not a results file ({type(error).__name__}: {error}); "
            f"evaluate again"
        ) from None


def _method_dict(method: MethodResult) -> dict[str, Any]:
    return {
        "forwards": method.forwards,
        "is_mask": method.is_mask,
        "objective": method.objective,
        "valid": method.valid.tolist(),
        "reasons": {str(i): reason for i, reason in method.reasons.items()},
        "failed": {str(i): reason for i, reason in method.failed.items()},
        "tied": method.tied,
        "requests": method.requests,
        "scores": {key: _list(values) for key, values in method.scores.items()},
        "values": [
            {
                "metric": column.metric,
                "level": column.level,
                "values": _list(values),
                "measured": method.measured[column].tolist() if column in method.measured else None,
            }
            for column, values in method.values.items()
        ],
    }


def _info(metric: str, record: dict[str, Any]) -> MetricInfo:
    """The description of a metric from outside the package; null as an end of its range means infinity."""
    low, high, reads = (record[key] for key in ("low", "high", "reads"))
    ends = {"low": -math.inf if low is None else low, "high": math.inf if high is None else high}
    info = MetricInfo(
        **{**record, **ends, "reads": None if reads is None else MetricInputs(*reads)}
    )
    texts = (info.formula, info.kind, *(info.reads or ()))
    if not all(isinstance(t, str) for t in texts) or not isinstance(info.higher_is_better, bool):
        raise ValueError(f"results: the description of {metric} is not valid; evaluate again")
    return info


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _list(values: NDArray[np.float64]) -> list[Any]:
    if values.ndim == 2:
        return [_list(row) for row in values]
    return [_plain(value) for value in values.tolist()]


def _array(values: list[Any]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN


# ---------------------------------------------------------------- CSV


def write_csv(results: Results, path: str | Path) -> Path:
    """Write the table to ``path``, and the per-image numbers to a file ``*.images.csv`` in the same folder.

    Returns:
        The path of the second file. It has one line per image and method, with p, q, d and all values.

    Raises:
        OSError: a file cannot be written; existing files are left intact.

    Example:
        >>> import tempfile, torch, xattn
        >>> from xattn.eval import write_csv
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, {"gradcam": "gradcam"}, images, progress=False)
        >>> path = write_csv(results, f"{tempfile.mkdtemp()}/leaderboard.csv")
        >>> path.read_text().split(",")[:4]
        ['image', 'class', 'class_name', 'method']
    """
    path = Path(path)
    sibling = path.with_name(f"{path.stem}.images{path.suffix or '.csv'}")
    write_text(sibling, csv_text(image_lines(results)))
    write_text(path, csv_text([Row._fields, *results.rows()]))
    return sibling


def image_lines(results: Results) -> list[list[Any]]:
    """The lines of a CSV table with one line per image and method, after a line of titles.

    A line contains the class, whether the map is valid, the clean score, the other scores and the values.
    """
    # Curves are written only to the JSON file.
    methods = results.methods.values()
    keys = list(dict.fromkeys(k for m in methods for k, v in m.scores.items() if v.ndim == 1))
    missing = np.full(len(results.images), np.nan)
    header = ["image", "class", "class_name", "method", "valid", "p", *keys]
    lines: list[list[Any]] = [header + [column.key for column in results.columns]]
    for name, method in results.methods.items():
        table = [*(method.scores.get(key, missing) for key in keys), *method.values.values()]
        for i, image in enumerate(results.images):
            first = [image.id, image.target, image.target_name, name, int(method.valid[i]), image.p]
            lines.append(first + [_plain(float(column[i])) for column in table])
    return lines
