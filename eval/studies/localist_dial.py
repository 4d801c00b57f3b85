"""The localist dial in a trained ViT: how far attention concentrates, what that costs, and steering.

    python -m xattn.eval.studies dial photos/ --labels classes.json -b vit_tiny_patch16_224 --weights FILE

The dial is put into the last blocks, or into all, with the quadrants of the photo as regions. The
leading region is the one that gets most of a query's attention; its mass is a mean over blocks, heads
and queries. For steering, all queries are drawn to one quadrant, then the next. Finally, regions are
recruited: for random points, whose clusters and variance are known, and for the photos' keys.

Each setting's results stay in a file of the output folder, from which the same command resumes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xattn.attention import SoftmaxOperator, record
from xattn.attention.mechanisms.localist import recruit, recruited_regions, region_masses
from xattn.attention.model.spec import format_layers
from xattn.backbone import Backbone, converted
from xattn.eval.bootstrap import mean_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import LabelsAt, Network, OutputAt, PhotosAt, Quick
from xattn.eval.studies.run_files import AGAIN, kept_record, kept_values
from xattn.eval.studies.study_photos import Photo, images_of, labelled_photos, photos_record
from xattn.runtime import strict_json
from xattn.runtime.files import check_folder, write_json, write_text


@dataclass(frozen=True)
class DialStudyConfig:
    """Which blocks get the localist dial, how far it is turned, and on how many photos."""

    betas: tuple[float, ...] = (0.0, 4.0, 16.0, 64.0)
    """Settings of the dial; 0, the network as trained, is always measured."""
    last: int = 3  # How many of the last blocks get the dial; all blocks are also measured.
    steered: int = 6  # How many of the last blocks are steered to a quadrant.
    steer_beta: float = 2.0  # The dial's setting for steering.
    photos: int = 100  # How many photos, drawn by the seed.
    variance: float = 0.7  # Variance of a recruited region, as a share of the keys' own.
    draws: int = 50  # Random sets of points that regions are recruited for.
    batch_size: int = 10  # Photos per pass.
    seed: int = 0  # Seed of the photos.

    def quick(self) -> DialStudyConfig:
        """A few photos and draws, to see that everything runs; its figures mean nothing."""
        return replace(self, betas=(0.0, 16.0), photos=min(self.photos, 4), draws=5)


QUADRANTS = 4
POINTS = {"points": 150, "width": 2, "apart": 8.0}  # of three clusters of standard deviation 1
Values = Mapping[str, Any]
DEFAULTS = DialStudyConfig()


def study(
    backbone: Network,
    data: PhotosAt,
    labels: LabelsAt = "folders",
    output: OutputAt = "runs/study-dial",
    config: DialStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Measure what is not finished yet, write report.md, and yield its lines.

    Args:
        backbone: a trained ViT, which is not changed.
        data, labels: as in :func:`~xattn.eval.studies.swapped_attention.study`.
        output: folder for the measurements and the report.
    """
    config = config.quick() if quick else config
    output = Path(output)
    photos = labelled_photos(backbone, data, labels, config.seed)[: config.photos]
    depth = len(getattr(backbone.model, "blocks", ()))
    for name in ("last", "steered"):
        if getattr(config, name) > depth:
            raise ValueError(
                f"{name}: got {getattr(config, name)}; {backbone.name} has {depth} blocks"
            )
    check_folder(output)
    # Other settings of the dial may be added later.
    settings = {k: v for k, v in asdict(config).items() if k not in ("betas", "batch_size")}
    kept_record(output / "record.json", photos_record(backbone, photos, settings))
    split = Split("dial")
    photos = split.score(photos)
    split.write(output / "split.json")
    lines = [
        f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}, {len(photos)} photos; quadrants"
    ]
    yield from lines
    last, every = range(depth - config.last, depth), range(depth)
    plain = _measured(backbone, photos, last, {"beta": 0.0}, output, config)
    for some in (
        _dial(backbone, photos, plain, (last, every), output, config),
        _steering(backbone, photos, plain, range(depth - config.steered, depth), output, config),
        _recruitment(backbone, photos, last, output, config),
    ):
        for line in some:
            lines.append(line)
            yield line
    write_text(output / "report.md", "\n".join(lines) + "\n")
    yield f"\nreport: {output / 'report.md'}"


