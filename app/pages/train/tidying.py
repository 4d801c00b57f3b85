"""Renaming and deleting a job that does not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import streamlit as st

from xattn.app import state
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.jobs.spec import JobError
from xattn.app.state import plain
from xattn.packs.contained_files import PackError
from xattn.runtime.display_text import reason

MOST, NAMED = 20_000, 6  # files that are counted; heads and packs that are named


def tidying(jobs: Jobs, job: Job, bar: Any) -> None:
    """Popovers to rename and to delete ``job``."""
    with bar.popover("Rename"):
        name = st.text_input("New name", job.id, key=f"new name of {job.id}", max_chars=64).strip()
        pressed = st.button("Rename", key="rename", disabled=name in ("", job.id))
        st.caption("The folder of its results gets the name, too.")
        if pressed and _done(lambda: jobs.rename(job.id, name)):
            st.query_params["job"] = name
            st.rerun()
    asked = bar.popover("Delete", key=f"delete {job.id}", on_change="rerun")
    if not asked.open:
        return
    with asked:
        st.markdown(plain(_lost(job)))
        pressed = st.button("Delete for good", type="primary", key="delete")
        if pressed and _done(lambda: jobs.delete(job.id)):
            st.query_params.pop("job", None)
            st.rerun()


def _done(action: Any) -> bool:
    """Whether the job was changed, and with it perhaps the open pack; what went wrong is said here."""
    try:
        action()
    except (JobError, OSError) as error:
        st.error(plain(reason(error)))
        return False
    try:
        state.library().open(st.session_state.get("_pack", ""))
    except PackError:  # it was among the results
        st.session_state.pop("_pack", None)
        st.query_params.pop("pack", None)
    return True


def _lost(job: Job) -> str:
    """What deleting a job takes away."""
    if not job.output.is_dir() or job.output.is_symlink():
        return f"This deletes the record of {job.id}. It has no results."
    files, size = _count(job.output)
    number = "one file" if files == 1 else f"{files:,}{' or more' * (files >= MOST)} files"
    of = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    library = state.library()
    here = [info.name for info in library.heads()] + [info.name for info in library.packs()]
    named = [name for name in here if f"{name}/".startswith(f"{job.id}/")][:NAMED]
    also = f", among them {', '.join(named)}" if named else ""
    return (
        f"This deletes {job.id}: what it printed, and all in {state.settings().root.name}/{job.id}, "
        f"{number} of {of}{also}. It cannot be undone."
    )


def _count(folder: Path) -> tuple[int, int]:
    """Files below a folder and their bytes; links are not followed."""
    files = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            files += 1
            size += os.lstat(os.path.join(place, name)).st_size
        if files >= MOST:
            break
    return files, size
