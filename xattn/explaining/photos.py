"""Explain photos: the maps of their top or named classes.

One backbone pass per image gives the logits, the classes to explain and, with a trained head or CAM,
all their maps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Backbone, Preprocessing
from xattn.backbone.classes import find_classes
from xattn.backbone.pooled_features import FeatureRecord, recording
from xattn.explainers import Explainer, as_explainer, create_explainer
from xattn.explainers.base import Choose
from xattn.explaining.aim import OneEach, PredictedAndTrue, aimed
from xattn.explaining.naming import Picture, Source, each_photo, file_name_of, named_photos
from xattn.explaining.provenance import protocol_of
from xattn.heads import Head
from xattn.packs.explanation import Explanation, ImageFacts, blank_note, map_name
from xattn.packs.format import check_output, interrupted_output
from xattn.packs.writer import save_pack
from xattn.photos.arrays import ArrayImage, is_stream
from xattn.photos.base import StoredPhoto
from xattn.photos.images import MAX_PIXELS, load_image, read_ahead
from xattn.photos.labels import true_classes
from xattn.photos.view import View, prepare
from xattn.pictures import notebook
from xattn.runtime.stores import StoreError

Prepared = tuple[Tensor, View, str, Picture]
TrueClass = tuple[int | None, str | None]
TOP = 5  # how many classes of every photo a pack names


class Explanations(list[Explanation]):
    """A list of explanations; ``skipped`` holds (file name, reason) of images that were left out."""

    skipped: list[tuple[str, str]]

    def __init__(self, items: Iterable[Explanation] = ()) -> None:
        super().__init__(items)
        self.skipped = []

    def _repr_html_(self) -> str | None:
        return notebook.grid_html(self) if self else None

    def _repr_png_(self) -> bytes | None:
        return notebook.png(self) if self else None


def explain(
    images: Any,
    backbone: Backbone,
    head: Head | None = None,
    explainer: Any = None,
    classes: int | str | Sequence[int | str] | None = None,
    top: int = 1,
    view: str = "crop",
    output: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    max_pixels: int | None = MAX_PIXELS,
    overlays: bool = True,
    progress: bool = False,
    labels: str | Path | None = None,
    target: Any = None,
    features: bool = False,
) -> Explanations:
    """Explain the classes of one photo, of a folder, of a list file, or of given images.

    Args:
        images: see :func:`xattn.photos.images.list_images`; or ``"hfds/..."`` or ``"wds/..."``, see
            :mod:`xattn.photos.sources`; or a PIL image, a tensor, a NumPy array, a list of any of these,
            or a loader of batches, see :mod:`xattn.photos.arrays`.
        backbone: the classifier; ``head``: a trained head of it.
        explainer: a name of :func:`~xattn.explainers.list_explainers` or an explainer, also a trained
            head, a Captum object or a function (:mod:`xattn.explainers.own`); or several of these, in a
            list or by name, each with a pass of its own; by default the head.
        classes: explain these (names or indices) in every photo, or with ``"predicted,label"`` the
            predicted class and, of a mistake, the true one; by default the ``top`` most probable.
        view: ``"crop"``, as models are evaluated, or ``"whole"``, the entire photo, squeezed.
        output: folder to write a pack to, see :func:`~xattn.packs.writer.save_pack`.
        batch_size: images per pass.
        max_pixels: refuse larger photos before they are decoded.
        overlays: whether the pack gets overlay pictures.
        progress: show a progress bar if there is more than one photo.
        labels: the true classes of photos on disk, for the pack: ``"folders"`` or a file, see
            :func:`xattn.photos.labels.true_classes`.
        target: instead of ``classes`` one class, or a LongTensor (N,) with one a photo; or a number of
            the answer: a function of the logits, a :class:`~xattn.backbone.targets.Target`, or a text.
        features: also keep what the classifier reads of each photo, of the first explainer's passes, in
            its ``facts`` and in the pack, for the viewer's map of the photos.

    Returns:
        For each photo, method by method, its explanations by descending probability, or in the order of
        ``classes``. Photos that cannot be read, or are too long and narrow for a pack, are skipped with a
        warning and listed in ``.skipped``; a single such photo raises. After Ctrl-C or an error what was
        explained until then is a pack in ``output``, or in ``<output>-interrupted`` beside an earlier one.

    Raises:
        ValueError: unknown explainer, class or view; no readable image; a tensor or an array of another
            layout or range; a bad ``output``.
        OSError: a missing path, or an ``output`` that cannot be written.
    """
    if output is not None:
        check_output(output)
    reading = Reading(view, batch_size, max_pixels, features, progress)
    work = work_of(images, backbone, head, explainer, classes, top, seed, labels, target, reading)
    result = Explanations()
    try:
        for found in work.explained(work.sources, result.skipped):
            result.extend(found)
    except BaseException as error:
        if output is not None and result:
            _save_interrupted(output, result, overlays, error)
        raise
    if result.skipped or not result:
        report(result.skipped, len({e.image_id for e in result}))
    warn_of_blank([(e, e.file_name or e.image_id) for e in result])
    if output is not None:
        try:
            save_pack(output, result, overlays, result.skipped)
        except ValueError as error:
            if not isinstance(error.__cause__, StoreError):
                raise
            _save_interrupted(output, result, overlays, error.__cause__)
            raise error.__cause__ from None
    return result


class Reading(NamedTuple):
    """How photos are read and explained, see :func:`explain`."""

    view: str
    batch_size: int
    max_pixels: int | None
    features: bool
    progress: bool


class Work(NamedTuple):
    """What :func:`explain` has to do once its arguments were checked: ``jobs`` are those of
    :func:`set_up`, and ``truth`` has the true classes by image_id."""

    sources: Iterable[tuple[str, Source]]
    backbone: Backbone
    jobs: list[tuple[Any, Any, Any]]
    truth: Mapping[str, TrueClass]
    reading: Reading

    def explained(
        self, sources: Iterable[tuple[str, Source]], skipped: list[tuple[str, str]]
    ) -> Iterator[list[Explanation]]:
        """The explanations of photos, batch by batch and photo by photo; (file name, reason) of those that
        cannot be read go to ``skipped``."""
        for batch in _batches(sources, self.backbone, self.reading, skipped):
            by_photo: dict[str, list[Explanation]] = {item[2]: [] for item in batch}
            for i, job in enumerate(self.jobs):
                features = self.reading.features and i == 0
                for found in explain_batch(batch, self.backbone, *job, self.truth, features):
                    by_photo[found.image_id].append(found)
            yield list(chain.from_iterable(by_photo.values()))


def work_of(
    images: Any,
    backbone: Backbone,
    head: Head | None,
    explainer: Any,
    classes: int | str | Sequence[int | str] | None,
    top: int,
    seed: int,
    labels: str | Path | None,
    target: Any,
    reading: Reading,
) -> Work:
    """The checked arguments of :func:`explain`."""
    batch_size = reading.batch_size
    listed = labels is not None or isinstance(target, Tensor) or not is_stream(images)
    sources = (named_photos if listed else each_photo)(images, len(backbone.preprocessing.mean))
    given = _listed(explainer, backbone, seed, batch_size)
    backbone, given, chosen = aimed(backbone, given, classes, target)
    truth = {} if labels is None else true_classes_of(sources, labels, backbone)
    if isinstance(chosen, Tensor) or PredictedAndTrue.asked(chosen):
        chosen = _by_photo(backbone, chosen, sources, truth if labels else None)
    jobs = [set_up(backbone, head, e, chosen, top, reading.view, batch_size, seed) for e in given]
    _check_names([method.name for method, _, _ in jobs])
    return Work(sources, backbone, jobs, truth, reading)


def _by_photo(
    backbone: Backbone,
    chosen: Any,
    sources: Iterable[tuple[str, Source]],
    truth: Mapping[str, TrueClass] | None,
) -> OneEach | PredictedAndTrue:
    """Classes that are others for each photo: given one by one, or those that are true."""
    if isinstance(chosen, Tensor):
        return OneEach(backbone, chosen, [image_id for image_id, _ in sources])
    if truth is None:
        raise ValueError(
            "classes: predicted and label need the true classes; give labels, a file or 'folders'"
        )
    return PredictedAndTrue({image_id: number for image_id, (number, _) in truth.items()})


def _listed(explainer: Any, backbone: Backbone, seed: int, batch_size: int) -> Sequence[Any]:
    """What ``explainer`` of :func:`explain` asks for, one by one; rows of a table have their names."""
    if not isinstance(explainer, Mapping):
        return explainer if isinstance(explainer, list | tuple) else [explainer]
    about: dict[str, Any] = {"seed": seed, "max_forward_batch": batch_size}
    return [as_explainer(e, backbone, name=row, **about) for row, e in explainer.items()]


def _save_interrupted(
    output: str | Path, result: Explanations, overlays: bool, error: BaseException
) -> None:
    reason = f"stopped after {result[-1].image_id} by {type(error).__name__}"
    folder = interrupted_output(output)
    skipped = [*result.skipped, ("", reason)]
    try:
        try:
            save_pack(folder, result, overlays, skipped)
            saved = f"{folder} holds what was explained"
        except ValueError:  # photos are read again for their pictures
            if not isinstance(error, StoreError):
                raise
            save_pack(folder, [replace(e, source=None) for e in result], False, skipped)
            saved = f"{folder} holds what was explained, without photos"
    except (OSError, ValueError) as second:  # the first error is the one to raise
        saved = f"what was explained could not be saved ({second})"
    warnings.warn(f"explain: {reason}; {saved}", RuntimeWarning, stacklevel=3)


def set_up(
    backbone: Backbone,
    head: Head | None,
    explainer: str | Explainer | None,
    classes: int | str | Sequence[int | str] | OneEach | PredictedAndTrue | None,
    top: int,
    view: str,
    batch_size: int,
    seed: int,
) -> tuple[Explainer, Choose | OneEach | PredictedAndTrue, dict[str, Any]]:
    """Check the arguments of :func:`explain`: the explainer, its choice of classes, the protocol."""
    if isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; give at least 1")
    method = _explainer(backbone, head, explainer, seed, batch_size)
    backbone.require_classes()
    protocol = protocol_of(backbone, method, view)
    if isinstance(classes, OneEach | PredictedAndTrue):
        kind = "named" if isinstance(classes, OneEach) else "predicted, label"
        return method, classes, {**protocol, "classes": kind}
    wanted = _classes(backbone, classes, top)
    if wanted is not None:
        protocol["classes"] = "named"

    def choose(logits: Tensor) -> Tensor:
        if wanted is None:
            return logits.topk(top).indices
        return torch.tensor(wanted, device=logits.device).expand(len(logits), -1)

    return method, choose, protocol


def explain_batch(
    batch: list[Prepared],
    backbone: Backbone,
    method: Explainer,
    choose: Choose | OneEach | PredictedAndTrue,
    protocol: dict[str, Any],
    truth: Mapping[str, TrueClass] | None = None,
    features: bool = False,
) -> Iterator[Explanation]:
    """The explanations of prepared photos, photo by photo, in the order chosen for each.

    ``truth`` has the true class by image_id; with ``features`` the facts of each photo hold what the
    classifier reads of it.
    """
    pixels = torch.stack([item[0] for item in batch]).to(backbone.device)
    with recording() if features else nullcontext() as record:
        if isinstance(choose, OneEach | PredictedAndTrue):
            logits, targets, maps = choose.maps(method, pixels, [item[2] for item in batch])
        else:
            logits, targets, maps = method.attribute_classes(pixels, choose)
    read = _features(record, logits, backbone) if record else [None] * len(batch)
    every = backbone.probabilities(logits)
    probabilities = every.gather(1, targets)
    values = maps.float().cpu().numpy()
    for i, (_, seen, image_id, source) in enumerate(batch):
        label, label_name = (truth or {}).get(image_id, (None, None))
        facts = ImageFacts(top_classes(every[i], backbone), label, label_name, read[i])
        for j, target in enumerate(dict.fromkeys(targets[i].tolist())):
            yield Explanation(
                map=values[i, j],
                target=target,
                target_name=backbone.class_names[target],
                probability=float(probabilities[i, j]),
                method=method.name,
                view=seen,
                image_id=image_id,
                protocol=protocol if seen.mode != "tensor" else {**protocol, "view": "tensor"},
                file_name=file_name_of(source),
                is_mask=method.is_mask,
                source=source,
                facts=facts,
            )


def _features(
    record: FeatureRecord, logits: Tensor, backbone: Backbone
) -> Sequence[NDArray[np.float16] | None]:
    """What the classifier read of each photo of a batch, (d,); None where that is not known."""
    rows = record.rows(logits)
    note = record.note or ("gives none, and the pack has none" if rows is None else "")
    if note:
        warnings.warn(f"features: {backbone.name} {note}", stacklevel=3)
    if rows is None:
        return [None] * len(logits)
    most = torch.finfo(torch.float16).max
    return list(rows.clamp(-most, most).half().numpy())


def top_classes(probabilities: Tensor, backbone: Any) -> tuple[tuple[int, str, float], ...]:
    """(K,) probabilities -> (class, its name, probability) of the five most probable; none of numbers that
    are no probabilities.

    ``backbone``: what has the names of the classes and the task.
    """
    if backbone.task == "regression":
        return ()
    values, classes = probabilities.topk(min(TOP, len(probabilities)))
    pairs = zip(classes.tolist(), values.tolist(), strict=True)
    return tuple((i, backbone.class_names[i], float(f"{p:.6g}")) for i, p in pairs)


def true_classes_of(
    sources: Iterable[tuple[str, Source]], labels: str | Path, backbone: Backbone
) -> dict[str, TrueClass]:
    """The true classes of photos by image_id, see :func:`xattn.photos.labels.true_classes`."""
    names, ids = [], []
    for image_id, source in sources:
        if isinstance(source, Image.Image | ArrayImage):
            raise ValueError(f"labels: {image_id} has no file name; give photos by path")
        name = source.name if isinstance(source, StoredPhoto) else str(source)
        names.append(source.as_posix() if isinstance(source, Path) else name)
        ids.append(image_id)
    found = true_classes(names, labels, backbone.class_names)
    if all(number is None for number, _ in found):
        shown = next((name for _, name in found if name is not None), "none")
        warnings.warn(
            f"labels: no photo has a class of {backbone.name} (the first: {shown}), so no prediction "
            f"can be called right or wrong",
            stacklevel=3,
        )
    return dict(zip(ids, found, strict=True))


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        got = f"{', '.join(twice)} twice" if twice else "none"
        raise ValueError(f"explainer: got {got}; give each method once")


def _explainer(
    backbone: Backbone,
    head: Head | None,
    explainer: str | Explainer | None,
    seed: int,
    batch_size: int,
) -> Explainer:
    if explainer is not None and not isinstance(explainer, str):
        explainer = as_explainer(explainer, backbone, seed=seed, max_forward_batch=batch_size)
        if explainer.backbone is not backbone:
            raise ValueError(
                f"explainer: {explainer.name} was made for another backbone "
                f"({explainer.backbone.name}); create it with this one"
            )
        return explainer
    if explainer is None:
        if head is None:
            raise ValueError(
                "head: got none; give head=load_head(...), or explainer='gradcam' or another of "
                "list_explainers()"
            )
        explainer = "head"
    return create_explainer(explainer, backbone, head, seed=seed, max_forward_batch=batch_size)


def _classes(
    backbone: Backbone, classes: int | str | Sequence[int | str] | None, top: int
) -> list[int] | None:
    if classes is None:
        if isinstance(top, bool) or not 1 <= top <= backbone.num_classes:
            raise ValueError(
                f"top: got {top}; {backbone.name} has 1..{backbone.num_classes} classes"
            )
        return None
    names = [classes] if isinstance(classes, int | str) else list(classes)
    if not names:
        raise ValueError("classes: got an empty list; name at least one class, or pass None")
    return find_classes(names, backbone.class_names, backbone.name)


def _batches(
    sources: Iterable[tuple[str, Source]],
    backbone: Backbone,
    reading: Reading,
    skipped: list[tuple[str, str]],
) -> Iterator[list[Prepared]]:
    def read(pair: tuple[str, Source]) -> tuple[Tensor, View, Picture]:
        return _prepared(pair[1], backbone.preprocessing, reading.view, reading.max_pixels)

    batch: list[Prepared] = []
    ahead = read_ahead(read, sources, 2 * reading.batch_size)
    count = len(sources) if isinstance(sources, list) else None
    hidden = not reading.progress or count == 1
    for (image_id, source), photo in tqdm(ahead, "explain", count, unit="photo", disable=hidden):
        try:
            pixels, seen, picture = photo.result()
        except (ValueError, OSError) as error:
            if count == 1 or isinstance(error, StoreError):
                raise
            name = file_name_of(source) or image_id
            skipped.append((name, str(error).replace(str(source), name)))
            continue
        batch.append((pixels, seen, image_id, picture))
        if len(batch) == reading.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _prepared(
    source: Source, preprocessing: Preprocessing, view: str, max_pixels: int | None
) -> tuple[Tensor, View, Picture]:
    """The model's input, what it shows of the photo, and where the photo's pixels are."""
    photo = load_image(source, max_pixels)
    if isinstance(source, ArrayImage):
        height, width = size = source.size
        if source.is_tensor and size == tuple(preprocessing.input_size):
            return source.input(), View("tensor", size, size, (0, 0, height, width), size), photo
        source = photo
    pixels, seen = prepare(photo, preprocessing, view)
    return pixels, seen.check_size(), source


def warn_of_blank(named: Iterable[tuple[Explanation, str]]) -> None:
    """Warn once about all constant maps; each comes with the name of its photo or frame."""
    blank = [map_name(e.method, e.target_name, name) for e, name in named if e.is_blank]
    if blank:
        warnings.warn(f"explain: {blank_note(blank)}", stacklevel=3)


def report(skipped: Sequence[tuple[str, str]], explained: int) -> None:
    """Warn of the photos that were skipped beside so many that were explained.

    Raises:
        ValueError: none was explained.
    """
    count = explained + len(skipped)
    reasons = "; ".join(why if name in why else f"{name}: {why}" for name, why in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    if not count:
        raise ValueError("images: got none; the loader is empty")
    if not explained:
        raise ValueError(f"images: none of the {count} images can be read: {reasons}{more}")
    warnings.warn(
        f"explain: skipped {len(skipped)} of {count} images: {reasons}{more}", stacklevel=3
    )
