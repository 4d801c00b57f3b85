"""The pages of the gallery: pictures of every explainer, and tables of costs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn.eval.metrics.registry import GROUPS
from xattn.explainers.base import EXPLAINERS
from xattn.runtime.tables import markdown

Row = Mapping[str, Any]
COMMAND = (
    "OMP_NUM_THREADS=1 python -m xattn.eval.studies gallery "
    "--vit ../shared/data/vit-tiny/vit_tiny_patch16_224.safetensors"
)
PARTS = {
    "cnn": (
        "Of any classifier",
        "These maps were made on EfficientNet-Lite0, whose weights come with a Python package.",
    ),
    "vit": ("Of vision transformers", "These maps were made on a ViT-Ti/16 at 224 pixels."),
    "detector": (
        "Of detections",
        """\
These maps were made on the small detector of [which method finds the cue](results/detection-cues.md), which
was trained on drawn pictures. A coloured mark in a corner decides the class of the diamond, so a correct
map highlights this mark.""",
    ),
    "masks": (
        "Of masks",
        """\
These maps were made on the attention-gated U-Net of the [study of lesions](results/lesions.md), which was
trained on slices of a brain template with drawn lesions.""",
    ),
}
GALLERY = """\
# Gallery

This page shows maps by every explainer, for the classes that the networks predict. Within a section, all
methods explain the same pictures. The command below draws the pictures and measures the
[costs](costs.md). The page on [explainers](methods.md) describes each method and its pitfalls. A picture
shows what a method draws, not whether the map is correct; [another page](which-method.md) compares the
methods.

```sh
{command}
```

In maps without negative values, light colours mean high values. In signed maps, orange is evidence for
the class, and blue is evidence against it. Each map has its own colour scale, which ends at the 99.5th
percentile of its values. Methods that need many passes are shown on fewer photos. The [raw
values]({place}.csv) are in a file.
"""
COSTS = """\
# What does it cost?

This page gives the cost of each explainer, head and metric for one photo, on a single CPU thread; it was
not measured on a GPU. The command also draws the [gallery](gallery.md):

```sh
{command}
```

* **forward**, **backward**: the number of images that went through the network forward and backward,
  completely or in part. LeGrad has one backward pass for each layer, and these are short; the backward
  pass of a CAM method ends at the method's layer.
* **work**: floating-point operations of matrix products, convolutions and fused attention, as a multiple
  of one forward pass.
* **MB**: the peak memory of tensors that operators return, without weights and without what a convolution
  needs internally. Methods with many passes run many images at a time; a smaller `max_forward_batch`
  reduces their peak.
* **seconds**: CPU time for one photo, on a machine that other programs kept busy. The other columns do
  not depend on the machine.

The [raw values](gallery.csv) are in a file. The costs of batches are on [another page](results/speed.md).
"""
LONGER = "By default they take more passes: see [explainers](methods.md)."
ABOUT_HEADS = """
## Heads

The table gives, for each kind of head, the cost of a map for one class on EfficientNet-Lite0, or on the
ViT if the head needs one. The heads are not trained, which does not change their cost.
"""
ABOUT_METRICS = """
## Metrics

