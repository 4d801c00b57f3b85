"""A run of the live page: what was asked for, how far it is, what came out."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xattn.app.live.uploads import Problem, Upload
from xattn.packs.explanation import Explanation

if TYPE_CHECKING:
    from xattn.app.library import Library


BATCH = 8  # photos or frames a pass
MAX_FRAMES = 1000  # of a clip
SIDE = 360  # pixels of a result's longer side on the page


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
class LiveRun:
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
        """Wait at most so many seconds; whether the run has finished."""
        return self.finished.wait(seconds)
