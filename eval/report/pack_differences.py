"""Compares two packs of the same photos, such as packs made with two networks, or before and after
training.

    compare_packs(before, after) -> PackDifference

The comparison lists the predictions that became right or wrong and the maps that changed most, and gives
the changes of accuracy and of each metric, with paired 95 % intervals. The change of a map is 1 - rho in
[0, 2], where rho is Spearman's rank correlation, on 28 x 28 cells, with the other pack's map of the same
photo, class and method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xattn.correlation import disagreement
from xattn.eval.bootstrap import Interval, mean_intervals
from xattn.eval.evaluation.results import MIN_IMAGES
from xattn.packs.explanation import Explanation
from xattn.packs.reader import Pack
from xattn.runtime.tables import markdown

SHOWN = 10  # number of photos in each list of the text report


class Change(NamedTuple):
    """The mean before and after, and the mean difference, over the photos that have both values."""

    before: Interval
    after: Interval
    difference: Interval


class Photo(NamedTuple):
    """A photo in both packs.

    ``image_id`` is its id in the first pack and ``other_id`` its id in the second. Pairs are in the order
    of the packs. ``right`` is None for a pack in which the true class or the prediction is unknown.
    """

    image_id: str
    other_id: str
    title: str
    label_name: str | None
    predicted: tuple[str | None, str | None]
    confidence: tuple[float, float]
    right: tuple[bool | None, bool | None]


class MapShift(NamedTuple):
    """A pair of maps of the same photo and class, one from each pack.

    ``methods`` are the methods that made them, and ``moved`` in [0, 2] is how much they differ.
    """

    image_id: str
    title: str
    target_name: str
    methods: tuple[str, str]
    moved: float
    entry_ids: tuple[str, str]


@dataclass(frozen=True)
class PackDifference:
    """The differences between two packs.

    Attributes:
        names: the names of the packs.
        common: the photos that were compared.
        shared: the number of photos that are in both packs.
        alone: for each pack, the number of photos that are only in this pack.
        renamed: the number of photos with the same stored picture but different ids in the packs.
        accuracy: the change of accuracy; None if no compared photo has a true class and a prediction in
            both packs.
        metrics: the change for each method and metric, over the pairs of maps that both have a value.
        moved: the pairs of maps, the most different first; pairs with a constant map are left out.
        left_out: metrics that are not compared because the packs used different protocols.
    """

    names: tuple[str, str]
    common: list[Photo]
    shared: int
    alone: tuple[int, int]
    renamed: int
    accuracy: Change | None
    metrics: dict[tuple[str, str], Change]
    moved: list[MapShift]
    left_out: list[str]

    @property
    def now_right(self) -> list[Photo]:
        """Photos whose prediction became right, most confident first."""
        return self._turned(True)

    @property
    def now_wrong(self) -> list[Photo]:
        """Photos whose prediction became wrong, most confident first."""
        return self._turned(False)

    @property
    def changed(self) -> list[Photo]:
        """Photos whose predicted class changed, even if both predictions are wrong."""
        return [p for p in self.common if p.predicted[0] != p.predicted[1]]

    def _turned(self, right: bool) -> list[Photo]:
        found = [p for p in self.common if p.right == (not right, right)]
        return sorted(found, key=lambda p: -p.confidence[1])

    def to_json(self) -> dict[str, Any]:
        """The differences as plain values for JSON; NaN becomes None."""
        metrics = [
            {"method": method, "metric": key, **_plain(change)}
            for (method, key), change in self.metrics.items()
        ]
        return {
            "packs": list(self.names),
            "shared": self.shared,
            "alone": list(self.alone),
            "renamed": self.renamed,
            "accuracy": _plain(self.accuracy),
            "metrics": metrics,
            "left_out": self.left_out,
            "photos": _plain(self.common),
            "now_right": [photo.image_id for photo in self.now_right],
            "now_wrong": [photo.image_id for photo in self.now_wrong],
            "moved": _plain(self.moved),
        }


def compare_packs(
    before: Pack,
    after: Pack,
    methods: tuple[str, str] | None = None,
    most: int | None = None,
) -> PackDifference:
    """Compare two packs on the photos that both contain.

    Photos are matched by :meth:`~xattn.packs.reader.Pack.same_photos`. Two maps are compared if they have
    the same photo, class and method. If each pack has maps by only one method, these are compared even if
    the methods differ.

    Args:
        methods: two methods; the maps of the first in ``before`` are compared with the maps of the second
            in ``after``, and ``before`` and ``after`` may be the same pack.
        most: the largest number of photos to compare; if the packs share more, this many photos are chosen
            at even intervals in ``before``.

    Raises:
        ValueError: the packs share no photo, or a pack has no map by its method.
    """
    maps = [_maps_by_photo(pack) for pack in (before, after)]
    same = before.same_photos(after)
    shared = [image_id for image_id in maps[0] if image_id in same]
    if not shared:
        raise ValueError(
            f"packs: {before.name} and {after.name} have no photo in common; explain the same photos"
        )
    renamed = _renamed(before, after) if methods is None else _chosen(before, after, methods)
    chosen = shared if most is None or len(shared) <= most else evenly_spread(shared, most)
    photos, moved = [], []
    measured: dict[str, list[Any]] = {}
    keys, left_out = _metric_keys(before, after)
    for image_id in chosen:
        ones, others = maps[0][image_id], maps[1][same[image_id]]
        photos.append(_photo(before.explanation(ones[0]), after.explanation(others[0])))
        for pair in _pairs(before, after, ones, others, renamed, methods):
            move = disagreement([e.map for e in pair])
            if math.isfinite(move):
                names = pair[0].method, pair[1].method
                about = image_id, photos[-1].title, pair[0].target_name, names
                moved.append(MapShift(*about, move, (pair[0].id, pair[1].id)))
            values = [tuple(e.metrics.get(key, math.nan) for e in pair) for key in keys]
            measured.setdefault(pair[1].method, []).append(values)
    return PackDifference(
        names=(before.name, after.name),
        common=photos,
        shared=len(shared),
        alone=(len(maps[0]) - len(shared), len(maps[1]) - len(shared)),
        renamed=sum(image_id != same[image_id] for image_id in shared),
        accuracy=_accuracy(photos),
        metrics=_metrics(measured, keys),
        moved=sorted(moved, key=lambda m: (-m.moved, m.image_id)),
        left_out=left_out,
    )


def evenly_spread(items: Sequence[str], count: int) -> list[str]:
    """``count`` items, chosen at even intervals."""
    return [items[i * len(items) // count] for i in range(count)]


def _pairs(
    before: Pack,
    after: Pack,
    ones: Sequence[str],
    others: Sequence[str],
    renamed: Mapping[str, str],
    methods: tuple[str, str] | None,
) -> Iterator[tuple[Explanation, Explanation]]:
    """Yield the pairs of maps to compare for one photo, whose maps have the ids ``ones`` and ``others``."""
    theirs = {after.key(entry_id)[1:]: entry_id for entry_id in others}
    for entry_id in ones:
        _, target, method = before.key(entry_id)
        if methods is not None and method != methods[0]:
            continue
        other_id = theirs.get((target, renamed.get(method, method)))
        if other_id is not None:
            yield before.explanation(entry_id), after.explanation(other_id)


def _chosen(before: Pack, after: Pack, methods: tuple[str, str]) -> dict[str, str]:
    """The two methods as {method in ``before``: method in ``after``}.

    Raises:
        ValueError: a pack has no map by its method.
    """
    for pack, method in zip((before, after), methods, strict=True):
        known = dict.fromkeys(pack.key(entry_id)[2] for entry_id in pack.entry_ids)
        if method not in known:
            names = ", ".join(known)
            raise ValueError(
                f"methods: got {method}, but {pack.name} only has maps by {names}; give one of these"
            )
    return {methods[0]: methods[1]}


def _maps_by_photo(pack: Pack) -> dict[str, list[str]]:
    """The ids of the maps of each photo."""
    found: dict[str, list[str]] = {}
    for entry_id in pack.entry_ids:
        found.setdefault(pack.key(entry_id)[0], []).append(entry_id)
    return found


def _renamed(before: Pack, after: Pack) -> dict[str, str]:
    """If each pack has one method, {method in ``before``: method in ``after``}, otherwise {}."""
    ones, others = ({pack.key(i)[2] for i in pack.entry_ids} for pack in (before, after))
    if len(ones) == len(others) == 1:
        return dict(zip(ones, others, strict=True))
    return {}


def _photo(one: Explanation, other: Explanation) -> Photo:
    tops = [e.facts.top[0] if e.facts.top else (None, None, math.nan) for e in (one, other)]
    labels = [e.facts.label for e in (one, other)]
    right = [
        None if label is None or top[0] is None else label == top[0]
        for label, top in zip(labels, tops, strict=True)
    ]
    return Photo(
        image_id=one.image_id,
        other_id=other.image_id,
        title=one.file_name or one.image_id,
        label_name=one.facts.label_name or other.facts.label_name,
        predicted=(tops[0][1], tops[1][1]),
        confidence=(tops[0][2], tops[1][2]),
        right=(right[0], right[1]),
    )


def _metric_keys(before: Pack, after: Pack) -> tuple[list[str], list[str]]:
    """The metrics that both packs contain: those with equal protocols, and those with different ones."""
    ids = [{m.key: m.protocol_id for m in pack.metrics} for pack in (before, after)]
    both = [key for key in ids[0] if key in ids[1]]
    same = [key for key in both if ids[0][key] == ids[1][key]]
    return same, [key for key in both if key not in same]


def _accuracy(photos: Sequence[Photo]) -> Change | None:
    known = [[p.right] for p in photos if None not in p.right]
    return _changes(known)[0] if known else None


def _metrics(
    measured: Mapping[str, Sequence[Any]], keys: Sequence[str]
) -> dict[tuple[str, str], Change]:
    """The change for each method and metric.

    ``measured`` maps a method to a list with, for each pair of maps, the values before and after of all
    metrics.
    """
    found = {}
    for method, rows in measured.items():
        for key, change in zip(keys, _changes(rows), strict=True):
            if change.difference.n:
                found[method, key] = change
    return found


def _changes(rows: Sequence[Any]) -> list[Change]:
    """Values before and after (n, K, 2) -> a list of K changes; pairs with a NaN are left out."""
    values = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1, 2)
    values = np.where(np.isfinite(values).all(2, keepdims=True), values, np.nan)
    three = np.stack([values[..., 0], values[..., 1], values[..., 1] - values[..., 0]], 2)
    found = mean_intervals(three.reshape(len(rows), -1)) if three.size else []
    return [Change(*found[i : i + 3]) for i in range(0, len(found), 3)]


def _plain(value: Any) -> Any:
    """A value as plain values for JSON: named tuples become dictionaries, and NaN becomes None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------- text


