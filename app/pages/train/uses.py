"""What a trained head is for: the page Live with it, its mistakes, and a comparison with another run."""

from __future__ import annotations

import streamlit as st

from xattn.app import state
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.pages.train.results import head_folder
from xattn.app.state import Context
from xattn.packs.contained_files import PackError


def uses(jobs: Jobs, job: Job, context: Context, head: str | None) -> None:
    """Buttons that lead on from a finished job; of several heads, from ``head``."""
    if job.spec.kind == "demo":
        return
    folder = head_folder(job, head)
    name = folder.relative_to(jobs.root).as_posix()
    known = next((info.id for info in context.library.heads() if info.name == name), None)
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    pressed = bar.button(
        "Try it in Live",
        type="primary",
        key="try",
        disabled=known is None,
        help="The folder of its head is gone." if known is None else None,
    )
    if pressed:
        state.go("live", model=job.spec.model or None, head=known)
    for label, page in (
        ("See its mistakes", "mistakes"),
        ("Compare its held-out photos", "runs"),
    ):
        if bar.button(label, key=page):
            pack = _labelled(job, context)
            if pack is not None:
                state.go(page, pack=pack)
            st.session_state["_mistakes_of"] = job.id
    if st.session_state.get("_mistakes_of") == job.id:
        st.markdown(
            "**No pack of this job has true classes yet.** Make one of photos that it was not trained on, "
            "and press the button again:"
        )
        st.code(jobs.mistakes_line(job, folder), language="sh", wrap_lines=True)
        st.caption("--labels also takes a .csv or .json with the class of each photo.")


def _labelled(job: Job, context: Context) -> str | None:
    """The pack with most photos of those below the job's results whose photos have true classes."""
    found = [
        info
        for info in context.library.packs()
        if info.problem is None and info.name.startswith(f"{job.id}/")
    ]
    for info in sorted(found, key=lambda info: -info.images):
        try:
            if context.library.open(info.id, passing=True).images["label_name"].notna().any():
                return info.id
        except PackError:  # just being replaced by the job
            continue
    return None
