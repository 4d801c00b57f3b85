"""A run of the live page: its request, its progress and its results."""

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


BATCH = 8  # photos or frames per pass
MAX_FRAMES = 1000  # most frames of a clip
SIDE = 360  # pixels of a result's longer side on the page


class Stopped(Exception):
    """Raised when somebody pressed Stop."""


@dataclass(frozen=True)
class Request:
    """What to explain and how. With a ``clip`` there are no ``photos``, and only one explainer is
    allowed."""

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
        """The request without the bytes of its uploads."""
        clip = None if self.clip is None else self.clip.without_bytes()
        return replace(
            self, photos=tuple(photo.without_bytes() for photo in self.photos), clip=clip
        )


@dataclass(eq=False)
class LiveRun:
    """One request being processed. Threads write it and pages read it; ``finished`` is set at the very
    end.

    ``done`` of ``total`` photos or frames (0: unknown) have been explained; ``share`` is the progress in
    [0, 1]; ``problems`` lists photos or methods that were left out, and ``notes`` other remarks.
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
        """Wait at most this many seconds; returns whether the run has finished."""
        return self.finished.wait(seconds)


class PassCounter:
    """Counts a model's forward passes, and ends the work if the run was asked to stop."""

    def __init__(self, run: LiveRun, total: int) -> None:
        self.run, self.total, self.passes = run, max(total, 1), 0

    @contextmanager
    def watched(self, loaded: Backbone) -> Iterator[None]:
        """Wait for the model's turn, and check the run before every pass.

        Each pass of a timm model goes through ``head_point``. For other models the run is only checked
        between two batches.
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
    """Note once that memory ran out and passes have fewer images."""
    if method.max_forward_batch < BATCH:
        note = f"Memory ran out: {method.name} continued with {method.max_forward_batch} images per pass."
        if note not in run.notes:
            run.notes.append(note)


FIRST = 3  # maps drawn in advance, before a browser requests them


def save_results(run: LiveRun, folder: Path) -> None:
    """Write the results so that pages can show them."""
    if not run.unsaved:
        return
    run.step = "saving"
    try:
        run.folder = save_pack(folder, run.unsaved, overlays=False, skipped=run.problems)
    except OSError as error:
        raise OSError(
            error.errno or 0,
            f"The results cannot be written ({os.strerror(error.errno or 0)}); free some space on the "
            f"disk that holds {tempfile.gettempdir()} and write them again. They are still in memory.",
        ) from None
    pack_id = run.library.add_scratch(folder)
    run.unsaved = []
    pack = run.library.open(pack_id)
    for entry_id in pack.entries.index[:FIRST]:
        overlay_bytes(pack, entry_id, Look(side=SIDE))
        photo_bytes(pack, pack.entries.at[entry_id, "image_id"], SIDE)
    run.pack_id = pack_id


def save_as(run: LiveRun, name: str) -> Path:
    """Write the results of ``run`` as the pack ``name`` below the root.

    Raises:
        ValueError: the name is missing or taken, or the results no longer exist.
        OSError: the disk is full or not writable; the results stay where they are.
    """
    if run.folder is None:
        raise ValueError("There are no results to keep.")
    target = run.library.new_folder(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir()  # claims the name, since two pages may ask at once
    except FileExistsError:
        run.library.new_folder(name)  # raises if another page has taken it meanwhile
        raise
    except OSError as error:
        raise OSError(
            f"{target.name} cannot be written ({error.strerror}); free some space or permit writing, "
            f"and try again. The results are still here."
        ) from None
    film: Path | None = None
    try:
        skipped = [(s["file_name"], s["reason"]) for s in read_manifest(run.folder)["skipped"]]
        if (run.folder / "overlay.mp4").exists():
            film = Path(shutil.copy(run.folder / "overlay.mp4", run.folder.parent / "film.mp4"))
        return save_pack(target, load_pack(run.folder), True, skipped, film)
    except (ValueError, OSError) as error:
        with suppress(OSError):
            target.rmdir()  # still empty
        raise named_error(error, target, target.name) from None
    finally:
        if film is not None:
            film.unlink(missing_ok=True)


def named_error(error: ValueError | OSError, path: Path, name: str) -> ValueError | OSError:
    """The error, with the file's familiar name instead of an internal path."""
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(reason(error).replace(str(path), name))
