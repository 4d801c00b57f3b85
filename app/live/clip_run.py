"""Explains the clip that was uploaded for a run, frame by frame."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xattn.app import models
from xattn.app.live.run import BATCH, MAX_FRAMES, LiveRun, PassCounter, named_error, note_memory
from xattn.explaining.clips import explain_video
from xattn.explaining.passes import set_up
from xattn.packs.format import read_manifest
from xattn.photos.clip import open_clip, quiet
from xattn.photos.images import MAX_PIXELS

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.explainers import Explainer


def explain_clip(run: LiveRun, folder: Path) -> None:
    """Explain the clip of a run, and write a pack with a film to ``folder``.

    Raises:
        ValueError, OSError: the clip cannot be read or is too long, the model or the method does not work,
            or the pack cannot be written.
    """
    request = run.request
    assert request.clip is not None
    loaded, head = models.network(request.backbone, request.weights, request.head)
    path = folder.with_name("clip") / request.clip.name  # errors and frames show this file name
    try:
        path.parent.mkdir()
        path.write_bytes(request.clip.data)
        with quiet(), open_clip(path, MAX_PIXELS) as clip:
            run.total = -(-clip.announced // request.every)
        _check_length(run)
        with models.model_lock():
            method, *_ = set_up(loaded, head, request.explainers[0], None, 1, "whole", BATCH, 0)
        _watch(run, loaded, method)
        run.step = method.name
        found = explain_video(
            path,
            loaded,
            head,
            method,
            classes=list(request.classes) or None,
            top=1,
            view=request.view,
            output=folder,
            batch_size=BATCH,
            every=request.every,
            smoothing=request.smoothing,
        )
        run.done = len({e.image_id for e in found})
        run.problems += [(request.clip.name, reason) for _, reason in found.skipped]
        note_memory(run, method)
    except (ValueError, OSError) as error:
        raise named_error(error, path, request.clip.name) from None
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
        with suppress(ValueError, OSError):  # there is no pack if no frame was explained
            read_manifest(folder)
            run.folder, run.pack_id = folder, run.library.add_scratch(folder)


def _watch(run: LiveRun, loaded: Backbone, method: Explainer) -> None:
    """Change ``method`` so that it waits for the model, reports its progress to ``run``, and stops when the
    run is stopped."""
    work = PassCounter(run, run.total * (method.total_forwards or 1))
    attribute = method.attribute_classes

    def watched(inputs: Any, choose: Any) -> Any:
        with work.watched(loaded):
            found = attribute(inputs, choose)
        run.done += len(inputs)
        _check_length(run)
        return found

    method.attribute_classes = watched  # type: ignore[method-assign]


def _check_length(run: LiveRun) -> None:
    if max(run.total, run.done) > MAX_FRAMES:
        count, every = max(run.total, run.done), run.request.every
        enough = -(-count * every // MAX_FRAMES)
        raise ValueError(
            f"The clip has {count} frames to explain, but the limit is {MAX_FRAMES}; set 'every n-th "
            f"frame' to {enough} or more, or give a shorter clip."
        )
