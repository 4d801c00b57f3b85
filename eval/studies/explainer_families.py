"""Which explainers run on which family: classifiers of timm, clips, detectors, segmentation networks.

    python -m xattn.eval.studies explainers-by-family --page docs/explainers-by-family.md

``xattn list explainers --for MODEL`` does the same for one network. Results are kept in the CSV beside the
page, and what it contains is not tried again. The networks are small and have random weights; those that
are not from timm are the networks of the tests, so run the study from a checkout.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from xattn.backbone import Backbone, load_backbone, load_segmenter
from xattn.backbone.scored import scored
from xattn.backbone.targets import at_point
from xattn.detection import load_detector
from xattn.eval.studies.families import FAMILIES, model_of
from xattn.explainers.base import EXPLAINERS, create_explainer, explainer_class
from xattn.explainers.gradients import probe_image
from xattn.explaining.trying import try_explainer
from xattn.runtime.files import write_rows, write_text

PAGE = "explainers-by-family"
CONSERVING = ("lrp", "libragrad")
RUNS, NEEDS_OPTIONS = "●", "○"
SHARED: dict[str, Any] = {"mean": 0.5, "std": 0.5}

Load = Callable[[], Backbone]


# ---------------------------------------------------------------------- the networks


def _classifiers(_: Path) -> Iterator[tuple[str, str, Load]]:
    for family in FAMILIES:
        yield family, model_of(family)[0], partial(_timm_network, family)


def _timm_network(family: str) -> Backbone:
    name, side = model_of(family)
    torch.manual_seed(0)
    try:
        return load_backbone(name, weights=None, input_size=side)
    except (TypeError, AssertionError, RuntimeError, ValueError):  # it takes only its own size
        return load_backbone(name, weights=None)


def _clips(tests: Path) -> Iterator[tuple[str, str, Load]]:
    small = module_of(tests / "clip_networks.py")
    for family in (*small.TORCHVISION, *small.TRANSFORMERS):
        yield family, "", partial(small.backbone, family)
    yield "a module", "", partial(small.backbone, "own")


def _detections(tests: Path) -> Iterator[tuple[str, str, Load]]:
    from xattn.detection.transformers_networks import SIGMOID, SOFTMAX, TEXT

    small = module_of(tests / "small_detectors.py")
    noise = torch.rand(3, small.SIDE, small.SIDE, generator=torch.Generator().manual_seed(0))

    def view(make: Callable[..., Any], *arguments: Any, **options: Any) -> Backbone:
        one = load_detector(make(*arguments), **options)
        return one.of(one.best_candidates(noise, 1))

    def corner(images: torch.Tensor) -> list[Any]:
        return [([[4.0, 4.0, 40.0, 40.0]], [0], [float(x.mean())]) for x in images]

    for kind in ("fasterrcnn", "maskrcnn", "retinanet", "fcos", "ssd"):
        yield kind, "", partial(view, small.torchvision_detector, kind)
    for kind in (*SOFTMAX, *SIGMOID, *TEXT):
        words = {"class_names": ["a cat", "a red dog"], "processor": small.Words()}
        options = {"input_size": small.SIDE, **(words if kind in TEXT else {})}
        yield kind, "", partial(view, small.transformers_detector, kind, **options)
    yield "YOLO, a stand-in", "", partial(view, small.Yolo, input_size=small.SIDE)
    yield "a function", "", partial(view, lambda: corner, input_size=small.SIDE, class_names=["a"])


def _segments(tests: Path) -> Iterator[tuple[str, str, Load]]:
    small = module_of(tests / "small_segmenters.py")
    size = {"input_size": small.SIDE}

    def view(make: Callable[..., Any], *arguments: Any, **options: Any) -> Backbone:
        return scored(
            load_segmenter(make(*arguments), **options), at_point(0, 0.5, 0.5, p="sigmoid")
        )

    def numbers(images: Any) -> Any:
        return images.detach().numpy()

    made = [
        *((kind, small.torchvision_segmenter, kind) for kind in ("fcn", "deeplabv3", "lraspp")),
        *(
            (kind, small.transformers_segmenter, kind)
            for kind in ("segformer", "upernet", "maskformer", "mask2former")
        ),
        *((f"smp.{kind}", small.smp_segmenter, kind) for kind in ("Unet", "FPN", "DeepLabV3Plus")),
    ]
    for family, make, kind in made:
        yield family, "", partial(view, make, kind, **size, **SHARED)
    yield "SAM, a point", "", partial(view, small.sam, prompt=[(0.5, 0.5)], **size, **SHARED)
    yield "a module", "", partial(view, small.UNet, **size, **SHARED)
    yield "a function of NumPy", "", partial(view, lambda: numbers, **size)


def module_of(path: Path) -> Any:
    """The module of the tests that makes small networks."""
    if not path.is_file():
        raise ValueError(f"tests: no file {path}; run it from a checkout")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    small = module_from_spec(spec)
    spec.loader.exec_module(small)
    return small


@dataclass(frozen=True)
class Kind:
    """A kind of network: its section's title, what is explained, the guide about it, and its networks."""

    title: str
    explained: str
    guide: str
    networks: frozenset[str]  # kinds of explainers, as in the registry
    families: Callable[[Path], Iterator[tuple[str, str, Load]]]


