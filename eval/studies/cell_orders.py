"""Orders of a photo's cells: a teacher finds them in 120 passes, and heads learn to find them in one.

    python -m xattn.eval.studies pointer-photos photos/ -b vit_tiny_patch16_224 --weights FILE

The teacher is :mod:`~xattn.eval.studies.order_teacher`. The pointer head learns its orders, with the
end symbol after the cells that restore the prediction. The baselines are a network of the same size
that regresses the teacher's weights, the mean order of the photos, maps that need no training, and
chance. All are tested on photos that none has seen, by p of the predicted class while cells are
kept, and while they are left out. Cells are not filled in: the network gets fewer tokens.

Heads learn either sequences of cells with their end, or weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Backbone
from xattn.correlation import ranks, spearman
from xattn.eval.bootstrap import mean_interval, paired_difference
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.dropped_tokens import DroppedTokens, area, steps_of
from xattn.eval.studies.options import Network, OutputAt, PhotosAt, Quick
from xattn.eval.studies.order_teacher import DESIGNS, TARGETS, Taught, Teacher, image_of, taught
from xattn.eval.studies.run_files import kept_record, kept_values, reported, spread
from xattn.eval.studies.small_training import minimize
from xattn.explainers import create_explainer
from xattn.explaining.naming import named_photos
from xattn.heads import save_head
from xattn.heads.pointer import Cells, Pointer
from xattn.runtime.files import atomic_file, check_folder, file_sha256


@dataclass(frozen=True)
class OrderStudyConfig:
    """Photos, the teacher of orders, and the heads that learn from it."""

    photos: int = 400  # Photos to learn from, at most.
    tested: int = 100  # Other photos for testing, with two independent teachers.
    cells: int = 7  # Cells per side; a divisor of the ViT's grid.
    passes: int = 120
    """Passes of the network per photo with some cells left out; half are complements of the others."""
    ridge: float = 10.0  # Ridge of the regression.
    target: Literal["p", "logit"] = "p"
    """The value that is regressed to get an order: p of the predicted class, or its centred logit."""
    draws: int = 3  # Heads of each kind: seeds 0, 1, ...
    epochs: int = 10  # Passes over the photos' orders.
    seed: int = 0  # Seed for drawing the photos.

    def quick(self) -> OrderStudyConfig:
        """A few photos; its figures mean nothing."""
        return replace(self, photos=4, tested=2, draws=1, epochs=1)


BATCH, LR = 32, 1e-3
KINDS = ("pointer", "likelihood", "likelihood, memory", "regression")
"""A pointer head by the expected area of insertion, if weights add up, and the end symbol by whether each
cell comes before it; by the likelihood of the teacher's sequences, without memory and with it; and the same
network by the squared error of standardised weights, which has no end."""


class Lessons(NamedTuple):
    """What there is to learn from n photos: a head's input, the teacher's ``weights`` (n, N), and ``kept``
    (n,), the fewest cells of the teacher's order that restore the prediction."""

    cells: Cells
    weights: Tensor
    kept: Tensor

    @property
    def sequences(self) -> Tensor:
        """(n, N + 1): the cells by descending weight, with the end symbol N after those that are kept."""
        return with_end(self.weights.argsort(dim=1, descending=True, stable=True), self.kept)

    @property
    def mean_ranks(self) -> Tensor:
        """(N,): the mean ranks of the weights; the mean order is the order of descending ranks."""
        return ranks(self.weights).nanmean(0)


class Learned(NamedTuple):
    """A trained ``head`` and the CPU ``seconds`` of its training."""

    head: Pointer
    seconds: float


def with_end(orders: Tensor, kept: Tensor) -> Tensor:
    """(n, N + 1): ``orders`` (n, N) with the end symbol N after the first ``kept`` (n,) cells.

    >>> with_end(torch.tensor([[2, 0, 1]]), torch.tensor([1]))
    tensor([[2, 3, 0, 1]])
    """
    place = torch.arange(orders.shape[1] + 1, device=orders.device).expand(len(orders), -1)
    before = (place - (place > kept[:, None]).long()).clamp_max(orders.shape[1] - 1)
    return torch.where(place == kept[:, None], orders.shape[1], orders.gather(1, before))


