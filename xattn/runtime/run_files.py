"""Whether a folder is free for a training run, or holds one to go on with; nothing of torch is needed."""

from __future__ import annotations

from pathlib import Path

from xattn.runtime.files import follow_link

RUN_FILE, LOCK_FILE = "run.json", "run.lock"


def check_run_folder(folder: Path, resume: bool) -> None:
    """Raise a ``ValueError`` unless ``folder`` is free for a new run, or holds one to resume."""
    follow_link(folder)  # refuses one that leads nowhere
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; name a folder")
    if (folder / RUN_FILE).is_file():
        if not resume:
            raise ValueError(
                f"output: {folder} holds a run already; go on with it by --resume (resume=True), or "
                f"give another --output"
            )
    elif resume:
        raise ValueError(f"resume: {folder} holds no run; check output, or train without resume")
    elif folder.is_dir() and any(p.name != LOCK_FILE for p in folder.iterdir()):
        raise ValueError(f"output: {folder} is not empty and holds no run; choose a new folder")