CLASSIFIERS = frozenset({"cnn", "vit"})  # other explainers are for masks or boxes
KINDS = {
    "timm": Kind(
        "Classifiers of timm", "a class of a picture", "own-model.md", CLASSIFIERS, _classifiers
    ),
    "clips": Kind(
        "Networks for clips", "a class of a noise clip", "clips-and-volumes.md", CLASSIFIERS, _clips
    ),
    "detectors": Kind(
        "Detectors", "a detection in noise", "detectors.md", CLASSIFIERS | {"detector"}, _detections
    ),
    "segmenters": Kind(
        "Segmentation networks",
        "a class at a point of noise",
        "segmenters.md",
        CLASSIFIERS,
        _segments,
    ),
}


# ---------------------------------------------------------------------- trying


def study(
    page: Path = Path(f"docs/{PAGE}.md"),
    only: Sequence[str] = (),
    tests: Path = Path("tests"),
) -> Iterator[str]:
    """A line for each family, and the page with its CSV; ``only`` selects kinds of networks."""
    unknown = [name for name in only if name not in KINDS]
    if unknown:
        raise ValueError(f"only: got {unknown}; give some of {', '.join(KINDS)}")
    raw = page.with_suffix(".csv")
    rows: list[dict[str, Any]] = []
    if raw.is_file():
        with raw.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    for key in only or KINDS:
        for family, network, load in KINDS[key].families(tests):
            tried = {r["explainer"] for r in rows if (r["kind"], r["family"]) == (key, family)}
            names = [name for name in _names(KINDS[key]) if name not in tried]
            if not names:
                continue
            found = [
                {"kind": key, "family": family, "network": network, **row}
                for row in try_family(load, names, few_passes=key != "timm")
            ]
            rows += found
            write_rows(raw, rows)
            yield f"{family}: {sum(row['result'] != 'no' for row in found)} of {len(found)} run"
    write_text(page, "\n".join(page_of(rows)) + "\n")
    yield f"page: {page}"


def _names(kind: Kind) -> list[str]:
    entries = [entry for entry in EXPLAINERS.entries() if kind.networks & set(entry.networks)]
    return [entry.name for entry in entries if not explainer_class(entry.name).needs_head]


