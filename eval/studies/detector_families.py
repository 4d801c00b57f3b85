"""Which explainers run on which family of detectors: a tiny network of each, random weights, noise.

    python -m xattn.eval.studies detectors-by-family --page docs/detectors-by-family.md

Run from a checkout: the networks are those of the tests, tests/small_detectors.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from xattn.backbone import Backbone
from xattn.detection import Detector, load_detector
from xattn.eval.studies.explainer_families import NO, OTHERS, RUNS
from xattn.explainers.base import EXPLAINERS, create_explainer, explainer_class
from xattn.explainers.gradients import probe_image
from xattn.explaining.trying import try_explainer
from xattn.runtime.files import write_rows, write_text

TORCHVISION = ("fasterrcnn", "maskrcnn", "retinanet", "fcos", "ssd")
OTHER = ("YOLO, a stand-in", "a function")
PAGE = "detectors-by-family"
ABOUT = (
    "families, with random weights, for one detection in noise",
    "Loading detectors and choosing what to explain\nis described in [detectors.md](detectors.md)",
)


def study(
    page: Path = Path(f"docs/{PAGE}.md"), networks: Path = Path("tests/small_detectors.py")
) -> Iterator[str]:
    """A line for each family, and the page with its CSV."""
    small = networks_of(networks)
    noise = torch.rand(3, small.SIDE, small.SIDE, generator=torch.Generator().manual_seed(0))
    views = ((f, one.of(one.best_candidates(noise, 1))) for f, one in _detectors(small))
    yield from written(page, views, {"cnn", "vit", "detector"}, "detectors", PAGE, *ABOUT)


def written(
    page: Path, views: Iterable[tuple[str, Backbone]], kinds: set[str], *words: str
) -> Iterator[str]:
    """Try all on each family's view; ``words`` are those of :func:`page_of`."""
    rows: list[dict[str, Any]] = []
    for family, view in views:
        found = list(rows_of(family, view, kinds))
        rows += found
        yield f"{family}: {sum(row['result'] != 'no' for row in found)} of {len(found)} run"
    write_rows(page.with_suffix(".csv"), rows)
    write_text(page, "\n".join(page_of(rows, *words)) + "\n")
    yield f"page: {page}"


def networks_of(path: Path) -> Any:
    """The module of the tests that makes tiny networks."""
    if not path.is_file():
        raise ValueError(f"networks: no file {path}; run it from a checkout")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    small = module_from_spec(spec)
    spec.loader.exec_module(small)
    return small


def _detectors(small: Any) -> Iterator[tuple[str, Detector]]:
    from xattn.detection.transformers_networks import SIGMOID, SOFTMAX, TEXT

    for kind in TORCHVISION:
        yield kind, load_detector(small.torchvision_detector(kind))
    for kind in (*SOFTMAX, *SIGMOID, *TEXT):
        text = {"class_names": ["a cat", "a red dog"], "processor": small.Words()}
        more = text if kind in TEXT else {}
        net = small.transformers_detector(kind)
        yield kind, load_detector(net, input_size=small.SIDE, **more)
    yield OTHER[0], load_detector(small.Yolo(), input_size=small.SIDE)

    def corner(images: torch.Tensor) -> list[Any]:
        return [([[4.0, 4.0, 40.0, 40.0]], [0], [float(x.mean())]) for x in images]

    yield OTHER[1], load_detector(corner, input_size=small.SIDE, class_names=["a"])


def rows_of(family: str, view: Backbone, kinds: set[str]) -> Iterator[dict[str, Any]]:
    """What runs on a view of the explainers that are for networks of these kinds."""
    for entry in EXPLAINERS.entries():
        fits = kinds & set(entry.networks)
        if not fits or explainer_class(entry.name).needs_head:
            continue
        found = try_explainer(entry, view)
        result, reason = _text(found.options) if found.runs else "no", found.reason
        made = create_explainer(entry.name, view, **found.options) if found.runs else None
        if made is not None and made.forwards != 1:  # which tried() does not run
            few = entry.cases[0]  # passes
            try:
                create_explainer(entry.name, view, **few).attribute(probe_image(view), 0)
            except (ValueError, RuntimeError) as error:
                result, reason = "no", " ".join(str(error).split())
        yield {"family": family, "explainer": entry.name, "result": result, "reason": reason}


def _text(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "runs"


def page_of(
    rows: list[dict[str, Any]], networks: str, page: str, about: str, more: str
) -> Iterator[str]:
    """Lines of the page of that name; ``about`` and ``more`` are words of its first paragraph."""
    by: dict[str, dict[str, str]] = {}
    for row in rows:
        by.setdefault(row["family"], {})[row["explainer"]] = row["result"]
    runs = Counter(row["explainer"] for row in rows if row["result"] != "no")
    names = sorted({row["explainer"] for row in rows})
    every = [f"`{name}`" for name in names if runs[name] == len(by)]
    never = [f"`{name}`" for name in names if not runs[name]]
    shown = [name for name in names if 0 < runs[name] < len(by)]
    yield f"# Explainers by family of {networks}\n\nThis table shows what runs on a tiny network of each of"
    yield f"{len(by)} {about}. {RUNS} marks\nmethods that run with"
    yield f"their defaults, {OTHERS} those that need options. {more}. The table was made by\n\n```sh"
    yield f"python -m xattn.eval.studies {page} --page docs/{page}.md\n```\n"
    yield f"A [file]({page}.csv) lists the options, and the reasons why the others do not run.\n"
    yield f"These run on all: {', '.join(every)}.\n\nThese do not run on any: {', '.join(never)}.\n"
    yield f"| family | {' | '.join(f'`{name}`' for name in shown)} |"
    yield f"| :-- |{' :-: |' * len(shown)}"
    for family, found in by.items():
        cells = [{"runs": RUNS, "no": NO}.get(found[name], OTHERS) for name in shown]
        yield f"| {family} | {' | '.join(cells)} |"
    yield f"| all {len(by)} | {' | '.join(str(runs[name]) for name in shown)} |"
