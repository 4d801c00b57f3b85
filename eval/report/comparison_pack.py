"""Writes the pack of a comparison for ``xattn app``, with every method's maps, metrics and curves."""

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
    """Whether the images can be read a second time for thumbnails, which a loader does not allow."""
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
        limit: pack at most this many images, counted from the first.
        truth: true classes by image id, see :func:`xattn.explaining.passes.true_classes_of`.
        say: called with each note, such as a photo that was left out.

    Raises:
        ValueError: the state contains no maps.
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
        say(f"pack: left out {maker.missing} maps that the state did not keep")
    return folder


class _ExplanationMaker:
    """Makes the explanations of a pack for one image at a time.

    ``missing`` counts the valid maps that are not in the state.
    """

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
        """The curves of one method on one image, by name; curves with non-finite values are left out."""
        rows = {key: curve[number] for key, curve in self.curves[name].items()}
        return {
            key: [float(f"{value:.{DIGITS}g}") for value in row]
            for key, row in rows.items()
            if np.isfinite(row).all()
        }


def _columns(results: Results) -> dict[str, dict[str, Any]]:
    """A description of each metric of the pack, by column key."""
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
    """A record of how the maps of a method were made and what its metrics mean, as plain values for JSON.

    Options that are infinite or NaN become text, because JSON does not allow such numbers.
    """
    record = provenance_of(backbone, method, results.protocol.view)
    fidelity = {k: v for k, v in results.protocol.to_dict().items() if k not in ("n", "n_invalid")}
    what = describe(method)
    record["options"] = what["options"]
    if what.get("backbone") not in (None, backbone.fingerprint):  # such as randomised weights
        record["explained_weights"] = what["backbone"]
    record["fidelity"] = {**fidelity, "id": results.protocol.id}
    return json.loads(json.dumps(record), parse_constant=str)  # type: ignore[no-any-return]


def _skipped(skipped: Skipped, source: Any) -> tuple[str, str]:
    """The file name of a skipped photo, without folders, and the reason, with the path shortened to it."""
    name = file_name_of(source) or skipped.id
    return name, skipped.reason.replace(printable(str(source)), name)


def _probability(results: Results, kept: KeptImage) -> float:
    """The probability of the explained class, even if the scores are logits.

    For a target or a regression, it is the value itself.
    """
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
    """The curves (n, T) by method and name, and the shares of pixels of the curves with unequal steps.

    The curves include the clean scores.
    """
    curves: dict[str, dict[str, Any]] = {name: {} for name in results.methods}
    shares: dict[str, list[float]] = {}
    for key in CURVES:
        for name, curve, x in each_curve(results, key):
            curves[name][key] = curve
            if key not in ("deletion", "insertion"):
                shares[key] = x
    return curves, shares


def _plain(name: str) -> str:
    """A row's name with characters replaced that a file name cannot contain."""
    return re.sub(r"[/\\\0]", "_", name)
