"""Explain jobs of the live page: uploads in, a pack outside the root out, in a thread that no page owns.

A job is known by a token that nobody can guess. The page has it in its URL, so a reload finds the
job again, and nobody else does. Two jobs run at once, the others wait in their order; the oldest
finished ones are forgotten, and their packs deleted.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from xattn.app import models
from xattn.app.jobs.jobs import JOBS
from xattn.app.live import uploads
from xattn.app.live.scratch import Scratch
from xattn.app.live.uploads import Problem, Upload
from xattn.app.pictures.rendering import Look, overlay_bytes, photo_bytes
from xattn.explaining.clips import explain_video
from xattn.explaining.naming import unique_id
from xattn.explaining.photos import explain_batch, set_up
from xattn.packs.explanation import Explanation
from xattn.packs.format import THUMBNAIL_SIDE, read_manifest
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.photos.clip import open_clip, quiet
from xattn.photos.images import MAX_PIXELS
from xattn.photos.view import prepare
from xattn.runtime.display_text import reason

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.backbone import Backbone
    from xattn.explainers import Explainer

RUNNING, WAITING, KEPT = 2, 6, 24  # jobs
BATCH = 8  # photos or frames a pass
MAX_FRAMES = 1000  # of a clip
SIDE = 360  # pixels of a result's longer side on the page
FIRST = 3  # maps that are drawn before a browser asks for them, and while nobody else computes
NAME = r"[^\W_][\w .+-]{0,79}"  # of a pack that is kept
_LOG = logging.getLogger(__name__)


class Stopped(Exception):
    """Somebody pressed Stop."""


@dataclass(frozen=True)
class Request:
    """What to explain and how; ``clip`` excludes ``photos`` and takes one explainer."""

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

    def light(self) -> Request:
        """The request without the bytes of its uploads."""
        clip = None if self.clip is None else self.clip.light()
        return replace(self, photos=tuple(photo.light() for photo in self.photos), clip=clip)


@dataclass(eq=False)
class Job:
    """One request on its way. Threads write, pages read; ``finished`` is set at the very end.

    ``done`` of ``total`` photos or frames (0: not known) are explained; ``share`` is the progress in
    [0, 1]; ``problems`` are photos or methods that were left out, ``notes`` what else to know.
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
        self.given = self.request.light()

    def wait(self, seconds: float) -> bool:
        """Whether the job is finished, at the latest after so many seconds."""
        return self.finished.wait(seconds)


# ---------------------------------------------------------------------- the queue