def learn(
    kind: str, backbone: Backbone, lessons: Lessons, config: OrderStudyConfig, seed: int
) -> Learned:
    """Train a head of one of the :data:`KINDS` on ``lessons``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Pointer(backbone, config.cells, memory=kind == "likelihood, memory")
    cells, sequences = lessons.cells, lessons.sequences
    aims = lessons.weights.float()
    aims = aims - aims.mean(1, keepdim=True)
    scale = aims.std(1, keepdim=True)
    before_end = sequences.argsort(1)[:, :-1] < lessons.kept[:, None]

    def likelihood(index: Tensor) -> Tensor:
        return -head.log_likelihood(cells.of(index), sequences[index]).mean()

    def error(index: Tensor) -> Tensor:
        return F.mse_loss(head.scores(cells.of(index))[:, 0, :-1], aims[index] / scale[index])

    def area(index: Tensor) -> Tensor:
        scores = head.scores(cells.of(index))[:, 0]
        lost = (aims[index] / scale.mean() * expected_places(scores[:, :-1])).sum(1).mean()
        above = scores[:, :-1].detach() - scores[:, -1:]
        ends = F.binary_cross_entropy_with_logits(above, before_end[index].to(above.dtype))
        return lost / aims.shape[1] + ends

    losses = {"pointer": area, "regression": error}
    return Learned(head, fit(head, losses.get(kind, likelihood), len(aims), config.epochs, seed))


def expected_places(scores: Tensor) -> Tensor:
    """(B, N): how many elements come before each one on average, if the order follows the Plackett-Luce
    model with ``scores`` (B, N). Element j comes before i with probability sigmoid(s_j - s_i).

    >>> expected_places(torch.tensor([[50.0, 0.0, 0.0]]))
    tensor([[0.0000, 1.5000, 1.5000]])
    """
    return (scores[:, None] - scores[:, :, None]).sigmoid().sum(2) - 0.5


def fit(
    head: Pointer, loss: Callable[[Tensor], Tensor], count: int, epochs: int, seed: int
) -> float:
    """Train ``head`` and return the CPU seconds; ``loss`` takes the numbers of some of ``count`` photos."""
    generator = torch.Generator().manual_seed(seed)
    losses = (
        loss(index)
        for _ in range(epochs)
        for index in torch.randperm(count, generator=generator).split(BATCH)
    )
    steps = epochs * -(-count // BATCH) + 1
    return minimize(head, losses, steps, LR, weight_decay=0.05, rise=0.3)


def kept_cells(sequences: Tensor) -> Tensor:
    """(n,): the number of cells before the end symbol of ``sequences`` (n, N + 1), at least 1."""
    return (sequences == sequences.shape[1] - 1).long().argmax(1).clamp_min(1)


def without_end(sequences: Tensor) -> Tensor:
    """(n, N): the cells of ``sequences`` (n, N + 1) in order, without the end symbol."""
    count = sequences.shape[1] - 1
    return sequences[sequences != count].view(len(sequences), count)


def fewest_sufficient_steps(same: Sequence[bool], steps: Sequence[int]) -> int:
    """The first of ``steps`` with at least 1 cell at which the prediction is the ``same``."""
    return max(1, next(k for k, found in zip(steps, same, strict=True) if found))


AT_ONCE = 20  # photos per pass
COMPARED = 40  # photos on which random halves are compared with balanced ones
NAMES = {
    "pointer": "pointer head",
    "likelihood": "pointer head, by likelihood",
    "likelihood, memory": "pointer head, by likelihood, with memory",
    "regression": "score regression",
}
DEFAULTS = OrderStudyConfig()


@dataclass(frozen=True)
class Photos:
    """The ``tested`` photos, then those to learn from; measurements are kept in ``output``."""

    paths: list[Path]
    tested: int
    dropped: DroppedTokens
    output: Path

    @property
    def backbone(self) -> Backbone:
        return self.dropped.backbone

    def batches(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """The first ``count`` photos in batches (B, 3, H, W)."""
        for start in range(0, count, AT_ONCE):
            some = slice(start, min(start + AT_ONCE, count))
            yield some, torch.stack([image_of(path, self.backbone) for path in self.paths[some]])

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The content of the JSON file ``name``, which ``make()`` provides if there is none yet."""
        return kept_values(self.output / name, make)


