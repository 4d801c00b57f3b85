"""The results of a run as a pack: outside the root, or kept below it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from xattn.app.jobs.job_files import JOBS
from xattn.app.live.run import SIDE, LiveRun
from xattn.app.pictures.rendering import Look, overlay_bytes, photo_bytes
from xattn.packs.format import read_manifest
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.runtime.names import reason

FIRST = 3  # maps that are drawn before a browser asks for them, and while nobody else computes
NAME = r"[^\W_][\w .+-]{0,79}"  # of a pack that is kept


def save_results(run: LiveRun, folder: Path) -> None:
    """Write what was explained, so that the pages can show it."""
    if not run.unsaved:
        return
    run.step = "saving"
    try:
        run.folder = save_pack(folder, run.unsaved, overlays=False, skipped=run.problems)
    except OSError as error:
        raise OSError(
            error.errno or 0,
            f"The results cannot be written ({os.strerror(error.errno or 0)}); free some space on the "
            f"disk of {tempfile.gettempdir()} and write them again. They are still in memory.",
        ) from None
    pack_id = run.library.add_scratch(folder)
    run.unsaved = []
    pack = run.library.open(pack_id)
    for entry_id in pack.entries.index[:FIRST]:
        overlay_bytes(pack, entry_id, Look(side=SIDE))
        photo_bytes(pack, pack.entries.at[entry_id, "image_id"], SIDE)
    run.pack_id = pack_id


def keep(run: LiveRun, name: str) -> Path:
    """Write the results of ``run`` as the pack ``name`` below the root.

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
    if run.folder is None:
        raise ValueError("There are no results to keep.")
    if not run.library.keeps:
        raise ValueError(
            f"This viewer shows {run.library.root}, where it only reads. Start xattn app on a local "
            f"folder to keep results."
        )
    target = run.library.root / name
    try:
        run.library.root.mkdir(parents=True, exist_ok=True)
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
        skipped = [(s["file_name"], s["reason"]) for s in read_manifest(run.folder)["skipped"]]
        if (run.folder / "overlay.mp4").exists():
            film = Path(shutil.copy(run.folder / "overlay.mp4", run.folder.parent / "film.mp4"))
        return save_pack(target, load_pack(run.folder), True, skipped, film)
    except (ValueError, OSError) as error:
        with suppress(OSError):
            target.rmdir()  # empty still
        raise named_error(error, target, name) from None
    finally:
        if film is not None:
            film.unlink(missing_ok=True)


def named_error(error: ValueError | OSError, path: Path, name: str) -> ValueError | OSError:
    """The error with a name that people know in place of a path that they do not."""
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(reason(error).replace(str(path), name))
