"""Numbers of everything that xattn computes, on fixed inputs: kept before a rebuild, compared after it.

    python tests/reference_outputs.py write before.npz    # in the old tree
    python tests/reference_outputs.py write after.npz     # in the new tree, on the same machine
    python tests/reference_outputs.py compare before.npz after.npz

Every output has a name and is an array, so both trees may store them as they like. ``compare`` names what
is missing, new, or not equal bit for bit, with the largest difference relative to the array's own scale.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
from safetensors.torch import load_file
from small_networks import PAIRS, cheap, made
from training_runs import write_photos

from xattn.attention import Inputs, convert, create_mechanism
from xattn.attention.base import MECHANISMS
from xattn.blocks import block_class, create_block, list_blocks
from xattn.cli import main as command
from xattn.eval import evaluate
from xattn.eval.metrics.registry import GROUPS
from xattn.heads import list_heads
from xattn.heads.base import seeded_head

Output = tuple[str, Any]
GRID = (5, 6)


def explainers() -> Iterator[Output]:
    """The maps of two classes of two photos, by every explainer, on each kind of network."""
    networks: dict[str, Any] = {}
    for name, kind in PAIRS:
        if kind not in networks:
            networks[kind] = made(kind)
        backbone = networks[kind]
        head = seeded_head("ttame", backbone, 0) if name == "head" else None
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        method = cheap(name, backbone, head)
        for target in (1, 4):
            yield (
                f"explainer/{name}/{kind}/{target}",
                method.attribute(images, torch.full((2,), target)),
            )


def heads() -> Iterator[Output]:
    """The scores of every head with fresh weights, and the logits of those that classify."""
    for kind in ("cnn", "vit"):
        backbone = made(kind)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        taps = backbone(images)
        for name in list_heads():
            try:
                head = seeded_head(name, backbone, 0).eval()
            except ValueError:  # heads that this network has no place for
                continue
            with torch.no_grad(), contextlib.suppress(NotImplementedError):
                yield (
                    f"head/{name}/{kind}/scores",
                    head(head.tapped(backbone)(images), torch.tensor([1, 4])),
                )
                if hasattr(head, "logits"):
                    yield f"head/{name}/{kind}/logits", head.logits(head.tokens(taps))


def mechanisms() -> Iterator[Output]:
    """Outputs and matrices of every case of every mechanism, and a network converted to it."""
    for entry in MECHANISMS.entries():
        for options in entry.cases:
            case = ",".join(f"{k}={v}" for k, v in options.items()) or "default"
            torch.manual_seed(0)
            layer = create_mechanism(entry.name, 32, 2, **options).double().eval()
            draw = torch.Generator().manual_seed(3)
            q, k, v = torch.randn(3, 2, 2, 31, 16, generator=draw, dtype=torch.float64)
            x = torch.randn(2, 31, 32, generator=draw, dtype=torch.float64)
            with torch.no_grad():
                operator = layer.operator(Inputs(q, k, v, x, GRID, 1))
                yield f"attention/{entry.name}/{case}/output", layer(q, k, v, GRID, 1, x=x)
                yield f"attention/{entry.name}/{case}/rows", operator.rows(torch.arange(31))
        backbone = made("vit")
        with contextlib.suppress(ValueError):
            convert(backbone.model, entry.name, options=entry.cases[0])
            images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
            with torch.no_grad():
                yield f"attention/{entry.name}/converted", backbone.logits(images)


def blocks() -> Iterator[Output]:
    """The tokens that every case of every block gives."""
    for name in list_blocks():
        for options in block_class(name).entry.cases:
            case = ",".join(f"{k}={v}" for k, v in options.items()) or "default"
            torch.manual_seed(0)
            block = create_block(name, 32, **options).double().eval()
            draw = torch.Generator().manual_seed(5)
            x = torch.randn(2, 31, 32, generator=draw, dtype=torch.float64)
            with torch.no_grad():
                yield f"block/{name}/{case}", block(x, GRID, 1)


def metrics(photos: Path) -> Iterator[Output]:
    """Every group of metrics for two methods on eight photos: the numbers of each photo."""
    backbone = made("cnn")
    methods = {"gradcam": "gradcam", "random": "random"}
    for group in GROUPS:
        try:
            results = evaluate(backbone, methods, photos, metrics=[group], progress=False)
        except ValueError:  # localisation needs annotations
            continue
        for name, method in results.methods.items():
            for column, values in method.values.items():
                yield f"metric/{group}/{name}/{column}", values


COMMANDS = {
    "train-masking": "train {photos} --head ttame --objective masking --epochs 2 --batch-size 4",
    "train-outcomes": "train {photos} --head evidence --objective outcomes --epochs 2 --batch-size 4",
    "explain": "explain {photos} --explainers gradcam layercam --top 2",
    "explain-head": "explain {photos} --heads {work}/train-masking/head",
    "explain-shards": "explain {photos} --explainers gradcam --overlays 0",
    "explain-limit": "explain {photos} --explainers gradcam --limit 3",
    "evaluate": "evaluate {photos} --explainers gradcam random --metrics masking complexity",
    "compare": "compare {photos} --explainers gradcam layercam --metrics masking road",
    "probe": "probe {photos} --heads gap efficient_probe --epochs 2 --labels {work}/labels.json --cache-batch 4",
    "distill": "distill {photos} --mechanism hedgehog --layers 1 --epochs 1 --finetune lora --validation {photos}",
    "prune": "prune {photos} --keep 1 --epochs 1 --validation {photos}",
}


def jobs(photos: Path, work: Path) -> Iterator[Output]:
    """What the commands write: weights, packs, leaderboards."""
    from xattn import load_pack

    cnn, vit = (f"-b {name} --weights random --device cpu" for name in ("test_resnet", "test_vit"))
    work.mkdir()
    labels = {folder: {"group": f"group {folder}"} for folder in ("0", "1")}
    (work / "labels.json").write_text(json.dumps(labels))
    for name, line in COMMANDS.items():
        folder, model = work / name, vit if name in ("distill", "prune") else cnn
        text = f"{line.format(photos=photos, work=work)} {model} --output {folder}"
        shown = io.StringIO()
        torch.manual_seed(0)
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            failed = command(text.split())
        if failed:
            raise SystemExit(f"{text}\n{shown.getvalue()}")
        for path in sorted(folder.rglob("*.safetensors")):
            if "checkpoint" in str(path) or path.name.startswith(
                ("maps", "features", "thumb", "rows")
            ):
                continue
            for key, value in load_file(path).items():
                yield f"job/{name}/{path.parent.relative_to(folder)}/{key}", value
        for path in sorted([*folder.rglob("*.csv"), *folder.rglob("leaderboard.json")]):
            yield from numbers_of(f"job/{name}/{path.name}", path)
        pack = next((p for p in (folder, folder / "pack") if (p / "manifest.json").is_file()), None)
        if pack is not None:
            for entry in load_pack(pack):
                key = f"{Path(entry.file_name).stem}/{entry.method}/{entry.target}"
                yield f"job/{name}/{key}/map", entry.map
                yield f"job/{name}/{key}/p", entry.probability


def numbers_of(name: str, path: Path) -> Iterator[Output]:
    """All numbers of a table or of a JSON file, in order, as one array; times are left out."""

    def walk(value: Any, key: str = "") -> Iterator[float]:
        if "second" in key or "time" in key:
            return
        if isinstance(value, dict):
            for inner, item in value.items():
                yield from walk(item, inner)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item, key)
        elif isinstance(value, int | float):
            yield float(value)

    if path.suffix == ".json":
        yield name, np.array(list(walk(json.loads(path.read_text()))))
        return
    with path.open(newline="") as file:
        rows = [[number(cell) for cell in row] for row in csv.reader(file)]
    yield name, np.array([x for row in rows for x in row if x is not None])


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def write(path: Path) -> None:
    """All outputs, in one file."""
    warnings.simplefilter("ignore")
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        for i, photo in enumerate(sorted(write_photos(Path(folder) / "flat", 8).iterdir())):
            (photos / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            photo.rename(photos / f"{i % 2}" / photo.name)
        groups = {
            "explainers": explainers(), "heads": heads(), "mechanisms": mechanisms(), "blocks": blocks(),
            "metrics": metrics(photos), "jobs": jobs(photos, Path(folder) / "work"),
        }  # fmt: skip
        for group, outputs in groups.items():
            began, before = time.process_time(), len(arrays)
            for name, value in outputs:
                assert name not in arrays, name
                if isinstance(value, torch.Tensor):
                    value = value.detach().cpu().numpy()
                arrays[name] = np.asarray(value)
            count, seconds = len(arrays) - before, time.process_time() - began
            print(f"{group}: {count} outputs, {seconds:.0f} s", flush=True)
    np.savez_compressed(path, **arrays)
    print(f"{len(arrays)} outputs in {path}")


def compare(before: Path, after: Path, tolerance: float = 0.0) -> int:
    """Print what differs; returns the number of outputs that are missing or differ."""
    old, new = np.load(before), np.load(after)
    missing, added = set(old.files) - set(new.files), set(new.files) - set(old.files)
    wrong = []
    for name in sorted(set(old.files) & set(new.files)):
        a, b = old[name], new[name]
        if a.shape != b.shape:
            wrong.append((math.inf, name, f"{a.shape} -> {b.shape}"))
        elif a.tobytes() != b.tobytes():
            scale = max(float(np.nanmax(np.abs(a), initial=0)), 1e-30)
            off = float(np.nanmax(np.abs(a.astype(float) - b.astype(float)), initial=0)) / scale
            off = off if np.array_equal(np.isnan(a), np.isnan(b)) else math.inf
            if off > tolerance:
                wrong.append((off, name, f"{off:.2g} of its largest value"))
    for what, names in (("missing", missing), ("new", added)):
        print(f"{what}: {len(names)}", *sorted(names)[:20], sep="\n  ")
    print(f"differ: {len(wrong)} of {len(old.files)}")
    for _, name, text in sorted(wrong, reverse=True)[:40]:
        print(f"  {name}: {text}")
    return len(missing) + len(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write").add_argument("path", type=Path)
    both = commands.add_parser("compare")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    both.add_argument("--tolerance", type=float, default=0.0)
    given = parser.parse_args()
    if given.command == "write":
        write(given.path)
    else:
        sys.exit(1 if compare(given.before, given.after, given.tolerance) else 0)
