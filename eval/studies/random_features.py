"""Random-feature attention on a frozen backbone: accuracy, exactness of maps, effect of the query.

    python -m xattn.eval.studies random-features photos/ --labels classes.json -b vit_tiny_patch16_224 \\
        --weights FILE

The head ``random_feature`` is solved for on cached tokens, with each kind of query, and compared
with ridge and logistic regression on the mean patch and on the class token. Each fold is tested
once for each seed. The last table shows how many examples the head needs to fit known functions of
tokens,

    f1 = 1/N sum_i <beta, x_i>^p,   f2 = 1/N sum_i <x_0, x_i>^p,   f3 = 1/N sum_i <x_0, x_i>^p <beta, x_i>

of a query x_0 and N tokens on the unit sphere (after arXiv 2307.11353, section 5). RFA and BRFA are
fitted by the ridge regression of the head ``random_feature``. They are compared with a two-layer
network on the concatenated tokens, which has as many random ReLU units as they have weights, M (d +
1).
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.backbone import Backbone
from xattn.correlation import spearman
from xattn.eval.bootstrap import mean_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.coarse_groups import fit_probe
from xattn.eval.studies.options import Network, OutputAt, PhotosAt, Quick
from xattn.eval.studies.run_files import AGAIN, kept_record, kept_values, reported
from xattn.heads import Tokens
from xattn.heads.attentive import AttentiveHead, LabelledTokens, has_class_token
from xattn.heads.base import seeded_head
from xattn.heads.random_feature import (
    DualRidge,
    RandomFeature,
    append_one,
    features,
    queries_of,
    random_weights,
)
from xattn.photos.labels import Labels, read_labels
from xattn.photos.sources import Files, open_photos
from xattn.runtime import strict_json
from xattn.runtime.files import check_folder, write_json
from xattn.training.features import Features, cache_features
from xattn.training.labelled import stratified_folds


@dataclass(frozen=True)
class RandomFeatureConfig:
    """Settings of the random-feature study, which fits photos and known functions."""

    heads: int = 1000  # M, the random heads.
    queries: tuple[str, ...] = ("constant", "gap", "cls")
    """Queries of the head random_feature; cls needs a backbone with a class token."""
    components: int | None = None  # Principal components of the patches; None keeps all channels.
    biased: bool = False  # Draw W around the identity (BRFA) where the query is not constant.
    folds: int = 4  # Parts of the photos; each is tested once.
    seeds: int = 2  # Draws of the random heads: seeds 0, 1, ...
    seed: int = 0  # For the folds.
    scaling: bool = True  # Also fit known functions of random tokens to more and more examples.
    examples: tuple[int, ...] = (100, 200, 400, 800, 1600)
    """n, the numbers of examples to fit such a function to."""
    tests: int = 500  # Examples to test it on.
    width: int = 16  # d of the random tokens.
    tokens: int = 16  # N of the random tokens, beside the query.

    def quick(self) -> RandomFeatureConfig:
        """Few heads, seeds and examples to check that all works; its figures mean nothing."""
        return replace(
            self, heads=min(self.heads, 20), folds=2, seeds=2, examples=(20, 40), tests=50
        )


POWERS = (1, 2, 3)
MODELS = ("RF-MLP", "RFA", "BRFA")
BLOCK = 2**23  # entries of features computed at a time


def tokens_of(config: RandomFeatureConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Queries (n, d) and tokens (n, N, d) of all examples, with the test examples last."""
    count = config.examples[-1] + config.tests
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, config.tokens + 1, config.width, generator=generator)
    x = F.normalize(x, dim=-1)
    return x[:, 0], x[:, 1:]


