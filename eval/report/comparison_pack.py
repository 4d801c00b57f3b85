"""The pack of a comparison: every method's maps with their metrics and curves, for ``xattn app``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.backbone import Backbone
from xattn.eval.evaluation.facts import describe
from xattn.eval.evaluation.results import Results, is_baseline
from xattn.eval.evaluation.store import KeptImage, kept_images
from xattn.eval.evaluation.stream import Skipped
from xattn.eval.metric_words import metric_about, metric_title
from xattn.eval.report.standings import CURVES, each_curve
from xattn.explainers.base import method_title
from xattn.explaining.naming import file_name_of, named_photos
from xattn.explaining.passes import TrueClass
from xattn.explaining.provenance import provenance_of
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.writer import pack_writer
from xattn.photos.images import load_image
from xattn.photos.sources import is_listed
from xattn.photos.view import View, make_view
from xattn.runtime.files import printable
from xattn.runtime.stores import StoreError, StorePath

DIGITS = 6  # significant digits of a curve's values


def can_pack(images: Any) -> bool:
    """Whether photos can be read a second time, for thumbnails; this is not possible with a loader."""
    if isinstance(images, list | tuple):
        return bool(images) and all(
            isinstance(i, str | Path | StorePath | Image.Image) for i in images
        )
    return is_listed(images) or isinstance(images, Image.Image)


def write_pack(
    folder: Path,
    results: Results,
    state: Path,
    images: Any,
    backbone: Backbone,
    methods: Mapping[str, Any],
    *,
    limit: int,
    truth: Mapping[str, TrueClass] | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> Path:
    """Write the maps stored in ``state`` as a pack.

    Args:
        images: the images that were evaluated, see :func:`can_pack`.
        methods: the explainers by row name.
        limit: the number of first images to pack.
        truth: true classes by image_id, see :func:`xattn.explaining.passes.true_classes_of`.

    Raises:
        ValueError: the state has no maps.
        OSError: the pack cannot be written; an existing pack is left intact.
    """
    maker = _ExplanationMaker(results, backbone, methods)
    sources = dict(named_photos(images))
    count = len(results.images) + len(results.skipped)
    with pack_writer(folder) as writer:
        writer.metrics, writer.shares = _columns(results), maker.shares
        for kept in kept_images(state, count, limit):
            source = sources[kept.id]
            try:
                photo = load_image(source, max_pixels=None)
                view = make_view(
                    (photo.height, photo.width), backbone.preprocessing, results.protocol.view
                ).check_size()
            except StoreError:
                raise
            except (OSError, ValueError) as error:
                say(f"pack: left out {kept.id}: {error}")
                continue
            label = (truth or {}).get(kept.id, (None, None))
            group = maker.explanations(kept, file_name_of(source), photo, view, label)
            if group:
                writer.add(group)
        writer.skipped = [_skipped(s, sources[s.id]) for s in results.skipped]
    if maker.missing:
        say(f"pack: {maker.missing} maps were not stored")
    return folder


class _ExplanationMaker:
    """Makes the explanations image by image; ``missing`` counts maps that are not in the state."""

    def __init__(self, results: Results, backbone: Backbone, methods: Mapping[str, Any]) -> None:
        self.results = results
        self.records = {name: _record(results, backbone, m) for name, m in methods.items()}
        self.curves, self.shares = _curves(results)
        self.missing = 0

    def explanations(
        self, kept: KeptImage, file_name: str, photo: Image.Image, view: View, label: TrueClass
    ) -> list[Explanation]:
        """One explanation for each method that has a valid, stored map of the image."""
        top = tuple((int(i), str(name), float(p)) for i, name, p in kept.top)
        facts = ImageFacts(top, *label)
        group = []
        for name, method in self.results.methods.items():
            if not method.valid[kept.number]:
                continue
            if name not in kept.maps:
                self.missing += 1
                continue
            group.append(
                Explanation(
                    map=kept.maps[name],
                    target=kept.target,
                    target_name=kept.target_name,
                    probability=_probability(self.results, kept),
                    method=_plain(name),
                    method_title=method_title(_plain(name)),
                    view=view,
                    image_id=kept.id,
                    protocol=self.records[name],
                    file_name=file_name,
                    is_mask=method.is_mask,
                    source=photo,
                    facts=facts,
                    metrics=dict(_values(self.results, name, kept.number)),
                    curves=self._curves_of(name, kept.number),
                    sanity=is_baseline(name),
                )
            )
        return group

    def _curves_of(self, name: str, number: int) -> dict[str, list[float]]:
        """The finite curves of one method on one image, by name."""
        rows = {key: curve[number] for key, curve in self.curves[name].items()}
        return {
            key: [float(f"{value:.{DIGITS}g}") for value in row]
            for key, row in rows.items()
            if np.isfinite(row).all()
        }


def _columns(results: Results) -> dict[str, dict[str, Any]]:
    """A description of each metric of the pack, by the key of its column."""
    return {
        column.key: {
            "higher_is_better": results.info(column.metric).higher_is_better,
            "formula": results.info(column.metric).formula,
            "title": metric_title(column.key),
            "about": metric_about(column.key),
            "protocol_id": results.metric_id(column),
        }
        for column in results.columns
    }


def _record(results: Results, backbone: Backbone, method: Any) -> dict[str, Any]:
    """The protocol of a row: how its maps were made and what its metrics mean. Options that are not
    finite become text, because JSON has no such numbers."""
    record = provenance_of(backbone, method, results.protocol.view)
    fidelity = {k: v for k, v in results.protocol.to_dict().items() if k not in ("n", "n_invalid")}
    what = describe(method)
    record["options"] = what["options"]
    if what.get("backbone") not in (None, backbone.fingerprint):  # a row with randomised weights
        record["explained_weights"] = what["backbone"]
    record["fidelity"] = {**fidelity, "id": results.protocol.id}
    return json.loads(json.dumps(record), parse_constant=str)  # type: ignore[no-any-return]


def _skipped(skipped: Skipped, source: Any) -> tuple[str, str]:
    """The file name, without folders, and the reason."""
    name = file_name_of(source) or skipped.id
    return name, skipped.reason.replace(printable(str(source)), name)


def _probability(results: Results, kept: KeptImage) -> float:
    """The probability of the explained class, even if logits were scored; for a target, its number."""
    if results.protocol.score == "value":
        return kept.score
    if results.protocol.score != "logit":
        return min(max(kept.score, 0.0), 1.0)
    return next((float(p) for i, _, p in kept.top if i == kept.target), 0.0)


def _values(results: Results, name: str, number: int) -> Iterator[tuple[str, float]]:
    for column, values in results.methods[name].values.items():
        if math.isfinite(values[number]):
            yield column.key, float(values[number])


def _curves(results: Results) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Curves (n, T) by method and name, with the clean scores; and, for curves with unequal steps, the
    shares of pixels."""
    curves: dict[str, dict[str, Any]] = {name: {} for name in results.methods}
    shares: dict[str, list[float]] = {}
    for key in CURVES:
        for name, curve, x in each_curve(results, key):
            curves[name][key] = curve
            if key not in ("deletion", "insertion"):
                shares[key] = x
    return curves, shares


def _plain(name: str) -> str:
    """A row's name as part of a file name."""
    return re.sub(r"[/\\\0]", "_", name)