def difference_lines(found: PackDifference) -> Iterator[str]:
    """Yield the lines of a Markdown report of the differences."""
    before, after = found.names
    yield f"# {before} and {after}"
    alone = ", ".join(
        f"{count} in {name} alone" for name, count in zip(found.names, found.alone, strict=True)
    )
    count = len(found.common)
    photos = "1 photo" if count == 1 else f"{count} photos"
    sample = "" if count == found.shared else f" of {found.shared}, evenly spread,"
    yield f"\n{photos}{sample} in common ({alone}), {len(found.changed)} with a different prediction."
    if found.renamed:
        yield f"\n{renamed_note(found.renamed)}"
    rows = [] if found.accuracy is None else [("", "accuracy", found.accuracy)]
    rows += [(method, key, change) for (method, key), change in found.metrics.items()]
    cells = []
    for method, key, change in rows:
        mean, lo, hi, n = change.difference
        means = f"{change.before.mean:.3f}", f"{change.after.mean:.3f}"
        cells.append((method, key, *means, f"{mean:+.3f} [{lo:+.3f}, {hi:+.3f}]", n))
    if rows:
        titles = ("method", "measure", "before", "after", "difference", "photos")
        yield from ("", *markdown(titles, cells, 2))
    if rows and count < MIN_IMAGES:
        yield f"\n{photos}: too few images for a verdict."
    if found.left_out:
        yield f"\nLeft out because the protocols differ: {', '.join(found.left_out)}."
    if found.accuracy is None:
        yield "\nNo true classes are known; to compare mistakes as well, explain with --labels."
    yield from _photos("Now right", found.now_right)
    yield from _photos("Now wrong", found.now_wrong)
    if found.moved:
        mean = sum(m.moved for m in found.moved) / len(found.moved)
        yield f"\n## Maps that changed most ({len(found.moved)} compared, {mean:.3f} on average)"
        moves = [
            (m.title, m.target_name, " and ".join(dict.fromkeys(m.methods)), f"{m.moved:.3f}")
            for m in found.moved[:SHOWN]
        ]
        yield from ("", *markdown(["photo", "class", "by", "moved"], moves, 3))


def renamed_note(count: int) -> str:
    """A sentence about photos that were matched by their pictures and not by their ids."""
    photos = "1 photo has" if count == 1 else f"{count:,} photos have"
    return (
        f"{photos} a different id in the second pack; they were matched by their stored pictures."
    )


def _photos(heading: str, photos: Sequence[Photo]) -> Iterator[str]:
    if not photos:
        return
    yield f"\n## {heading} ({len(photos)})"
    rows = []
    for photo in photos[:SHOWN]:
        both = zip(photo.predicted, photo.confidence, strict=True)
        rows.append(
            (photo.title, photo.label_name, *(f"{name} {100 * p:.1f} %" for name, p in both))
        )
    yield from ("", *markdown(["photo", "true class", "before", "after"], rows, 4))