def try_family(
    load: Load, names: Sequence[str], few_passes: bool = True
) -> Iterator[dict[str, Any]]:
    """What runs on a network; ``few_passes`` also runs methods of many passes, with few of them."""
    backbone, size, why = None, "", ""
    try:
        backbone = load()
        size = "x".join(map(str, backbone.preprocessing.input_size))
    except ValueError as error:  # its features are no map
        why = " ".join(str(error).split())
    for name in names:
        entry, row = EXPLAINERS.entry(name), {"result": "no", "absorbed": "", "reason": why}
        if backbone is not None:
            found = try_explainer(entry, backbone)
            if found.runs:
                options = (f"{key}={value}" for key, value in found.options.items())
                row["result"] = ", ".join(options) or "runs"
            row["absorbed"] = "" if found.absorbed is None else f"{found.absorbed:.1e}"
            row["reason"] = found.reason
            if few_passes and found.runs:
                try:
                    if create_explainer(name, backbone, **found.options).forwards != 1:
                        few = create_explainer(name, backbone, **entry.cases[0])
                        few.attribute(probe_image(backbone), 0)
                except (ValueError, RuntimeError) as error:
                    row |= {"result": "no", "reason": " ".join(str(error).split())}
        yield {"size": size, "explainer": name, **row}


# ---------------------------------------------------------------------- the page


def page_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the page."""
    yield "# Explainers by family\n"
    yield "These tables show which explainers run on which family of networks. Every explainer was tried on"
    yield f"a small network of each family, with random weights. {RUNS} marks explainers that run with"
    yield f"their defaults, {NEEDS_OPTIONS} those that need options. For your own classifier,"
    yield "`xattn list explainers --for MODEL` prints what runs, and with which options."
    yield "The tables were made by\n\n```sh"
    yield f"python -m xattn.eval.studies explainers-by-family --page docs/{PAGE}.md\n```\n"
    yield f"A [file]({PAGE}.csv) lists the options, what relevance methods lose, and why the others do"
    yield "not run."
    for key, kind in KINDS.items():
        yield from _section(kind, [row for row in rows if row["kind"] == key])


def _section(kind: Kind, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    by: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["family"], {})[row["explainer"]] = row
    loaded = [name for name in by if next(iter(by[name].values()))["size"]]
    names = sorted({row["explainer"] for row in rows})
    runs = Counter(row["explainer"] for row in rows if row["result"] != "no")
    shown = [name for name in names if 0 < runs[name] < len(loaded)]
    yield f"\n## {kind.title}\n"
    yield f"Every network explains {kind.explained}; [{kind.guide}]({kind.guide}) describes how to load"
    yield "a network and how to choose what is explained.\n"
    for words, chosen in (
        (f"These run on all {len(loaded)} families", [n for n in names if runs[n] == len(loaded)]),
        ("These do not run on any", [n for n in names if not runs[n]]),
    ):
        if chosen:
            yield f"{words}: {', '.join(f'`{name}`' for name in chosen)}.\n"
    lost = [float(r["absorbed"]) for r in rows if r["explainer"] in CONSERVING and r["absorbed"]]
    if lost and kind is KINDS["timm"]:
        methods = " and ".join(f"`{name}`" for name in CONSERVING)
        yield f"The relevance of {methods} differs from the logit by at most {max(lost):.0e} of it.\n"
    missing = ", ".join(name for name in by if name not in loaded)
    if missing:
        yield f"These cannot be loaded by name: {missing}. Their features are not maps; wrap the model in a"
        yield "module with `forward_taps`, as [own-model.md](own-model.md) shows, or use"
        yield "[`apply_rules`](relevance.md#any-module), which runs them unchanged.\n"
    with_network = any(row["network"] for row in rows)
    yield f"| family |{' network |' * with_network} {' | '.join(f'`{name}`' for name in shown)} |"
    yield f"| :-- |{' :-- |' * with_network}{' :-: |' * len(shown)}"
    for family in loaded:
        network = f" {next(iter(by[family].values()))['network']} |" * with_network
        cells = [_cell(by[family][name]["result"]) for name in shown]
        yield f"| {family} |{network} {' | '.join(cells)} |"
    total = " | ".join(str(runs[name]) for name in shown)
    yield f"| all {len(loaded)} |{' |' * with_network} {total} |"


def _cell(result: str) -> str:
    return {"runs": RUNS, "no": ""}.get(result, NEEDS_OPTIONS)