def targets_of(x_0: Tensor, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The functions by name, (n,) each, with mean 0 and variance 1 over the examples."""
    generator = torch.Generator().manual_seed(seed)
    beta = F.normalize(torch.randn(x.shape[2], generator=generator), dim=0)
    along, beside = (x @ beta).double(), (x @ x_0[..., None])[..., 0].double()
    found = {}
    for p in POWERS:
        found[f"f1, p = {p}"] = along**p
        found[f"f2, p = {p}"] = beside**p
        found[f"f3, p = {p}"] = beside**p * along
    means = {name: values.mean(1) for name, values in sorted(found.items())}
    return {name: (v - v.mean()) / v.std(correction=0) for name, v in means.items()}


def kernel_of(model: str, x_0: Tensor, x: Tensor, fitted: int, heads: int, seed: int) -> Tensor:
    """(n, fitted) float64: dot products of all examples' features with the first ``fitted``."""
    width = x.shape[2]
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(heads, BLOCK // (len(x) * (width + 1))))
    features_of: Callable[[int], Tensor]
    if model == "RF-MLP":
        joined = torch.cat([x_0[:, None], x], 1).flatten(1) / math.sqrt(x.shape[1] + 1)
        joined = append_one(joined)

        def features_of(count: int) -> Tensor:
            units = torch.randn(joined.shape[1], count * (width + 1), generator=generator)
            return (joined @ units).relu()
    else:
        keys = append_one(x)

        def features_of(count: int) -> Tensor:
            weights = random_weights(width + 1, count, width + 1, model == "BRFA", generator)
            return features(queries_of(append_one(x_0), weights), keys).flatten(1)

    kernel = torch.zeros(len(x), fitted, dtype=torch.float64)
    for first in range(0, heads, size):
        phi = features_of(min(size, heads - first)).double()
        kernel += phi @ phi[:fitted].mT
    return kernel


def scaling(config: RandomFeatureConfig, seed: int) -> Iterator[dict[str, object]]:
    """Records of model, function, ``n`` and ``mse``, the mean squared error on the test examples.

    Predicting the mean has an error of 1.
    """
    x_0, x = tokens_of(config, seed)
    targets = targets_of(x_0, x, seed)
    most = config.examples[-1]
    for model in MODELS:
        kernel = kernel_of(model, x_0, x, most, config.heads, seed)
        for n in config.examples:
            split = Split("scaling", range(len(x)))
            seen, tested = split.fit(slice(n)), split.score(slice(most, None))
            solver = DualRidge(kernel[seen, seen])
            for name, values in targets.items():
                fit = solver.fit(values[seen, None])
                found = kernel[tested, seen] @ fit.alpha + fit.intercept
                mse = float((found[:, 0] - values[tested]).square().mean())
                yield {"model": model, "function": name, "n": n, "mse": mse}


AT_ONCE = 64  # photos whose tokens are read at a time
FEW = 8  # photos of a fold whose maps are compared with their logits
DEFAULTS = RandomFeatureConfig()


@dataclass(frozen=True)
class Photos:
    """Cached tokens of photos, their classes, and their folds."""

    backbone: Backbone
    features: Features
    labels: Tensor
    names: list[str]
    folds: list[list[int]]

    def part(self, head: AttentiveHead, index: Sequence[int]) -> LabelledTokens:
        """The photos at ``index``, with tokens as ``head`` reads them."""

        def batches() -> Iterator[Tokens]:
            for start in range(0, len(index), AT_ONCE):
                yield head.tokens(self.features.taps(index[start : start + AT_ONCE]))

        return LabelledTokens(batches, self.labels[list(index)])

    def split(self) -> Split:
        """The split of one network; its items are the numbers of the photos."""
        return Split("random features", [Path(name) for name in self.features.names])

    def rest(self, fold: Sequence[int]) -> list[int]:
        """The training photos, which are not in ``fold``."""
        return sorted(set(range(len(self.labels))) - set(fold))


def study(
    backbone: Network,
    data: PhotosAt,
    labels: str | Path | None = None,
    output: OutputAt = "runs/study-random-features",
    config: RandomFeatureConfig = DEFAULTS,
    quick: Quick = False,
    *,
    progress: bool = True,
) -> Iterator[str]:
    """Solve and test the heads that are not finished yet, write the report, and yield its lines.

    Args:
        data, labels: photos and their classes, as for ``xattn probe``.
        output: folder for features, measurements, report.md and scaling.csv.
    """
    config = config.quick() if quick else config
    output = Path(output)
    if "cls" in config.queries and not has_class_token(backbone):
        raise ValueError(
            f"queries: got cls; {backbone.name} has no class token, give constant and gap alone"
        )
    backbone = backbone if backbone.adapter else backbone.with_taps(["head"])
    check_folder(output)
    photos = _photos(backbone, data, labels, output, config, progress)
    kept_record(output / "record.json", _record(photos, config))
    rows = _baselines(photos)
    measured = {query: _measured(photos, query, output, config) for query in config.queries}
    lines = [
        f"{backbone.name}, {len(photos.labels)} photos of {len(photos.names)} classes, {config.folds} "
        f"folds, M = {config.heads}, {config.seeds} draws of the heads"
        + ("" if config.components is None else f", {config.components} principal components"),
        *_accuracies(rows, measured),
        *_exactness(measured),
    ]
    tables = {}
    if config.scaling:
        found = [
            record for seed in range(config.seeds) for record in _scaling(output, config, seed)
        ]
        lines += _scaling_table(found, config)
        keys = ("function", "model", "n")
        means = sorted(_means(found).items())
        tables["scaling"] = [dict(zip(keys, key, strict=True)) | {"mse": x} for key, x in means]
    yield from reported(output, lines, tables)


def _photos(
    backbone: Backbone,
    data: str | Path,
    labels: str | Path | None,
    output: Path,
    config: RandomFeatureConfig,
    progress: bool,
) -> Photos:
    everything = open_photos(data)
    if not isinstance(everything, Files):
        raise ValueError(f"data: {data} holds no files; give a folder or a list of photos")
    known = read_labels([everything.name(i) for i in range(len(everything))], labels)
    chosen = everything.part(known.used)
    features = cache_features(backbone, chosen, output / "features", progress=progress)
    own: Labels = read_labels(features.names, labels)
    groups = [own.names[i] for i in own.index.tolist()]
    folds = stratified_folds(groups, config.folds, config.seed)
    return Photos(backbone, features, own.index, own.names, folds)


def _record(photos: Photos, config: RandomFeatureConfig) -> dict[str, Any]:
    """The settings that all results depend on; queries may be added later."""
    untold = ("queries", "scaling", "examples", "tests", "width", "tokens", "seeds")
    settings = {k: v for k, v in asdict(config).items() if k not in untold}
    return {
        "features": photos.features.digest,
        "labels": photos.labels.tolist(),
        "config": settings,
    }


# ---------------------------------------------------------------------- photos


def _baselines(photos: Photos) -> dict[str, list[float]]:
    """Whether each photo is classified correctly from one vector, (n,) for each row."""
    taps = photos.features.taps(range(len(photos.labels)))
    vectors = {"mean patch": taps.maps[-1].flatten(2).mean(2)}
    if taps.prefix is not None and has_class_token(photos.backbone):
        vectors["class token"] = taps.prefix[:, 0]
    classes = len(photos.names)
    found: dict[str, list[float]] = {}
    for name, x in vectors.items():
        right = {f"{name}, ridge": [0.0] * len(x), f"{name}, logistic": [0.0] * len(x)}
        for fold in photos.folds:
            split = photos.split()
            seen, fold = split.fit(photos.rest(fold)), split.score(fold)
            kernel = x.double() @ x.double().mT
            fit = DualRidge(kernel[seen][:, seen]).fit(F.one_hot(photos.labels[seen], classes))
            answers = [kernel[fold][:, seen] @ fit.alpha + fit.intercept]
            answers.append(fit_probe(x[seen], photos.labels[seen], classes)(x[fold]))
            for row, logits in zip(right.values(), answers, strict=True):
                for i, k in zip(fold, logits.argmax(1).tolist(), strict=True):
                    row[i] = float(k == photos.labels[i])
        found.update(right)
    return found


def _measured(
    photos: Photos, query: str, output: Path, config: RandomFeatureConfig
) -> list[dict[str, Any]]:
    """A record for each seed and fold, see :func:`measure`."""
    found = []
    for seed, fold in itertools.product(range(config.seeds), range(config.folds)):
        file = output / query / f"seed-{seed}-fold-{fold}.json"
        record = kept_values(
            file, partial(measure, photos, query, seed, photos.folds[fold], config)
        )
        found.append({"seed": seed, "fold": photos.folds[fold], **record})
    return found


def measure(
    photos: Photos, query: str, seed: int, fold: Sequence[int], config: RandomFeatureConfig
) -> dict[str, Any]:
    """Solve on the other photos, and test on those of ``fold``.

    Returns:
        CPU ``seconds`` of the solve; for each photo, whether it is classified ``right``, and
        whether it still is (``kept``) once every patch is the mean patch; the ``maps`` of its
        class; and the gap between maps and logits of the first photos, in ``float32`` and
        ``float64``.
    """
    options = {"heads": config.heads, "query": query, "components": config.components}
    options["biased"] = config.biased and query != "constant"
    head = seeded_head(
        "random_feature", photos.backbone, seed, class_names=photos.names, **options
    ).eval()
    assert isinstance(head, RandomFeature)
    split = photos.split()
    tested = photos.part(head, split.score(fold))
    started = time.process_time()
    with warnings.catch_warnings():  # the report has a column on the class token
        warnings.simplefilter("ignore")
        head.solve(photos.part(head, split.fit(photos.rest(fold))), tested)
    seconds = time.process_time() - started
    right, kept, maps = [], [], []
    with torch.no_grad():
        for tokens, labels in zip(tested.batches(), tested.labels.split(AT_ONCE), strict=True):
            logits, alone = head.logits(tokens), head.mean_patch_logits(tokens)
            right += (logits.argmax(1) == labels).double().tolist()
            kept += (alone.argmax(1) == labels).double().tolist()
            maps += head.class_maps(tokens, labels).maps[:, 0].flatten(1).tolist()
        few = next(iter(photos.part(head, fold[:FEW]).batches()))
        gaps = [_gap(head, few)]
        wide = Tokens(tuple(p.double() for p in few.patches), few.prefix.double(), few.grid)
        gaps.append(_gap(head.double(), wide))
    return {
        "seconds": seconds, "right": right, "kept": kept, "maps": maps,
        "float32": gaps[0], "float64": gaps[1], "split": split.record(),
    }  # fmt: skip


def _gap(head: RandomFeature, tokens: Tokens) -> float:
    """The largest gap between the logits and maps plus rest, relative to the largest logit."""
    logits = head.logits(tokens)
    together = head.class_maps(tokens).maps.sum((2, 3)) + head.mean_patch_logits(tokens)
    return float((together - logits).abs().max() / logits.abs().max())


def _by_photo(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The mean over seeds for each photo."""
    values: dict[int, list[float]] = {}
    for record in records:
        for photo, value in zip(record["fold"], record[key], strict=True):
            values.setdefault(photo, []).append(value)
    return [float(np.mean(values[photo])) for photo in sorted(values)]


def agreement(records: Sequence[Mapping[str, Any]]) -> float:
    """Mean rank correlation between two seeds' maps of a photo's class; NaN for a single seed."""
    by_seed: dict[int, dict[int, list[float]]] = {}
    for record in records:
        maps = by_seed.setdefault(record["seed"], {})
        maps.update(zip(record["fold"], record["maps"], strict=True))
    order = [torch.tensor([maps[i] for i in sorted(maps)]) for maps in by_seed.values()]
    pairs = list(itertools.combinations(order, 2))
    return float(np.mean([float(spearman(a, b).mean()) for a, b in pairs])) if pairs else np.nan


def _accuracies(
    rows: Mapping[str, Sequence[float]], measured: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[str]:
    yield ""
    yield "| classifier | accuracy | with the mean patch alone | CPU seconds a fold |"
    yield "| :-- | --: | --: | --: |"
    for name, values in rows.items():
        yield f"| {name} | {mean_interval(values).text(3)} | | |"
    for query, records in measured.items():
        seconds = np.mean([record["seconds"] for record in records])
        cells = [mean_interval(_by_photo(records, key)).text(3) for key in ("right", "kept")]
        yield f"| random_feature, query {query} | {' | '.join(cells)} | {seconds:.1f} |"


def _exactness(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    yield ""
    yield "| query | maps of two seeds, rank correlation | gap to the logit, float32 | float64 |"
    yield "| :-- | --: | --: | --: |"
    for query, records in measured.items():
        gaps = [max(record[kind] for record in records) for kind in ("float32", "float64")]
        yield f"| {query} | {agreement(records):.3f} | {gaps[0]:.1e} | {gaps[1]:.1e} |"


# ---------------------------------------------------------------------- known functions


def _scaling(output: Path, config: RandomFeatureConfig, seed: int) -> list[dict[str, Any]]:
    file = output / "scaling" / f"seed-{seed}.json"
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    wanted = {k: settings[k] for k in ("heads", "examples", "tests", "width", "tokens")}
    if file.is_file():
        found = strict_json.read(file, "output", AGAIN)
        if found["config"] == wanted:
            return found["records"]  # type: ignore[no-any-return]
    records = list(scaling(config, seed))
    write_json(file, {"config": wanted, "records": records})
    return records


def _means(found: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], float]:
    values: dict[tuple[str, str, int], list[float]] = {}
    for record in found:
        key = record["function"], record["model"], record["n"]
        values.setdefault(key, []).append(record["mse"])
    return {key: float(np.mean(some)) for key, some in values.items()}


def _scaling_table(
    found: Sequence[Mapping[str, Any]], config: RandomFeatureConfig
) -> Iterator[str]:
    means = _means(found)
    first, last = config.examples[0], config.examples[-1]
    yield ""
    yield (
        f"| function of {config.tokens} tokens of width {config.width}: error, 1 for the mean "
        f"| {' | '.join(f'{m}, n = {first}, {last}' for m in MODELS)} |"
    )
    yield "| :-- |" + " --: |" * len(MODELS)
    for name in sorted({function for function, _, _ in means}):
        pairs = [[means[name, model, n] for n in (first, last)] for model in MODELS]
        yield f"| {name} | {' | '.join(f'{a:.3f}, {b:.3f}' for a, b in pairs)} |"
