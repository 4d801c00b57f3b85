"""Which explainers run on which family of timm: a small network of each, random weights, one picture.

    python -m xattn.eval.studies explainers-by-family --page docs/explainers-by-family.md

``xattn list explainers --for MODEL`` does the same of one network. The CSV beside the page keeps what was
found, which is not tried again.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from xattn.backbone import Backbone, load_backbone
from xattn.eval.studies.families import FAMILIES, model_of
from xattn.explainers.base import EXPLAINERS, explainer_class
from xattn.explaining.trying import TryResult, try_explainer
from xattn.runtime.files import write_rows, write_text

CLASSIFIERS = {"cnn", "vit"}  # other explainers are of masks, or of boxes
EXACT = ("lrp", "libragrad")
RUNS, OTHERS, NO = "●", "○", ""


def study(
    page: Path = Path("docs/explainers-by-family.md"), families: Sequence[str] = ()
) -> Iterator[str]:
    """A line for each family, and the page."""
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise ValueError(f"families: got {unknown}; give some of {', '.join(FAMILIES)}")
    raw = page.with_suffix(".csv")
    rows: list[dict[str, Any]] = []
    if raw.is_file():
        with raw.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    for family in families or FAMILIES:
        known = {row["explainer"] for row in rows if row["family"] == family}
        found = list(_rows(family, [name for name in _names() if name not in known]))
        if found:
            rows = sorted([*rows, *found], key=lambda row: (row["family"], row["explainer"]))
            write_rows(raw, rows)
            yield f"{family}: {sum(row['result'] != 'no' for row in found)} of {len(found)} run"
    write_text(page, "\n".join(_page(rows)) + "\n")
    yield f"page: {page}"


def _names() -> list[str]:
    entries = [entry for entry in EXPLAINERS.entries() if CLASSIFIERS & set(entry.networks)]
    return [entry.name for entry in entries if not explainer_class(entry.name).needs_head]


def _rows(family: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not names:
        return
    backbone, size, why = None, "", ""
    try:
        backbone = _network(family)
        size = "x".join(map(str, backbone.preprocessing.input_size))
    except ValueError as error:  # its features are no map
        why = " ".join(str(error).split())
    for name in names:
        entry = EXPLAINERS.entry(name)
        found = (
            TryResult(False, {}, None, why) if backbone is None else try_explainer(entry, backbone)
        )
        given = ", ".join(f"{key}={value}" for key, value in found.options.items())
        result = "no" if not found.runs else given or "runs"
        absorbed = "" if found.absorbed is None else f"{found.absorbed:.1e}"
        yield {
            "family": family, "model": model_of(family)[0], "size": size, "explainer": name,
            "result": result, "absorbed": absorbed, "reason": found.reason,
        }  # fmt: skip


def _network(family: str) -> Backbone:
    name, side = model_of(family)
    torch.manual_seed(0)
    try:
        return load_backbone(name, weights=None, input_size=side)
    except (TypeError, AssertionError, RuntimeError, ValueError):  # of one size only
        return load_backbone(name, weights=None)


# ---------------------------------------------------------------------- the page


def _page(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    by: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["family"], {})[row["explainer"]] = row
    loaded = [name for name in by if next(iter(by[name].values()))["size"]]
    names = sorted({row["explainer"] for row in rows})
    runs = Counter(row["explainer"] for row in rows if row["result"] != "no")
    everywhere = [name for name in names if runs[name] == len(loaded)]
    shown = [name for name in names if name not in everywhere]
    yield "# Explainers by family\n"
    yield f"This table shows what runs on a small network of each of {len(by)} timm families,"
    yield f"with random weights, tried on one picture. {RUNS} marks methods that run with their"
    yield f"defaults, {OTHERS} those that need options, which `xattn list explainers --for MODEL` prints"
    yield "for your own network. The table was made by\n\n```sh"
    yield f"python -m xattn.eval.studies explainers-by-family --page docs/{PAGE}.md\n```\n"
    yield f"A [file]({PAGE}.csv) lists the options, what relevance methods lose, and why the others do"
    yield "not run.\n"
    yield f"These run on {len(loaded)} families: {', '.join(f'`{name}`' for name in everywhere)}.\n"
    lost = [float(row["absorbed"]) for row in rows if row["explainer"] in EXACT and row["absorbed"]]
    if lost:
        yield f"Of a logit, {' and '.join(f'`{name}`' for name in EXACT)} lose at most {max(lost):.0e}.\n"
    missing = ", ".join(name for name in by if name not in loaded)
    if missing:
        yield f"These cannot be loaded by name: {missing}. Their features are not maps; wrap the"
        yield "model in a module with `forward_taps`, as [own-model.md](own-model.md) shows, or use"
        yield "[`following`](relevance.md#any-module), which runs them unchanged.\n"
    yield f"| family | network | {' | '.join(f'`{name}`' for name in shown)} |"
    yield f"| :-- | :-- |{' :-: |' * len(shown)}"
    for family in loaded:
        network = next(iter(by[family].values()))["model"]
        cells = [_cell(by[family][name]["result"]) for name in shown]
        yield f"| {family} | {network} | {' | '.join(cells)} |"
    yield f"| all {len(loaded)} | | {' | '.join(str(runs[name]) for name in shown)} |"


PAGE = "explainers-by-family"


def _cell(result: str) -> str:
    return {"runs": RUNS, "no": NO}.get(result, OTHERS)
