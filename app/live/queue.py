"""The queue of the live page, which explains uploads in background threads and writes packs outside the
root.

A run is identified by a token that cannot be guessed. The token is part of the page's URL, so the run can
be found again after a reload, but nobody else can find it. At most two runs are processed at the same time;
others wait in the order in which they were requested. The oldest finished runs are removed together with
their packs.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from xattn.app.live.clip_run import explain_clip
from xattn.app.live.photo_run import explain_photos
from xattn.app.live.run import LiveRun, Request, Stopped, save_results
from xattn.app.scratch import Scratch
from xattn.runtime.names import reason

if TYPE_CHECKING:
    from xattn.app.library import Library


RUNNING, WAITING, KEPT = 2, 6, 24  # largest numbers of running, waiting and finished runs
_LOG = logging.getLogger(__name__)


class LiveQueue:
    """The live runs of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, LiveRun] = OrderedDict()
        self._scratch = Scratch()

    def start(self, request: Request, library: Library) -> LiveRun:
        """Start a run for ``request``, or let it wait until earlier runs have finished.

        Raises:
            ValueError: too many runs are already waiting.
        """
        run = LiveRun(request, library)
        with self._lock:
            waiting = len(self._waiting())
            if waiting >= WAITING:
                raise ValueError(
                    f"{waiting} other jobs are already waiting; try again when one has finished."
                )
            self._runs[run.id] = run
            self._next()
        return run

    def get(self, run_id: str | None) -> LiveRun | None:
        """The run with this token; None if it does not exist or was removed."""
        with self._lock:
            return None if run_id is None else self._runs.get(run_id)

    def ahead(self, run: LiveRun) -> int:
        """The number of waiting runs that come before this one."""
        with self._lock:
            waiting = self._waiting()
            return waiting.index(run) if run in waiting else 0

    def stop(self, run: LiveRun) -> None:
        """Stop a run; the maps that it has made so far are kept."""
        run.stopping.set()
        with self._lock:
            if run.status == "waiting":
                run.status, run.message = "stopped", "Stopped before it started."
                run.finished.set()

    def new_folder(self) -> Path:
        """The path for a run's pack, in a new temporary folder."""
        return Path(tempfile.mkdtemp(dir=self._scratch.path)) / "pack"

    def _waiting(self) -> list[LiveRun]:
        """The waiting runs in their order; the caller must hold the lock."""
        return [run for run in self._runs.values() if run.status == "waiting"]

    def _next(self) -> None:
        """Start waiting runs if possible, and remove old ones; the caller must hold the lock."""
        running = sum(j.status == "running" for j in self._runs.values())
        for run in self._waiting():
            if running >= RUNNING:
                break
            running += 1
            run.status, run.step = "running", "loading the model"
            threading.Thread(target=self._run, args=(run,), name="xattn-live", daemon=True).start()
        finished = [j for j in self._runs.values() if j.finished.is_set()]
        for run in finished[: max(0, len(finished) - KEPT)]:
            del self._runs[run.id]
            if run.folder is not None:
                shutil.rmtree(run.folder.parent, ignore_errors=True)

    def _run(self, run: LiveRun) -> None:
        started = time.perf_counter()
        status, message = "failed", ""
        try:
            folder = self.new_folder()
            (explain_clip if run.request.clip else explain_photos)(run, folder)
            status = "done"
        except Stopped:
            status = "stopped"
        except (ValueError, OSError, MemoryError) as error:
            message = reason(error)
        except Exception as error:
            _LOG.exception("a live explanation failed")
            message = (
                f"The program has failed with an unexpected error, {type(error).__name__}: {error}"
            )
        if status == "stopped":
            message = f"Stopped after {_amount(run)}."
        run.seconds = time.perf_counter() - started
        with self._lock:
            run.status, run.message, run.share = status, message, 1.0  # type: ignore[assignment]
            run.request = run.given  # frees the bytes of the uploads
            run.finished.set()
            self._next()


@functools.cache
def live_queue() -> LiveQueue:
    """The queue that all sessions of this process share."""
    return LiveQueue()


def _amount(run: LiveRun) -> str:
    unit = "frame" if run.request.clip else "photo"
    of = f" of {run.total}" if run.total else ""
    return f"{run.done}{of} {unit}{'s' if (run.total or run.done) != 1 else ''}"


def retry_save(run: LiveRun) -> None:
    """Try again to write the results of a run that could not be written, for example to a full disk.

    Raises:
        ValueError, OSError: the results still cannot be written, and remain in memory.
    """
    if run.unsaved and run.finished.is_set():
        save_results(run, live_queue().new_folder())