The table gives the cost per photo of computing each group of metrics for one Grad-CAM map, including the
forward and backward pass for the map itself, on EfficientNet-Lite0 at 112 pixels. Values are means over
four photos, which go through the network together; the memory is for all four. `squares`, `subsets`,
`single-deletion`, `sensitivity-n` and `mufidelity` use the same passes for all methods, so each further
method needs only a few more. The two groups of mosaics were run with `confidence=0` and one mosaic of the
four photos, which counts as one image of four times the size.
"""
HEADS = {"head": "evidence, ships with xattn", "head_ttame": "T-TAME, ships with xattn"}


def gallery_page(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """The page of pictures."""
    place = folder.name
    photos = {row["name"].removeprefix("photos-"): row for row in rows if row["kind"] == "photos"}
    drawn = {row["name"]: row for row in rows if row["kind"] == "explainer"}
    kinds = {photos[kind]["network"]: kind for kind in photos if kind != "small"}
    yield GALLERY.format(command=COMMAND, place=place)
    for kind, (title, about) in PARTS.items():
        if kind not in photos:
            continue
        yield f"## {title}\n\n{about}\n"
        classes = "" if kind == "masks" else f" The explained classes: {photos[kind]['options']}."
        yield f"![The pictures]({place}/photos-{kind}.jpg)\n\nThe pictures.{classes}\n"
        for name, row in drawn.items():
            if kinds.get(row["network"]) == kind or (
                kind == "detector" and "box" in row["network"]
            ):
                yield from _shown(name, row, place)


def _shown(name: str, row: Row, place: str) -> Iterator[str]:
    title = HEADS.get(name) or EXPLAINERS.entry(name).title
    method = "head" if name in HEADS else name
    given = (
        f", with the reduced settings `{row['options']}`"
        if row["options"] and name not in HEADS
        else ""
    )
    yield f"### {title}\n\n[`{method}`](methods.md#{method}): {passes(row)}{given}.\n"
    yield f"![Maps by {title}]({place}/{name}.jpg)\n"


def passes(row: Row) -> str:
    """The passes of a row, in words."""
    forward, backward = int(row["images"]), int(row["backwards"])
    words = f"{forward:,} forward pass{'es' * (forward != 1)}"
    return words + (f", {backward:,} backward" if backward else "") if forward else "no passes"


def costs_page(rows: Sequence[Row]) -> Iterator[str]:
    """The page of costs."""
    photos = {row["name"]: row for row in rows if row["kind"] == "photos"}
    small = photos.pop("photos-small", {})
    one = {row["network"]: row for row in photos.values()}
    yield COSTS.format(command=COMMAND)
    plain = [[r["network"], *_cells(r, r)] for r in one.values()]
    titles = ["forward", "backward", "work", "MB", "seconds"]
    yield "All other costs are relative to a forward pass, which costs:\n"
    yield from markdown(["network", *titles], plain)
    own = [row for row in rows if row["kind"] == "explainer"]
    base = {row["name"]: one.get(row["network"]) or _detector(one) for row in own}
    yield "\n## Explainers\n"
    ranked = sorted(own, key=lambda row: (int(row["images"]) + int(row["backwards"]), row["name"]))
    cells = [[_link(r), _short(r["network"]), *_cells(r, base[r["name"]])] for r in ranked]
    yield from markdown(["explainer", "network", *titles], cells, left=2)
    short = [f"`{row['name']}` with `{row['options']}`" for row in own if "=" in row["options"]]
    if short:
        yield ""
        yield from textwrap.wrap(
            f"Some methods ran with fewer passes: {', '.join(short)}. {LONGER}", 110
        )
    yield ABOUT_HEADS
    heads = [row for row in rows if row["kind"] == "head"]
    yield from _table(heads, one, "head", titles, "parameters")
    yield ABOUT_METRICS
    metrics = [row for row in rows if row["kind"] == "metric"]
    yield from _table(metrics, {row["network"]: small for row in metrics}, "group", titles, "")
    known = {row["name"] for row in metrics}
    if missing := [f"`{name}`" for name in GROUPS if name not in known]:
        yield ""
        yield from textwrap.wrap(f"Not measured yet: {', '.join(missing)}.", 110)


def _table(
    rows: Sequence[Row], one: Mapping[str, Row], what: str, titles: Sequence[str], extra: str
) -> Iterator[str]:
    run = [row for row in rows if int(row["photos"])]
    cells = []
    for row in run:
        own = [f"{int(row['options'].partition(' ')[0]):,}"] if extra else []
        where = " (ViT)" if row["network"].startswith("vit") else ""
        cells.append([f"`{row['name']}`{where}", *own, *_cells(row, one[row["network"]])])
    yield from markdown([what, *([extra] if extra else []), *titles], cells)
    for row in rows:
        if not int(row["photos"]):
            yield f"\n`{row['name']}` was {row['options']}."


def _cells(row: Row, one: Row) -> list[str]:
    work = float(row["operations"]) / float(one["operations"])
    memory, seconds = float(row["peak"]) / 1e6, float(row["seconds"])
    images = [f"{int(row[key]):,}" for key in ("images", "backwards")]
    return [*images, f"{work:,.1f}", f"{memory:,.0f}", f"{seconds:.2f}"]


def _link(row: Row) -> str:
    name = row["name"]
    shown = f" ({row['options'].partition('-')[0]})" if name in HEADS else ""
    return f"[`{'head' if name in HEADS else name}`](methods.md#{'head' if name in HEADS else name}){shown}"


def _short(network: str) -> str:
    return network.partition(" ")[0]


def _detector(one: Mapping[str, Row]) -> Row:
    return next(row for row in one.values() if row["name"] == "photos-detector")
