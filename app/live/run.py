"""Defines a run of the live page with its request, its progress and its results."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xattn.app import models
from xattn.app.live.uploads import Problem, Upload
from xattn.app.pictures.rendering import Look, overlay_bytes, photo_bytes
from xattn.packs.explanation import Explanation
from xattn.packs.format import read_manifest
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.runtime.names import reason

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.backbone import Backbone
    from xattn.explainers import Explainer


BATCH = 8  # photos or frames per forward pass
MAX_FRAMES = 1000  # largest number of frames to explain in a clip
SIDE = 360  # longer side of a result on the page, in pixels


class Stopped(Exception):
    """Raised in a run that was stopped by the user."""


@dataclass(frozen=True)
class Request:
    """What to explain, and how.

    If there is a ``clip``, there are no ``photos``, and only one explainer is allowed.
    """

    backbone: str
    explainers: tuple[str, ...]
    photos: tuple[Upload, ...] = ()
    clip: Upload | None = None
    weights: str = "auto"
    head: str | None = None
    classes: tuple[int, ...] = ()
    top: int = 1
    view: str = "crop"
    every: int = 1
    smoothing: float = 0.0

    def without_bytes(self) -> Request:
        """A copy of the request without the bytes of its uploads."""
        clip = None if self.clip is None else self.clip.without_bytes()
        return replace(
            self, photos=tuple(photo.without_bytes() for photo in self.photos), clip=clip
        )


@dataclass(eq=False)
class LiveRun:
    """The state of one request, which a background thread writes and pages read.

    Attributes:
        done, total: how many photos or frames have been explained, and how many there are in all; a total
            of 0 means that their number is unknown.
        share: the progress, in [0, 1].
        problems: photos or methods that were left out, with the reasons.
        notes: other remarks for the user.
        message: the reason why the run failed or was stopped.
        unsaved: results that have not been written yet.
        given: the request without the bytes of its uploads.
        finished: set when the run has ended and all other fields are final.
        stopping: set when the user wants to stop the run.
    """

    request: Request
    library: Library = field(repr=False)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    status: Literal["waiting", "running", "done", "stopped", "failed"] = "waiting"
    step: str = "waiting"
    done: int = 0
    total: int = 0
    share: float = 0.0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    message: str = ""
    seconds: float = 0.0
    pack_id: str | None = None
    folder: Path | None = None
    unsaved: list[Explanation] = field(default_factory=list, repr=False)
    given: Request = field(init=False, repr=False)
    finished: threading.Event = field(default_factory=threading.Event, repr=False)
    stopping: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        self.given = self.request.without_bytes()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the run, but at most ``seconds``; return whether the run has finished."""
        return self.finished.wait(seconds)


class PassCounter:
    """Counts the forward passes of a model to report progress, and stops the work if the run is stopped."""

    def __init__(self, run: LiveRun, total: int) -> None:
        self.run, self.total, self.passes = run, max(total, 1), 0

    @contextmanager
    def watched(self, loaded: Backbone) -> Iterator[None]:
        """Context manager that waits until the model is free, and then checks before every forward pass
        whether the run was stopped.

        A hook on ``head_point`` notices each pass of a timm model. For other models, the run is only
        checked between batches.
        """

        def look(module: Any, inputs: tuple[Any, ...]) -> None:
            self.check()
            self.passes += len(inputs[0])
            self.run.share = min(0.99, self.passes / self.total)

        self.check()
        with models.model_lock():
            hook = loaded.head_point.register_forward_pre_hook(look)
            try:
                yield
            finally:
                hook.remove()

    def check(self) -> None:
        if self.run.stopping.is_set():
            raise Stopped


def note_memory(run: LiveRun, method: Explainer) -> None:
    """Add a note if memory ran out and passes therefore contain fewer images; it is added only once."""
    if method.max_forward_batch < BATCH:
        note = f"Memory ran out: {method.name} continued with {method.max_forward_batch} images per pass."
        if note not in run.notes:
            run.notes.append(note)


FIRST = 3  # number of maps that are drawn in advance, before a browser requests them


def save_results(run: LiveRun, folder: Path) -> None:
    """Write the results of a run as a pack, so that pages can show them.

    Raises:
        OSError: the results cannot be written; they remain in memory.
    """
    if not run.unsaved:
        return
    run.step = "saving"
    try:
        run.folder = save_pack(folder, run.unsaved, overlays=False, skipped=run.problems)
    except OSError as error:
        raise OSError(
            error.errno or 0,
            f"The results cannot be written ({os.strerror(error.errno or 0)}); free some space on the "
            f"disk with {tempfile.gettempdir()}, and write them again. They are still in memory.",
        ) from None
    pack_id = run.library.add_scratch(folder)
    run.unsaved = []
    pack = run.library.open(pack_id)
    for entry_id in pack.entries.index[:FIRST]:
        overlay_bytes(pack, entry_id, Look(side=SIDE))
        photo_bytes(pack, pack.entries.at[entry_id, "image_id"], SIDE)
    run.pack_id = pack_id


def save_as(run: LiveRun, name: str) -> Path:
    """Write the results of ``run`` as a pack called ``name`` in the root.

    Raises:
        ValueError: the name is missing or taken, or there are no results.
        OSError: the disk is full or not writable; the original results are kept.
    """
    if run.folder is None:
        raise ValueError("There are no results to keep.")
    target = run.library.new_folder(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir()  # reserves the name, since another page may use it at the same moment
    except FileExistsError:
        run.library.new_folder(name)  # raises a ValueError if another page has just taken the name
        raise
    except OSError as error:
        raise OSError(
            f"{target.name} cannot be written ({error.strerror}); free some space or allow writing, "
            f"and try again. The results are still available."
        ) from None
    film: Path | None = None
    try:
        skipped = [(s["file_name"], s["reason"]) for s in read_manifest(run.folder)["skipped"]]
        if (run.folder / "overlay.mp4").exists():
            film = Path(shutil.copy(run.folder / "overlay.mp4", run.folder.parent / "film.mp4"))
        return save_pack(target, load_pack(run.folder), True, skipped, film)
    except (ValueError, OSError) as error:
        with suppress(OSError):
            target.rmdir()  # nothing has been written to it
        raise named_error(error, target, target.name) from None
    finally:
        if film is not None:
            film.unlink(missing_ok=True)


def named_error(error: ValueError | OSError, path: Path, name: str) -> ValueError | OSError:
    """An error with the same message, in which ``name`` replaces the internal path."""
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(reason(error).replace(str(path), name))