class Jobs:
    """The jobs of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._home = Scratch()

    def start(self, request: Request, library: Library) -> Job:
        """Run ``request`` now, or after those that came before it.

        Raises:
            ValueError: too many are waiting.
        """
        job = Job(request, library)
        with self._lock:
            waiting = len(self._waiting())
            if waiting >= WAITING:
                raise ValueError(
                    f"{waiting} other jobs are waiting already; try again when one is done."
                )
            self._jobs[job.id] = job
            self._next()
        return job

    def get(self, job_id: str | None) -> Job | None:
        """The job of a token; None if there is none, or it was long ago."""
        with self._lock:
            return None if job_id is None else self._jobs.get(job_id)

    def ahead(self, job: Job) -> int:
        """How many jobs wait before this one."""
        with self._lock:
            waiting = self._waiting()
            return waiting.index(job) if job in waiting else 0

    def stop(self, job: Job) -> None:
        """End a job; what it explained until then is kept."""
        job.stopping.set()
        with self._lock:
            if job.status == "waiting":
                job.status, job.message = "stopped", "Stopped before it began."
                job.finished.set()

    def _waiting(self) -> list[Job]:
        """In their order; the lock is held."""
        return [job for job in self._jobs.values() if job.status == "waiting"]

    def _next(self) -> None:
        """Start what may start, forget what is old; the lock is held."""
        running = sum(j.status == "running" for j in self._jobs.values())
        for job in self._waiting():
            if running >= RUNNING:
                break
            running += 1
            job.status, job.step = "running", "loading the model"
            threading.Thread(target=self._run, args=(job,), name="xattn-live", daemon=True).start()
        finished = [j for j in self._jobs.values() if j.finished.is_set()]
        for job in finished[: max(0, len(finished) - KEPT)]:
            del self._jobs[job.id]
            if job.folder is not None:
                shutil.rmtree(job.folder.parent, ignore_errors=True)

    def _run(self, job: Job) -> None:
        started = time.perf_counter()
        status, message = "failed", ""
        try:
            folder = Path(tempfile.mkdtemp(dir=self._home.path)) / "pack"
            (_explain_clip if job.request.clip else _explain)(job, folder)
            status = "done"
        except Stopped:
            status = "stopped"
        except (ValueError, OSError, MemoryError) as error:
            message = reason(error)
        except Exception as error:
            _LOG.exception("a live explanation failed")
            message = f"An error in the program, {type(error).__name__}: {error}"
        if status == "stopped":
            message = f"Stopped after {_amount(job)}."
        job.seconds = time.perf_counter() - started
        with self._lock:
            job.status, job.message, job.share = status, message, 1.0  # type: ignore[assignment]
            job.request = job.given  # the bytes are not needed any more
            job.finished.set()
            self._next()


@functools.cache
def jobs() -> Jobs:
    """The one queue of the process."""
    return Jobs()


def _amount(job: Job) -> str:
    unit = "frame" if job.request.clip else "photo"
    of = f" of {job.total}" if job.total else ""
    return f"{job.done}{of} {unit}{'s' if (job.total or job.done) != 1 else ''}"


# ---------------------------------------------------------------------- photos


def _explain(job: Job, folder: Path) -> None:
    request = job.request
    loaded, head = models.network(request.backbone, request.weights, request.head)
    job.total = len(request.photos)
    methods = []
    for name in request.explainers:
        with models.turn():
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
    # Methods of many passes have all a pass can hold from one photo.
    size = BATCH if all(method.forwards == 1 for method, *_ in methods) else 1
    work = _Work(job, sum(method.forwards for method, *_ in methods) * job.total)
    taken: set[str] = set()
    ids = [unique_id(PurePosixPath(photo.name).stem, taken) for photo in request.photos]
    failed: set[str] = set()
    try:
        for start in range(0, job.total, size):
            batch = _prepared(job, loaded, ids, start, size)
            for method, choose, protocol in methods if batch else ():
                if method.name in failed:
                    continue
                job.step = method.name
                try:
                    with work.watched(loaded):
                        found = list(explain_batch(batch, loaded, method, choose, protocol))
                except ValueError as error:  # this method cannot; the others can
                    failed.add(method.name)
                    job.problems.append((method.name, str(error)))
                else:
                    job.unsaved.extend(found)
                _note_memory(job, method)
            job.done = min(start + size, job.total)
    finally:
        _save(job, folder)


def _prepared(job: Job, loaded: Backbone, ids: list[str], start: int, size: int) -> list[Any]:
    """The photos from ``start`` on that can be decoded; no others are in memory."""
    job.step = "reading photos"
    batch = []
    for image_id, upload in list(zip(ids, job.request.photos, strict=True))[start : start + size]:
        try:
            photo = uploads.photo(upload)
            pixels, view = prepare(photo, loaded.preprocessing, job.request.view)
            view.check_size()
        except ValueError as error:
            job.problems.append((upload.name, str(error).removeprefix("image: ")))
            continue
        photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), 1)  # what the pack keeps; 1 is Lanczos
        batch.append((pixels, view, image_id, photo))
    return batch


def _save(job: Job, folder: Path) -> None:
    """Write what was explained, so that the pages can show it."""
    if not job.unsaved:
        return
    job.step = "saving"
    try:
        job.folder = save_pack(folder, job.unsaved, overlays=False, skipped=job.problems)
    except OSError as error:
        raise OSError(
            error.errno or 0,
            f"The results cannot be written ({os.strerror(error.errno or 0)}); free some space on the "
            f"disk of {tempfile.gettempdir()} and write them again. They are still in memory.",
        ) from None
    pack_id = job.library.add_scratch(folder)
    job.unsaved = []
    pack = job.library.open(pack_id)
    for entry_id in pack.entries.index[:FIRST]:
        overlay_bytes(pack, entry_id, Look(side=SIDE))
        photo_bytes(pack, pack.entries.at[entry_id, "image_id"], SIDE)
    job.pack_id = pack_id


def save_again(job: Job) -> None:
    """Write the results of a job whose disk was full.

    Raises:
        ValueError, OSError: it still cannot be written; the results stay in memory.
    """
    if job.unsaved and job.finished.is_set():
        _save(job, Path(tempfile.mkdtemp(dir=jobs()._home.path)) / "pack")


class _Work:
    """Counts forward passes while a model works, and ends the work when its job is to stop."""

    def __init__(self, job: Job, total: int) -> None:
        self.job, self.total, self.passes = job, max(total, 1), 0

    @contextmanager
    def watched(self, loaded: Backbone) -> Iterator[None]:
        """Around each use of the model: its turn, and a look at the job before every pass.

        ``head_point`` lies on the way of each pass of a timm model. Other models are asked between
        two batches only.
        """

        def look(module: Any, inputs: tuple[Any, ...]) -> None:
            self.check()
            self.passes += len(inputs[0])
            self.job.share = min(0.99, self.passes / self.total)

        self.check()
        with models.turn():
            hook = loaded.head_point.register_forward_pre_hook(look)
            try:
                yield
            finally:
                hook.remove()

    def check(self) -> None:
        if self.job.stopping.is_set():
            raise Stopped


def _note_memory(job: Job, method: Explainer) -> None:
    if method.max_forward_batch < BATCH:
        note = (
            f"Memory ran out: {method.name} went on with {method.max_forward_batch} images a pass."
        )
        if note not in job.notes:
            job.notes.append(note)


# ---------------------------------------------------------------------- clips


def _explain_clip(job: Job, folder: Path) -> None:
    request = job.request
    assert request.clip is not None
    loaded, head = models.network(request.backbone, request.weights, request.head)
    path = folder.with_name("clip") / request.clip.name  # what errors and frames are to say
    try:
        path.parent.mkdir()
        path.write_bytes(request.clip.data)
        with quiet(), open_clip(path, MAX_PIXELS) as clip:
            job.total = -(-clip.announced // request.every)
        _check_length(job)
        with models.turn():
            method, *_ = set_up(loaded, head, request.explainers[0], None, 1, "whole", BATCH, 0)
        _watch(job, loaded, method)
        job.step = method.name
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
        job.done = len({e.image_id for e in found})
        job.problems += [(request.clip.name, reason) for _, reason in found.skipped]
        _note_memory(job, method)
    except (ValueError, OSError) as error:
        raise _again(error, path, request.clip.name) from None
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
        with suppress(ValueError, OSError):  # nothing was explained
            read_manifest(folder)
            job.folder, job.pack_id = folder, job.library.add_scratch(folder)


def _watch(job: Job, loaded: Backbone, method: Explainer) -> None:
    """Let ``method`` take its turn, tell its job how far it is, and stop with it."""
    work = _Work(job, job.total * method.forwards)
    attribute = method.attribute_classes

    def watched(inputs: Any, choose: Any) -> Any:
        with work.watched(loaded):
            found = attribute(inputs, choose)
        job.done += len(inputs)
        _check_length(job)
        return found

    method.attribute_classes = watched  # type: ignore[method-assign]


def _check_length(job: Job) -> None:
    if max(job.total, job.done) > MAX_FRAMES:
        count, every = max(job.total, job.done), job.request.every
        enough = -(-count * every // MAX_FRAMES)
        raise ValueError(
            f"The clip has {count} frames to explain, {MAX_FRAMES} is the limit; set the n of 'each "
            f"n-th frame' to {enough} or more, or give a shorter clip."
        )


# ---------------------------------------------------------------------- keeping


def keep(job: Job, name: str) -> Path:
    """Write the results of ``job`` as the pack ``name`` below the root.

    Raises:
        ValueError: a name that is taken or no name, or results that are gone.
        OSError: the disk is full or may not be written; the results stay where they are.
    """
    name = name.strip()
    if not re.fullmatch(NAME, name) or name.endswith("."):
        raise ValueError(
            "Give a name of letters, digits, spaces, dots and dashes; it becomes a folder's name."
        )
    if name.casefold() == JOBS:
        raise ValueError(f"The folder {JOBS} is for trainings; choose another name.")
    if job.folder is None:
        raise ValueError("There are no results to keep.")
    target = job.library.root / name
    try:
        job.library.root.mkdir(parents=True, exist_ok=True)
        target.mkdir()  # claims the name: two pages may ask at once
    except FileExistsError:
        raise ValueError(
            f"There is a folder {name!r} already; choose another name. Nothing was overwritten."
        ) from None
    except OSError as error:
        raise OSError(
            f"{name} cannot be written ({error.strerror}); free some space or permit writing, and "
            f"try again. The results are still here."
        ) from None
    film: Path | None = None
    try:
        skipped = [(s["file_name"], s["reason"]) for s in read_manifest(job.folder)["skipped"]]
        if (job.folder / "overlay.mp4").exists():
            film = Path(shutil.copy(job.folder / "overlay.mp4", job.folder.parent / "film.mp4"))
        return save_pack(target, load_pack(job.folder), True, skipped, film)
    except (ValueError, OSError) as error:
        with suppress(OSError):
            target.rmdir()  # empty still
        raise _again(error, target, name) from None
    finally:
        if film is not None:
            film.unlink(missing_ok=True)


def _again(error: ValueError | OSError, path: Path, name: str) -> ValueError | OSError:
    """The error with a name that people know in place of a path that they do not."""
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(reason(error).replace(str(path), name))