# ---------------------------------------------------------------------- the dial


def _dial(
    backbone: Backbone,
    photos: Sequence[Photo],
    plain: Values,
    places: Sequence[range],
    output: Path,
    config: DialStudyConfig,
) -> Iterator[str]:
    yield "\n| blocks | beta | mass in the leading region | as the network as trained, % | right, % |"
    yield "| :-- | --: | --: | --: | --: |"
    for layers in places:
        for beta in sorted({0.0, *config.betas}):
            found = _measured(backbone, photos, layers, {"beta": beta}, output, config)
            same = [a == b for a, b in zip(found["classes"], plain["classes"], strict=True)]
            right = [k == p.label for k, p in zip(found["classes"], photos, strict=True)]
            cells = [format_layers(layers), f"{beta:g}", mean_interval(found["leading"]).text(3)]
            cells += [mean_interval([100.0 * x for x in some]).text(1) for some in (same, right)]
            yield f"| {' | '.join(cells)} |"


def _steering(
    backbone: Backbone,
    photos: Sequence[Photo],
    plain: Values,
    layers: range,
    output: Path,
    config: DialStudyConfig,
) -> Iterator[str]:
    """p of the class that the network as trained predicts, by the quadrant that it is steered to."""
    options = [{"beta": config.steer_beta, "target": target} for target in range(QUADRANTS)]
    found = [_measured(backbone, photos, layers, o, output, config, plain) for o in options]
    p = np.array([one["p"] for one in found])
    best, worst = p.max(0), p.min(0)
    read = np.array(plain["read"]).argmax(1)
    chosen = 100.0 * (p.argmax(0) == read)
    yield (
        f"\n| steered, blocks {format_layers(layers)}, beta {config.steer_beta:g} | p of the class "
        f"predicted as trained |"
    )
    yield "| :-- | --: |"
    rows = {
        "not steered": plain["p"],
        "to the best quadrant": best,
        "to the worst quadrant": worst,
        "best less worst": best - worst,
    }
    for name, values in rows.items():
        yield f"| {name} | {mean_interval(values).text(3)} |"
    share = mean_interval(chosen).text(1)
    yield (
        f"\nThe best quadrant is the one that the class token reads most as trained on {share} % of the "
        f"photos (by chance 25 %)."
    )


def _measured(
    backbone: Backbone,
    photos: Sequence[Photo],
    layers: range,
    options: Mapping[str, Any],
    output: Path,
    config: DialStudyConfig,
    plain: Values | None = None,
) -> Values:
    """For each photo: ``classes``, the predicted class; ``p`` of the class that ``plain`` predicts (its
    own without ``plain``); ``leading``, the mass in the leading region; ``read``, the attention of the
    first token to each quadrant."""
    said = "-".join(f"{key}-{value:g}" for key, value in options.items())
    file = output / f"blocks-{format_layers(layers)}-{said}.json"
    if not file.is_file():
        network = converted(backbone, "localist", layers, options)
        values: dict[str, list[Any]] = {key: [] for key in ("classes", "p", "leading", "read")}
        known = None if plain is None else torch.tensor(plain["classes"], device="cpu")
        for start in range(0, len(photos), config.batch_size):
            some = photos[start : start + config.batch_size]
            own = None if known is None else known[start : start + len(some)]
            for key, found in _pass(network, images_of(network, some), layers, own).items():
                values[key] += found.tolist()
        write_json(file, values)
    return strict_json.read(file, "output", AGAIN)  # type: ignore[no-any-return]