class Areas(NamedTuple):
    """For each tested photo, the areas of ``insertion`` and ``deletion``, averaged over draws; for each
    draw, the ``seconds`` of training."""

    insertion: NDArray[np.float64]
    deletion: NDArray[np.float64]
    seconds: Sequence[float] = ()


class Ends(NamedTuple):
    """For each tested photo, averaged over draws: how many cells are ``kept``, and whether they
    ``restored`` the prediction."""

    kept: NDArray[np.float64]
    restored: NDArray[np.float64]


def study(
    backbone: Network,
    data: PhotosAt,
    output: OutputAt = "runs/study-pointer-photos",
    config: OrderStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Measure and train what is not finished yet, write report.md, and yield its lines.

    Args:
        backbone: a plain timm ViT, whose predicted class is explained; it is not changed.
        data: photos, as for ``xattn explain``; they have to be files.
        output: folder for the teacher's weights, the measurements, the report and the trained heads.
    """
    config = config.quick() if quick else config
    output = Path(output)
    dropped = DroppedTokens(backbone, config.cells)
    teachers = {name: Teacher(dropped, config.passes, config.ridge, name) for name in DESIGNS}
    paths = _drawn(data, config)
    check_folder(output)
    kept_record(output / "record.json", _record(backbone, paths, config))
    photos = Photos(paths, config.tested, dropped, output)
    first = taught(teachers["balanced"], paths, output / "teacher-0", 0)
    second = taught(teachers["balanced"], paths[: config.tested], output / "teacher-1", 1)
    few = paths[: min(COMPARED, config.tested)]
    pair = [taught(teachers["random"], few, output / f"random-{seed}", seed) for seed in range(2)]
    lines = [
        f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}; {len(paths) - config.tested} "
        f"photos to learn from, {config.tested} tested; {config.cells} x {config.cells} cells, "
        f"{config.passes} passes, ridge {config.ridge:g}",
        *_teacher_table(first, second, pair, config),
    ]
    found = _measured(photos, first, config)
    lines += [*_order_table(found.areas()), *_end_table(found.ended())]
    yield from reported(output, lines, {"values": found.rows()})


def _drawn(data: str | Path, config: OrderStudyConfig) -> list[Path]:
    sources = named_photos(data)
    for name, source in sources:
        if not isinstance(source, Path):
            raise ValueError(f"data: {name} is no file; give a folder or a list of photos")
    random.Random(config.seed).shuffle(sources)
    paths = [Path(str(source)) for _, source in sources][: config.tested + config.photos]
    if len(paths) < config.tested + 4:
        raise ValueError(
            f"data: got {len(paths)} photos; give at least {config.tested + 4}, {config.tested} of them to "
            f"test, or lower tested"
        )
    return paths


def _record(
    backbone: Backbone, paths: Sequence[Path], config: OrderStudyConfig
) -> dict[str, object]:
    """The settings that all results depend on; more draws may be added later."""
    return {
        "backbone": backbone.fingerprint,
        "taps": list(backbone.taps),
        "preprocessing": repr(backbone.preprocessing),
        "config": {key: value for key, value in asdict(config).items() if key != "draws"},
        "photos": [file_sha256(path) for path in paths],
    }


# ---------------------------------------------------------------------- rows


class Orders:
    """The orders of the tested photos by row, draw by draw, and their effect on the network."""

    def __init__(self, photos: Photos, classes: Tensor) -> None:
        self.photos, self.classes = photos, classes
        self.curves: dict[str, list[dict[str, Any]]] = {}
        self.ends: dict[str, list[dict[str, Any]]] = {}

    def add(self, row: str, name: str, orders: Tensor, seconds: float | None = None) -> None:
        """Measure ``orders`` (t, N); a file called ``name`` keeps the result."""
        one = self._kept(f"curves/{name}.json", _curve, orders)
        self.curves.setdefault(row, []).append({**one, "seconds": seconds})

    def end(self, row: str, name: str, orders: Tensor, counts: Tensor) -> None:
        """Measure whether the first ``counts`` (t,) cells of ``orders`` suffice."""
        make = partial(_ended, counts=counts)
        one = self._kept(f"ends/{name}.json", make, orders, counts.tolist())
        self.ends.setdefault(row, []).append(one)

    def _kept(self, name: str, make: Any, orders: Tensor, counts: Any = None) -> dict[str, Any]:
        one = self.photos.kept(name, lambda: make(self.photos, orders, self.classes))
        if one["orders"] != orders.tolist() or counts not in (None, one.get("counts")):
            raise ValueError(f"output: {name} is of another order; delete it, to measure again")
        return one  # type: ignore[no-any-return]

    def areas(self) -> dict[str, Areas]:
        found = {}
        for row, some in self.curves.items():
            steps = steps_of(len(some[0]["orders"][0]))
            both = [
                [area(torch.tensor(one[key], device="cpu"), steps).numpy() for one in some]
                for key in ("kept", "left")
            ]
            seconds = [one["seconds"] for one in some if one["seconds"] is not None]
            found[row] = Areas(_mean(both[0]), _mean(both[1]), seconds)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The values of every tested photo; see :class:`Areas` and :class:`Ends`."""
        tables = ((self.areas(), ("insertion", "deletion")), (self.ended(), ("kept", "restored")))
        return [
            {"row": row, "photo": path.name} | {key: float(getattr(one, key)[i]) for key in keys}
            for found, keys in tables
            for row, one in found.items()
            for i, path in enumerate(self.photos.paths[: self.photos.tested])
        ]

    def ended(self) -> dict[str, Ends]:
        return {
            row: Ends(*(_mean([one[key] for one in some]) for key in ("counts", "restored")))
            for row, some in self.ends.items()
        }


def _mean(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.mean([np.asarray(value, dtype=np.float64) for value in values], axis=0)  # type: ignore[no-any-return]


def _measured(photos: Photos, first: Taught, config: OrderStudyConfig) -> Orders:
    """The orders of every row, measured on the tested photos."""
    t, n = photos.tested, config.cells**2
    weights = first.weights[config.target]
    best = weights.argsort(dim=1, descending=True, stable=True)
    enough = photos.kept("enough.json", lambda: _enough(photos, best, first.classes))
    kept = torch.tensor(enough, device="cpu")
    head = Pointer(photos.backbone, config.cells)
    cells = cells_of(photos, head, first.classes)
    split = Split("orders", photos.paths)
    seen, shown = split.fit(slice(t, None)), split.score(slice(t))
    split.write(photos.output / "split.json")
    lessons = Lessons(cells.of(seen), weights[seen], kept[seen])
    tested, orders = cells.of(shown), Orders(photos, first.classes)
    generator = torch.Generator().manual_seed(config.seed)
    orders.add("chance", "chance", torch.rand(t, n, generator=generator, device="cpu").argsort(1))
    mean = lessons.mean_ranks.argsort(descending=True, stable=True).expand(t, -1)
    orders.add("mean order", "mean-order", mean)
    plain = without_end(head.orders(tested)[:, 0])
    orders.add("class map, untrained head", "class-map", plain)
    relevance = photos.kept("relevance.json", lambda: _relevance(photos, first.classes))
    order = torch.tensor(relevance, device="cpu").argsort(dim=1, descending=True, stable=True)
    orders.add("generic relevance", "generic-relevance", order)
    for kind in KINDS:
        for seed in range(config.draws):
            name = f"{kind.replace(', ', '-')}-{seed}"
            make = partial(_learned, photos, kind, lessons, tested, config, seed)
            made = photos.kept(f"orders/{name}.json", make)
            ended = torch.tensor(made["sequences"], device="cpu")
            orders.add(NAMES[kind], name, without_end(ended), made["seconds"])
            if kind == "regression":
                continue
            orders.end(f"{NAMES[kind]}, its own end", name, without_end(ended), kept_cells(ended))
            if kind == "pointer" and seed == 0:
                usual = kept_cells(ended).double().mean().round().long().expand(t)
                of_all = {
                    "pointer head": without_end(ended),
                    "class map": plain,
                    "mean order": mean,
                }
                for row, some in of_all.items():
                    row_name = f"{row}, {int(usual[0])} cells of every photo"
                    orders.end(row_name, f"{row.replace(' ', '-')}-usual", some, usual)
    orders.add("teacher", "teacher", best[:t])
    orders.end("teacher, as few as it takes", "teacher", best[:t], kept[:t])
    return orders


def _learned(
    photos: Photos, kind: str, lessons: Lessons, tested: Cells, config: OrderStudyConfig, seed: int
) -> dict[str, Any]:
    """Train a head, and return its sequences (t, N + 1) for the tested photos; also save the first head."""
    made = learn(kind, photos.backbone, lessons, config, seed)
    if kind == "pointer" and seed == 0:
        save_head(made.head, photos.output / "head", {"seconds": made.seconds})
    return {"sequences": made.head.orders(tested)[:, 0].tolist(), "seconds": made.seconds}


def _curve(photos: Photos, orders: Tensor, classes: Tensor) -> dict[str, Any]:
    """p with the first cells of ``orders`` (t, N) kept, and with them left out."""
    found: dict[str, Any] = {"orders": orders.tolist(), "kept": [], "left": []}
    for some, images in photos.batches(len(orders)):
        tokens, _ = photos.dropped.embedded(images)
        order, own = orders[some].to(tokens.device), classes[some].to(tokens.device)
        curves = photos.dropped.curves(tokens, order, own, steps_of(orders.shape[1]))
        found["kept"] += curves.kept.tolist()
        found["left"] += curves.left.tolist()
    return found


def _ended(photos: Photos, orders: Tensor, classes: Tensor, counts: Tensor) -> dict[str, Any]:
    """Whether the first ``counts`` (t,) cells of ``orders`` (t, N) restore the prediction."""
    restored: list[bool] = []
    for some, images in photos.batches(len(orders)):
        tokens, _ = photos.dropped.embedded(images)
        order = orders[some].to(tokens.device)
        for i, count in enumerate(counts[some].tolist()):
            logits = photos.dropped.logits(tokens[i : i + 1], order[i : i + 1, :count])
            restored.append(int(logits.argmax()) == int(classes[some][i]))
    return {"orders": orders.tolist(), "counts": counts.tolist(), "restored": restored}


@torch.no_grad()
def _enough(photos: Photos, orders: Tensor, classes: Tensor) -> list[int]:
    """For every photo, the fewest cells of its order, among those measured, that restore the prediction."""
    steps = steps_of(orders.shape[1])
    found: list[int] = []
    for some, images in photos.batches(len(orders)):
        tokens, _ = photos.dropped.embedded(images)
        own = classes[some].to(tokens.device)
        order = orders[some].to(tokens.device)
        same = torch.zeros(len(own), len(steps), dtype=torch.bool, device=tokens.device)
        left = torch.arange(len(own), device=tokens.device)
        for i, k in enumerate(steps):
            right = photos.dropped.logits(tokens[left], order[left, :k]).argmax(1) == own[left]
            same[left[right], i] = True
            left = left[~right]
            if not len(left):
                break
        same[:, -1] = True  # every cell, up to rounding
        found += [fewest_sufficient_steps(row, steps) for row in same.tolist()]
    return found


def _relevance(photos: Photos, classes: Tensor) -> list[list[float]]:
    """(t, N): the generic relevance of the tested photos, averaged over each cell."""
    explainer = create_explainer("generic_relevance", photos.backbone)
    found: list[list[float]] = []
    for some, images in photos.batches(photos.tested):
        maps = explainer.attribute(images, classes[some].to(images.device))
        found += F.adaptive_avg_pool2d(maps, photos.dropped.cells).flatten(1).tolist()
    return found


def cells_of(photos: Photos, head: Pointer, classes: Tensor) -> Cells:
    """The input of ``head`` for every photo and its class; a file keeps it."""
    from safetensors.torch import load, save

    file = photos.output / "cells.safetensors"
    if not file.is_file():
        found: list[Cells] = []
        for some, images in photos.batches(len(photos.paths)):
            with torch.no_grad():
                found.append(head.read(photos.backbone(images), classes[some]))
        state = {
            "ranks": torch.cat([one.ranks for one in found]).cpu(),
            "tokens": torch.cat([one.tokens for one in found]).cpu(),
        }
        with atomic_file(file) as temporary:
            temporary.write_bytes(save(state))
    state = load(file.read_bytes())
    side = photos.dropped.cells
    return Cells(state["ranks"], state["tokens"], (side, side))


# ---------------------------------------------------------------------- report


def _teacher_table(
    first: Taught, second: Taught, pair: Sequence[Taught], config: OrderStudyConfig
) -> Iterator[str]:
    yield "\n| halves | y | photos | rank correlation of two teachers | aim | CPU seconds a photo |"
    yield "| :-- | :-- | --: | --: | :-- | --: |"
    count = len(second.p)
    for design, (a, b) in {"balanced": (first, second), "random": (pair[0], pair[1])}.items():
        for target in TARGETS:
            seen = min(count, len(b.p))
            found = spearman(a.weights[target][:seen], b.weights[target][:seen])
            aim = "at least .60" if target == config.target and design == "balanced" else ""
            cells = [design, target, str(seen), _interval(found.numpy()), aim, f"{a.seconds:.2f}"]
            yield f"| {' | '.join(cells)} |"


def _order_table(found: Mapping[str, Areas]) -> Iterator[str]:
    yield "\n| order | insertion | deletion | insertion less mean order's | CPU seconds of training |"
    yield "| :-- | --: | --: | --: | --: |"
    base = found["mean order"].insertion
    for row, values in found.items():
        less = "" if row == "mean order" else _difference(values.insertion, base)
        seconds = spread(list(values.seconds), 1) if values.seconds else ""
        cells = [_interval(values.insertion), _interval(values.deletion), less, seconds]
        yield f"| {row} | {' | '.join(cells)} |"
    ours = found[NAMES["pointer"]].insertion
    yield "\n| insertion of the pointer head less that of | |"
    yield "| :-- | --: |"
    others = [NAMES[kind] for kind in KINDS if kind != "pointer"]
    for row in ("class map, untrained head", "generic relevance", *others):
        yield f"| {row} | {_difference(ours, found[row].insertion)} |"


def _end_table(found: Mapping[str, Ends]) -> Iterator[str]:
    yield "\n| order and its end | cells kept | photos whose prediction they restore |"
    yield "| :-- | --: | --: |"
    for row, values in found.items():
        yield f"| {row} | {_interval(values.kept, 1)} | {_interval(values.restored)} |"


def _interval(values: NDArray[np.float64], digits: int = 3) -> str:
    return mean_interval(values).text(digits)


def _difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> str:
    found = paired_difference(a, b)
    return f"{found.mean:+.3f} [{found.lo:+.3f}, {found.hi:+.3f}]"
