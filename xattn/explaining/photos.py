"""Explain photos: the maps of their top or named classes.

One backbone pass per image gives the logits, the classes to explain and, with a trained head or CAM,
all their maps.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Backbone, Preprocessing
from xattn.explainers import as_explainer
from xattn.explaining.naming import Source, each_photo, file_name_of, named_photos
from xattn.explaining.passes import (
    ClassPerPhoto,
    PredictedAndTrue,
    PreparedPhoto,
    TrueClass,
    explain_batch,
    map_of,
    retarget,
    set_up,
    true_classes_of,
    warn,
)
from xattn.heads import Head
from xattn.packs.explanation import Explanation
from xattn.packs.format import OVERLAY_SIDE, SHARD_PHOTOS
from xattn.packs.writer import PackWriter, pack_writer, thumbnail_jpeg
from xattn.photos.arrays import ArrayImage, check_bands, is_stream
from xattn.photos.images import MAX_PIXELS, load_image, read_ahead
from xattn.photos.view import prepare_source
from xattn.runtime.distributed import fail_together, gather, processes
from xattn.runtime.stores import StoreError

FIRST = 20  # number of explanations that several processes return
WAITING = 4  # photos that may wait to be written while others are explained


class Explanations(list[Explanation]):
    """A list of explanations.

    Attributes:
        skipped: (file name, reason) of images that were left out.
        photos, maps: the number of explained photos and of their maps, including any not in the list.
        judged, right: the number of photos whose true class is known, and the number of these whose
            prediction is correct.
        blank: descriptions of the maps that are constant.
    """

    skipped: list[tuple[str, str]]
    photos = maps = judged = right = 0

    def __init__(self, items: Iterable[Explanation] = ()) -> None:
        super().__init__(items)
        self.skipped, self.blank = [], list[str]()

    def add(self, photo: Sequence[Explanation], keep: int | None = None) -> None:
        """Add the explanations of a photo, until the list has ``keep`` of them; constant maps are always
        recorded."""
        self.photos, self.maps = self.photos + 1, self.maps + len(photo)
        facts = photo[0].facts if photo else None
        if facts is not None and facts.top and facts.label is not None:
            self.judged += 1
            self.right += facts.top[0][0] == facts.label
        self.extend(photo if keep is None else photo[: max(0, keep - len(self))])
        self.blank += [map_of(e, e.file_name or e.image_id) for e in photo if e.is_blank]

    def _repr_html_(self) -> str | None:
        from xattn.pictures import notebook

        return notebook.grid_html(self) if self else None

    def _repr_png_(self) -> bytes | None:
        from xattn.pictures import notebook

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
    *,
    keep: int | None = None,
    shard_photos: int = SHARD_PHOTOS,
    bands: Sequence[int] | None = None,
) -> Explanations:
    """Explain the classes of one photo, of a folder, of a list file, or of given images.

    Args:
        images: see :func:`xattn.photos.images.list_images`; or ``"hfds/..."`` or ``"wds/..."``, see
            :mod:`xattn.photos.sources`; or a PIL image, a tensor, a NumPy array, a list of any of these,
            or a loader of batches, see :mod:`xattn.photos.arrays`.
        backbone: the classifier; ``head``: a trained head of it.
        explainer: a name from :func:`~xattn.explainers.list_explainers` or an explainer, including a
            trained head, a Captum object or a function (:mod:`xattn.explainers.adapters`). Several
            can be given as a list, or as a dict by name; each has a separate pass. By default the head.
        classes: explain these (names or indices) in every photo or, with ``"predicted,label"``, the
            predicted class and, if it is wrong, the true one; by default the ``top`` most probable.
        view: ``"crop"``, as in evaluations of models, or ``"whole"``, the entire photo, squeezed.
        output: folder to write a pack to, photo by photo, see :func:`~xattn.packs.writer.pack_writer`. With
            several processes (:func:`~xattn.runtime.distributed.processes`), process r of n explains the
            blocks r, r + n, ... of ``shard_photos`` photos, and the pack is identical, byte by byte, to
            the pack of a single process.
        batch_size: images per pass; max_pixels: larger photos are rejected before they are decoded.
        overlays: draw pictures for the pack (only with a single process); progress: show a bar.
        labels: the true classes of photos on disk, for the pack: ``"folders"`` or a file, see
            :func:`xattn.photos.labels.true_classes`.
        target: instead of ``classes``: one class; a LongTensor (N,) with one class per photo; a function of
            the logits, a :class:`~xattn.backbone.targets.Target` or a text, to explain another number; or a
            list of functions and targets, which share each pass.
        features: also store, for the viewer's map of the photos, the features that the classifier receives
            in the first explainer's passes: in each photo's ``facts`` and in the pack.
        bands: the three channels that pictures of tensors and arrays show as red, green and blue.
        keep: how many explanations to return, counted from the first, so that memory does not grow with the
            number of maps; by default all, or 20 with several processes.

    Returns:
        For each photo, method by method, its explanations by descending probability, or in the order of
        ``classes``. Photos that cannot be read, or are too long and narrow for a pack, are skipped with a
        warning and listed in ``.skipped``; a single photo that cannot be explained is an error. After
        Ctrl-C or an error, the explanations made so far are saved as a pack in ``output`` or, if that
        already holds a pack, in ``<output>-interrupted``. With several processes, nothing is saved then.

    Raises:
        ValueError: an explainer, class or view is unknown, no image can be read, a tensor or an array has
            the wrong layout or range, or ``output`` is invalid.
        OSError: a path does not exist, or ``output`` cannot be written.

    Example:
        >>> import numpy as np, xattn
        >>> from xattn import explain
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> photo = np.zeros((80, 64, 3), np.uint8)  # or a path, a folder, a PIL image
        >>> explanation = explain(photo, net, explainer="gradcam", classes=3)[0]
        >>> explanation.target, explanation.method, explanation.map.shape
        (3, 'gradcam', (2, 2))
    """
    count, rank = (1, 0) if output is None else processes(backbone.device)
    with ExitStack() as stack:
        writer = None
        about: dict[str, Any] = {"gather": gather, "rank": rank, "keep": count == 1}
        if output is not None:
            drawn = overlays and count == 1
            writer = stack.enter_context(pack_writer(output, drawn, shard_photos, **about))
        stored = None if writer is None else writer.overlays
        bar = progress and rank == 0
        reading = ReadOptions(view, batch_size, max_pixels, features, bar, stored, bands)
        given = (images, backbone, head, explainer, classes, top, seed, labels, target, reading)
        work = fail_together(lambda: _work_of(*given)) if count > 1 else _work_of(*given)
        blocks = _blocks(work.sources, shard_photos, count, rank)
        result = _run(work, blocks, writer, FIRST if keep is None and count > 1 else keep)
    warn(result.blank)
    return result


def _run(
    work: ExplainJob,
    blocks: Iterable[tuple[int, Iterable[tuple[str, Source]]]],
    writer: PackWriter | None,
    keep: int | None,
) -> Explanations:
    """Explain the blocks of this process; if they write a pack, the result covers all processes."""
    result = Explanations()
    if writer is not None:
        result.skipped = writer.skipped
    for found in _written(work, blocks, writer, result.skipped):
        result.add(found, keep)
    if writer is None:
        if result.skipped or not result.photos:
            report(result.skipped, result.photos)
        return result
    result = _together(result, keep)
    if result.skipped or not result.photos:
        fail_together(lambda: report(result.skipped, result.photos, warn=writer.is_first))
    return result


def _written(
    work: ExplainJob,
    blocks: Iterable[tuple[int, Iterable[tuple[str, Source]]]],
    writer: PackWriter | None,
    skipped: list[tuple[str, str]],
) -> Iterator[list[Explanation]]:
    """The explanations of each photo; a thread writes them while the next photos are explained."""
    waiting: deque[Future[None]] = deque()
    total = len(work.sources) if isinstance(work.sources, list) else None
    bar = tqdm(
        None, "explain", total, unit="photo", disable=not work.reading.progress or total == 1
    )
    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool, bar:

        def do(call: Callable[..., None], *arguments: Any) -> None:
            waiting.append(pool.submit(call, *arguments))
            while len(waiting) > WAITING:
                waiting.popleft().result()

        for number, block in blocks:
            if writer is not None:
                do(writer.block, number)
            for item, found in work.explained(block, skipped, bar.update):
                if writer is not None:
                    do(writer.add, found, item.thumbnail, item.picture)
                yield found
        for future in waiting:
            future.result()


def _blocks(
    sources: Iterable[tuple[str, Source]], photos: int, count: int, rank: int
) -> Iterator[tuple[int, Iterator[tuple[str, Source]]]]:
    """The numbered blocks of a process; a loader is never read ahead."""
    remaining = iter(sources)
    for number, first in enumerate(remaining):
        block = chain([first], islice(remaining, photos - 1))
        if number % count == rank:
            yield number, block
        deque(block, maxlen=0)


def _together(own: Explanations, keep: int | None) -> Explanations:
    """The explanations of all processes."""
    parts = gather((list(own), own.skipped, own.photos, own.maps, own.judged, own.right))
    result = Explanations([e for part in parts for e in part[0]][:keep])
    result.skipped = [item for part in parts for item in part[1]]
    counts = (sum(part[i] for part in parts) for i in range(2, 6))
    result.photos, result.maps, result.judged, result.right = counts
    result.blank = own.blank
    return result


class ReadOptions(NamedTuple):
    """How photos are read and explained, see :func:`explain`."""

    view: str
    batch_size: int
    max_pixels: int | None
    features: bool
    progress: bool
    stored: bool | None
    """Whether to keep pictures for overlays; None if not even thumbnails are stored."""
    bands: Sequence[int] | None = None
    """The channels that pictures of arrays show as red, green and blue."""


class ExplainJob(NamedTuple):
    """The work left for :func:`explain` once its arguments have been checked: ``jobs`` come from
    :func:`set_up`, and ``truth`` maps image_id to the true class."""

    sources: Iterable[tuple[str, Source]]
    backbone: Backbone
    jobs: list[tuple[Any, Any, Any]]
    truth: Mapping[str, TrueClass]
    reading: ReadOptions

    def explained(
        self,
        sources: Iterable[tuple[str, Source]],
        skipped: list[tuple[str, str]],
        tell: Callable[[], object],
    ) -> Iterator[tuple[PreparedPhoto, list[Explanation]]]:
        """Photos with their explanations. Photos that cannot be read are added to ``skipped`` as (file
        name, reason); every photo, read or skipped, is reported."""
        alone = isinstance(self.sources, list) and len(self.sources) == 1
        for batch in _batches(sources, self.backbone, self.reading, skipped, alone, tell):
            by_photo: dict[str, list[Explanation]] = {item.image_id: [] for item in batch}
            for i, job in enumerate(self.jobs):
                features = self.reading.features and i == 0
                for found in explain_batch(batch, self.backbone, *job, self.truth, features):
                    by_photo[found.image_id].append(found)
            yield from zip(batch, by_photo.values(), strict=True)


def _work_of(
    images: Any,
    backbone: Backbone,
    head: Head | None,
    explainer: Any,
    classes: int | str | Sequence[int | str] | None,
    top: int,
    seed: int,
    labels: str | Path | None,
    target: Any,
    reading: ReadOptions,
) -> ExplainJob:
    """The checked arguments of :func:`explain`."""
    batch_size = reading.batch_size
    check_bands(reading.bands, len(backbone.preprocessing.mean))
    listed = labels is not None or isinstance(target, Tensor) or not is_stream(images)
    sources = (named_photos if listed else each_photo)(images, len(backbone.preprocessing.mean))
    given = _listed(explainer, backbone, seed, batch_size)
    backbone, given, chosen = retarget(backbone, given, classes, target)
    truth = {} if labels is None else true_classes_of(sources, labels, backbone)
    if isinstance(chosen, Tensor) or PredictedAndTrue.asked(chosen):
        chosen = _by_photo(backbone, chosen, sources, truth if labels else None)
    jobs = [set_up(backbone, head, e, chosen, top, reading.view, batch_size, seed) for e in given]
    _check_names([method.name for method, _, _ in jobs])
    return ExplainJob(sources, backbone, jobs, truth, reading)


def _by_photo(
    backbone: Backbone,
    chosen: Any,
    sources: Iterable[tuple[str, Source]],
    truth: Mapping[str, TrueClass] | None,
) -> ClassPerPhoto | PredictedAndTrue:
    """Classes that differ from photo to photo: one given for each, or the true classes."""
    if isinstance(chosen, Tensor):
        return ClassPerPhoto(backbone, chosen, [image_id for image_id, _ in sources])
    if truth is None:
        raise ValueError(
            "classes: predicted and label need the true classes; give labels, a file or 'folders'"
        )
    return PredictedAndTrue({image_id: number for image_id, (number, _) in truth.items()})


def _listed(explainer: Any, backbone: Backbone, seed: int, batch_size: int) -> Sequence[Any]:
    """The explainers given to :func:`explain`, one by one; those in a dict keep their names."""
    if not isinstance(explainer, Mapping):
        return explainer if isinstance(explainer, list | tuple) else [explainer]
    about: dict[str, Any] = {"seed": seed, "max_forward_batch": batch_size}
    return [as_explainer(e, backbone, name=row, **about) for row, e in explainer.items()]


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        got = f"{', '.join(twice)} twice" if twice else "none"
        raise ValueError(f"explainer: got {got}; give each method once")


def _batches(
    sources: Iterable[tuple[str, Source]],
    backbone: Backbone,
    reading: ReadOptions,
    skipped: list[tuple[str, str]],
    alone: bool,
    tell: Callable[[], object],
) -> Iterator[list[PreparedPhoto]]:
    batch: list[PreparedPhoto] = []
    ahead = read_ahead(
        lambda pair: _prepared(*pair, backbone.preprocessing, reading),
        sources,
        2 * reading.batch_size,
    )
    for (image_id, source), photo in ahead:
        tell()
        try:
            batch.append(photo.result())
        except (ValueError, OSError) as error:
            if alone or isinstance(error, StoreError):
                raise
            name = file_name_of(source) or image_id
            skipped.append((name, str(error).replace(str(source), name)))
            continue
        if len(batch) == reading.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _prepared(
    image_id: str, source: Source, preprocessing: Preprocessing, reading: ReadOptions
) -> PreparedPhoto:
    """A prepared photo, which is decoded only once."""
    given = source
    shown = photo = load_image(source, reading.max_pixels)
    if isinstance(source, ArrayImage):
        if reading.bands is not None:
            shown = source.load(reading.max_pixels, reading.bands)
        source = shown
    pixels, seen = prepare_source(given, photo, preprocessing, reading.view)
    found = PreparedPhoto(pixels, seen.check_size(), image_id, source)
    if reading.stored is None:
        return found
    small = shown.copy() if shown is source else shown
    small.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE), Image.Resampling.LANCZOS)
    return found._replace(
        thumbnail=thumbnail_jpeg(small), picture=small if reading.stored else None
    )


def report(skipped: Sequence[tuple[str, str]], explained: int, warn: bool = True) -> None:
    """Warn about skipped photos, given the number of those that were explained.

    Raises:
        ValueError: no photo was explained.
    """
    count = explained + len(skipped)
    reasons = "; ".join(why if name in why else f"{name}: {why}" for name, why in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    if not count:
        raise ValueError("images: got none; the loader is empty")
    if not explained:
        raise ValueError(f"images: none of the {count} images can be read: {reasons}{more}")
    if not warn:
        return
    warnings.warn(
        f"explain: skipped {len(skipped)} of {count} images: {reasons}{more}", stacklevel=3
    )