@torch.no_grad()
def _pass(
    network: Backbone, images: Tensor, layers: range, classes: Tensor | None
) -> dict[str, Tensor]:
    with record(network.model) as calls:
        p = network.probabilities(network.logits(images)).float().cpu()
    masses = []
    for layer in layers:
        operator = calls[layer].operator
        assert isinstance(operator, SoftmaxOperator)
        masses.append(region_masses(operator).float().cpu())
    mass = torch.stack(masses)  # (blocks, B, H, N, R)
    predicted = p.argmax(1)
    asked = predicted if classes is None else classes
    return {
        "classes": predicted,
        "p": p.gather(1, asked[:, None])[:, 0],
        "leading": mass.amax(-1).mean((0, 2, 3)),
        "read": mass[:, :, :, 0].mean((0, 2)),
    }


# ---------------------------------------------------------------------- recruitment


def _recruitment(
    backbone: Backbone,
    photos: Sequence[Photo],
    layers: range,
    output: Path,
    config: DialStudyConfig,
) -> Iterator[str]:
    drawn = kept_values(output / "recruited-points.json", lambda: _of_points(config.draws))
    keys = kept_values(
        output / "recruited-keys.json", lambda: _of_keys(backbone, photos, layers, config)
    )
    yield "\n| recruited from | regions | right | milliseconds each |"
    yield "| :-- | --: | --: | --: |"
    for clusters, name in ((3, "three clusters"), (1, "one cluster")):
        found = drawn[str(clusters)]
        right = sum(count == clusters for count in found["regions"])
        cells = [_spread(found["regions"]), f"{right} of {len(found['regions'])}"]
        yield f"| {name}, variance given | {' | '.join(cells)} | {_times(found['seconds'])} |"
    name = f"keys of blocks {format_layers(layers)}, 16 components, variance {config.variance:g}"
    yield f"| {name} | {_spread(keys['regions'])} | | {_times(keys['seconds'])} |"


def _of_points(draws: int) -> dict[str, dict[str, list[float]]]:
    """Regions recruited for random clusters, whose standard deviation is 1."""
    n, width, apart = int(POINTS["points"]), int(POINTS["width"]), POINTS["apart"]
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], device="cpu")
    found: dict[str, dict[str, list[float]]] = {}
    for clusters in (3, 1):
        values: dict[str, list[float]] = {"regions": [], "seconds": []}
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(n, width, generator=generator, device="cpu")
            points = apart * corners[torch.arange(n, device="cpu") % clusters] + noise
            _timed(values, partial(_recruited, points))
        found[str(clusters)] = values
    return found


@torch.no_grad()
def _of_keys(
    backbone: Backbone, photos: Sequence[Photo], layers: range, config: DialStudyConfig
) -> dict[str, list[float]]:
    """Regions recruited for the keys of every photo and block."""
    values: dict[str, list[float]] = {"regions": [], "seconds": []}
    for start in range(0, len(photos), config.batch_size):
        images = images_of(backbone, photos[start : start + config.batch_size])
        with record(backbone.model) as calls:
            backbone.logits(images)
        for layer in layers:
            operator = calls[layer].operator
            assert isinstance(operator, SoftmaxOperator)
            keys = operator.k[:, :, backbone.prefix_tokens :].transpose(1, 2).flatten(2).cpu()
            for one in keys:
                _timed(values, partial(recruited_regions, one, config.variance))
    return values


def _recruited(points: Tensor) -> Tensor:
    return recruit(points, 1.0).regions


def _timed(values: dict[str, list[float]], find: Callable[[], Tensor]) -> None:
    """Add the number of regions that ``find`` returns, and its seconds, to ``values``."""
    start = time.process_time()
    regions = find()
    values["seconds"].append(time.process_time() - start)
    values["regions"].append(int(regions.max()) + 1)


def _spread(counts: Sequence[float]) -> str:
    low, high = min(counts), max(counts)
    return (
        f"{low:g}" if low == high else f"{low:g} to {high:g}, median {statistics.median(counts):g}"
    )


def _times(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.0f}, at most {1000 * max(seconds):.0f}"
