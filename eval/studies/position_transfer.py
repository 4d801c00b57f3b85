"""Tests position encodings at other image sizes: networks train for minutes at one size.

    python -m xattn.eval.studies positions photos/ --labels classes.json -b vit_tiny_patch16_224 \\
        --weights FILE

Every encoding replaces the positions of a copy of a trained ViT. The copies are trained for the
same number of steps on the same photos, and tested on other photos. "as trained" is the network
without that training, its positions resized. The labels are used only in the test.

The output folder keeps trained networks, and the classes of all photos for each encoding and size.
The same command resumes from there; an encoding whose training was stopped starts again.

Training minimizes

    L = KL(softmax z || softmax z'),   z the logits of the network as it was trained

over all weights of the copy; it reads no labels. Where an encoding replaces the network's own
positions, each patch gets their mean, which says nothing about its place. Order, flips and jitter
are pure functions of seed and step.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from xattn.attention.positions import Rotation
from xattn.backbone import Backbone, converted, resized
from xattn.eval.bootstrap import mean_interval, paired_difference
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import LabelsAt, Network, OutputAt, PhotosAt, Quick
from xattn.eval.studies.run_files import AGAIN, kept_record, reported
from xattn.eval.studies.study_photos import Photo, labelled_photos, photos_record
from xattn.eval.studies.swap.measuring import batch_size
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.runtime import strict_json
from xattn.runtime.files import atomic_file, check_folder, write_json
from xattn.training.optimizers import decay_groups, share_of_peak


@dataclass(frozen=True)
class PositionStudyConfig:
    """Settings of the position study: encodings, photos, test sizes and training."""

    encodings: tuple[str, ...] = (
        "absolute",
        "none",
        "axial",
        "axial:span=14",
        "liere:init_std=0",
        "comrope:form=ap,init_std=0",
        "comrope:form=ld,init_std=0",
    )
    """"absolute", the network's own positions; "none"; or rotations, as NAME:option=value,..."""
    size: int = 224  # Image side in training, in pixels.
    sizes: tuple[int, ...] = (112, 160, 224, 336, 448)  # Image sides in tests, in pixels.
    photos: int = 500
    """Number of photos, drawn by the seed; every other one is for training, the rest for tests."""
    keep_absolute: bool = False  # Rotate in addition to the network's own positions.
    epochs: int = 6  # Passes over the training photos, the same for every encoding.
    batch_size: int = 16  # Photos per step.
    lr: float = 1e-4
    """Peak rate of AdamW for the network's weights, reached after a twentieth of the steps; then
    half a cosine to 0."""
    rotation_lr: float = 1e-2  # The same for the parameters of rotations.
    weight_decay: float = 0.01  # Of the network's matrices.
    seed: int = 0  # For the choice of photos, their order, flips and jitter.

    def quick(self) -> PositionStudyConfig:
        """A few photos and steps, to check that everything runs; its figures mean nothing."""
        sizes = (self.size // 2, self.size)
        return replace(self, photos=min(self.photos, 16), epochs=1, batch_size=4, sizes=sizes)


ABSOLUTE, NONE = "absolute", "none"


def pixels_of(paths: Sequence[Path], backbone: Backbone) -> Tensor:
    """Photos as the network sees them, uint8 (n, 3, H, W)."""
    preprocessing = backbone.preprocessing
    found = [prepare(load_image(path), preprocessing, "crop")[0] for path in paths]
    return (torch.stack(found) * 255).round().to(torch.uint8)


def images_of(pixels: Tensor, backbone: Backbone) -> Tensor:
    """The inverse of :func:`pixels_of`, on the network's device: (n, 3, H, W) in [0, 1]."""
    return pixels.to(backbone.device, backbone.mean.dtype) / 255


def student_of(teacher: Backbone, encoding: str, keep_absolute: bool = False) -> Backbone:
    """A copy of ``teacher`` with a position encoding; the two share no weights."""
    positions = getattr(teacher.model, "pos_embed", None)
    if not isinstance(positions, nn.Parameter):
        raise ValueError(
            f"backbone: {teacher.name} adds no trained positions to its tokens; choose a ViT that does, "
            f"such as vit_tiny_patch16_224"
        )
    network = copy.deepcopy(teacher)
    if encoding not in (ABSOLUTE, NONE):
        network = converted(network, "softmax", None, {"rotate": encoding})
    network.model.requires_grad_(True)
    if encoding != ABSOLUTE and not (keep_absolute and encoding != NONE):
        own: Any = network.model.pos_embed
        patches = math.prod(network.model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        with torch.no_grad():
            own[:, -patches:] = own[:, -patches:].mean(1, keepdim=True)
        own.requires_grad_(False)
    return network


@torch.no_grad()
def targets_of(teacher: Backbone, pixels: Tensor, batch_size: int) -> Tensor:
    """The logits of the photos and of the mirrored photos, (2, n, K)."""
    both = []
    for view in (pixels, pixels.flip(-1)):
        parts = [teacher.logits(images_of(part, teacher)) for part in view.split(batch_size)]
        both.append(torch.cat(parts).float().cpu())
    return torch.stack(both)


def train(
    network: Backbone,
    pixels: Tensor,
    targets: Tensor,
    config: PositionStudyConfig,
    title: str = "",
    progress: bool = True,
) -> float:
    """Train ``network`` in place on logits ``targets`` (2, n, K) of ``pixels``; return the last loss."""
    per_epoch = -(-len(pixels) // config.batch_size)
    total, last = per_epoch * config.epochs, float("nan")
    optimizer = _optimizer(network.model, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    network.model.eval()
    for module in network.model.modules():
        if isinstance(module, Rotation):
            module.train()  # for its jitter; the network has no dropout
    with tqdm(total=total, desc=title, unit="step", disable=not progress) as bar:
        for step in range(total):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share_of_peak(step, total)
            index, flips = _batch(len(pixels), step, per_epoch, config)
            some = pixels[index]
            some[flips] = some[flips].flip(-1)
            wanted = targets[flips.long(), index].to(network.device)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed * 1_000_003 + step)
                found = network.logits(images_of(some, network)).float()
            loss = F.kl_div(
                found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = float(loss.detach())
            if not math.isfinite(last):
                raise RuntimeError(f"{title}: the loss of step {step} is {last}; give a smaller lr")
            bar.set_postfix(loss=f"{last:.3f}")
            bar.update()
    network.model.eval().requires_grad_(False)
    return last


def _batch(
    photos: int, step: int, per_epoch: int, config: PositionStudyConfig
) -> tuple[Tensor, Tensor]:
    """The indices of a step's photos, and which of them are mirrored."""
    epoch, at = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(photos, generator=generator, device="cpu")
    flips = torch.rand(photos, generator=generator, device="cpu") < 0.5
    index = order[at * config.batch_size : (at + 1) * config.batch_size]
    return index, flips[index]


def _optimizer(model: nn.Module, config: PositionStudyConfig) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    turns = [p for name, p in named if ".rotate." in name]
    rest = [p for name, p in named if ".rotate." not in name]
    groups = [
        *decay_groups(rest, config.weight_decay),
        {"params": turns, "weight_decay": 0.0, "lr": config.rotation_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)


AS_TRAINED = "as trained"
MEASURES = {"right": "photos classified right, %", "same": "as the network as it was trained, %"}
Found = dict[int, dict[str, dict[str, NDArray[np.float64]]]]
"""Values (photos,), by size, encoding and measure."""
DEFAULTS = PositionStudyConfig()


def study(
    backbone: Network,
    data: PhotosAt,
    labels: LabelsAt = "folders",
    output: OutputAt = "runs/study-positions",
    config: PositionStudyConfig = DEFAULTS,
    quick: Quick = False,
    *,
    progress: bool = True,
) -> Iterator[str]:
    """Train and test the encodings that are not finished yet, write the report, and yield its
    lines.

    Args:
        backbone: a trained ViT that adds positions to its tokens; it is not changed.
        data, labels: as in :func:`~xattn.eval.studies.swapped_attention.study`.
        output: the folder for trained networks, finished values and the report.
    """
    config = config.quick() if quick else config
    output = Path(output)
    photos = labelled_photos(backbone, data, labels, config.seed)[: config.photos]
    if len(photos) < 2:
        raise ValueError(f"photos: got {len(photos)} with a class; give 2 or more, half to test")
    learned, tested = photos[::2], photos[1::2]
    teacher = resized(backbone, config.size)
    patch = max(getattr(getattr(teacher.model, "patch_embed", None), "patch_size", (1,)))
    for size in config.sizes:  # before anything is trained
        if size % patch:
            raise ValueError(f"sizes: got {size}; give multiples of a patch, {patch} pixels")
        resized(teacher, size)
    students = {name: student_of(teacher, name, config.keep_absolute) for name in config.encodings}
    check_folder(output)
    # Encodings and sizes may be added later.
    settings = {k: v for k, v in asdict(config).items() if k not in ("encodings", "sizes")}
    kept_record(output / "record.json", photos_record(backbone, photos, settings))
    split = Split("positions")
    tested = split.score(tested)
    _train(students, teacher, split.fit(learned), output, config, progress)
    networks = {AS_TRAINED: teacher, **students}
    found = {size: _at(size, networks, tested, output, config) for size in config.sizes}
    split.write(output / "split.json")
    heading = (
        f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}; trained on {len(learned)} photos at "
        f"{config.size} px for {config.epochs} epochs, tested on {len(tested)} others"
    )
    lines = [heading, *_tables(found)]
    values = [
        {"pixels": size, "photo": photo.name}
        | {f"{name}, {key}": table[name][key][i] for name in table for key in table[name]}
        for size, table in found.items()
        for i, photo in enumerate(tested)
    ]
    plot = output / "positions.png"
    _plot(found, config.size, heading, plot)
    yield from reported(output, lines, {"figures": _figures(found), "values": values}, plot)


def _folder(output: Path, encoding: str) -> Path:
    return output / re.sub(r"[^a-z0-9.]+", "-", encoding.lower()).strip("-")


def _train(
    students: Mapping[str, Backbone],
    teacher: Backbone,
    photos: Sequence[Photo],
    output: Path,
    config: PositionStudyConfig,
    progress: bool,
) -> None:
    """Train every student, or load its weights."""
    from safetensors.torch import save

    pixels: Tensor | None = None
    targets: Tensor | None = None
    for name, student in students.items():
        file = _folder(output, name) / "model.safetensors"
        if file.is_file():
            _load(student, file)
            continue
        if pixels is None or targets is None:
            pixels = pixels_of([photo.path for photo in photos], teacher)
            targets = targets_of(teacher, pixels, config.batch_size)
        train(student, pixels, targets, config, name, progress)
        state = {
            key: x.detach().cpu().contiguous() for key, x in student.model.state_dict().items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_bytes(save(state))


def _load(student: Backbone, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        student.model.load_state_dict(load(file.read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"output: {file} is damaged ({reason}); delete it, to train again"
        ) from None
    student.model.eval().requires_grad_(False)


def _at(
    size: int,
    networks: Mapping[str, Backbone],
    photos: Sequence[Photo],
    output: Path,
    config: PositionStudyConfig,
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The values of every encoding at one size."""
    pixels: Tensor | None = None
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, network in networks.items():
        file = _folder(output, name) / f"{size}px.json"
        if not file.is_file():
            own = resized(network, size)
            if pixels is None:
                pixels = pixels_of([photo.path for photo in photos], own)
            write_json(file, {"classes": _classes(own, pixels, size)})
        kept = strict_json.read(file, "output", AGAIN)
        classes = np.array(kept["classes"])
        found[name] = {"right": _equal(classes, [photo.label for photo in photos])}
    usual = _folder(output, AS_TRAINED) / f"{config.size}px.json"
    if not usual.is_file():
        same = pixels_of([photo.path for photo in photos], networks[AS_TRAINED])
        write_json(usual, {"classes": _classes(networks[AS_TRAINED], same, config.size)})
    given = strict_json.read(usual, "output", AGAIN)["classes"]
    for name in networks:
        kept = strict_json.read(_folder(output, name) / f"{size}px.json", "output", AGAIN)
        found[name]["same"] = _equal(np.array(kept["classes"]), given)
    return found


@torch.no_grad()
def _classes(network: Backbone, pixels: Tensor, size: int) -> list[int]:
    parts = pixels.split(batch_size(size))
    return [int(k) for part in parts for k in network.logits(images_of(part, network)).argmax(1)]


def _equal(classes: NDArray[np.int64], others: Sequence[int]) -> NDArray[np.float64]:
    return (classes == np.array(others)).astype(np.float64)


# ---------------------------------------------------------------------- report


def _tables(found: Found) -> Iterator[str]:
    for measure, title in MEASURES.items():
        yield f"\n{title}\n"
        yield f"| positions | {' | '.join(f'{size} px' for size in found)} |"
        yield "| :-- |" + " --: |" * len(found)
        for name in next(iter(found.values())):
            cells = [mean_interval(100 * table[name][measure]).text(1) for table in found.values()]
            yield f"| `{name}` | {' | '.join(cells)} |"


def _figures(found: Found) -> list[dict[str, Any]]:
    """Every mean with its interval, and the paired difference from ``absolute``."""
    lines = []
    for size, table in found.items():
        for name, measures in table.items():
            for measure, values in measures.items():
                line = {"pixels": size, "positions": name, "measure": measure}
                line |= mean_interval(100 * values)._asdict()
                if name != ABSOLUTE and ABSOLUTE in table:
                    apart = paired_difference(100 * values, 100 * table[ABSOLUTE][measure])
                    line |= {"difference": apart.mean, "difference lo": apart.lo}
                    line["difference hi"] = apart.hi
                lines.append(line)
    return lines


def _plot(found: Found, trained: int, title: str, path: Path) -> None:
    """Plot the share of correctly classified photos over the size, with a line for each encoding."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    sizes = sorted(found)
    for name in found[sizes[0]]:
        means = [100 * found[size][name]["right"].mean() for size in sizes]
        style: dict[str, Any] = {}
        if name == AS_TRAINED:
            style = {"color": "black", "linestyle": "--"}
        axes.plot(sizes, means, marker="o", label=name, **style)
    axes.axvline(trained, color="0.8", zorder=0)
    axes.set(xlabel="pixels a side", ylabel="right, %", xscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.set_title(title, fontsize=7)
    figure.legend(loc="outside right center", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
