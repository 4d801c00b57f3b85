"""Explains the photos that were uploaded for a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xattn.app import models
from xattn.app.live import uploads
from xattn.app.live.run import BATCH, LiveRun, PassCounter, note_memory, save_results
from xattn.explaining.passes import PreparedPhoto, explain_batch, set_up
from xattn.packs.format import THUMBNAIL_SIDE
from xattn.photos.image_names import unique_id
from xattn.photos.view import prepare

if TYPE_CHECKING:
    from xattn.backbone import Backbone


def explain_photos(run: LiveRun, folder: Path) -> None:
    """Explain all photos of a run with each of its methods, and write a pack to ``folder``.

    The results that were computed before an error or a stop are also written.
    """
    request = run.request
    loaded, head = models.network(request.backbone, request.weights, request.head)
    run.total = len(request.photos)
    methods = []
    for name in request.explainers:
        with models.model_lock():
            methods.append(
                set_up(
                    loaded,
                    head,
                    name,
                    list(request.classes) or None,
                    request.top,
                    request.view,
                    BATCH,
                    0,
                )
            )
    # A method with many passes can fill its batches with a single photo.
    size = BATCH if all(method.total_forwards == 1 for method, *_ in methods) else 1
    work = PassCounter(run, sum(method.total_forwards or 1 for method, *_ in methods) * run.total)
    taken: set[str] = set()
    ids = [unique_id(photo.name, taken) for photo in request.photos]
    failed: set[str] = set()
    try:
        for start in range(0, run.total, size):
            batch = _prepared(run, loaded, ids, start, size)
            for method, choose, protocol in methods if batch else ():
                if method.name in failed:
                    continue
                run.step = method.name
                try:
                    with work.watched(loaded):
                        found = list(explain_batch(batch, loaded, method, choose, protocol))
                except ValueError as error:  # other methods may still work
                    failed.add(method.name)
                    run.problems.append((method.name, str(error)))
                else:
                    run.unsaved.extend(found)
                note_memory(run, method)
            run.done = min(start + size, run.total)
    finally:
        save_results(run, folder)


def _prepared(
    run: LiveRun, loaded: Backbone, ids: list[str], start: int, size: int
) -> list[PreparedPhoto]:
    """Decode and preprocess at most ``size`` photos, beginning with number ``start``.

    Photos that cannot be decoded are recorded as problems of the run.
    """
    run.step = "reading photos"
    batch = []
    for image_id, upload in list(zip(ids, run.request.photos, strict=True))[start : start + size]:
        try:
            photo = uploads.photo(upload)
            pixels, view = prepare(photo, loaded.preprocessing, run.request.view)
            view.check_size()
        except ValueError as error:
            run.problems.append((upload.name, str(error).removeprefix("image: ")))
            continue
        photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), 1)  # for the pack; 1 means Lanczos
        batch.append(PreparedPhoto(pixels, view, image_id, photo))
    return batch
