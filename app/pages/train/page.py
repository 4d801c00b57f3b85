"""The train page: start a job on a folder of photos, follow its losses and maps, stop it, go on with it."""

from __future__ import annotations

import streamlit as st

from xattn.app import state
from xattn.app.jobs.jobs import Jobs
from xattn.app.jobs.spec import JobError
from xattn.app.pages.train.form import NEW, form
from xattn.app.pages.train.job_view import STATES, job_view
from xattn.app.state import Context, plain


def page(context: Context) -> None:
    """The list of jobs, and the one that the URL names, or the form for a new one."""
    st.title("Train a head", anchor=False)
    settings = state.settings()
    if not settings.training:
        st.info(
            "Training is off, because everybody in the network reaches this viewer without a "
            "password. Start it with --password-file to train here."
        )
        return
    jobs = Jobs(settings.root, settings.data, settings.model, settings.imports)
    known = {job.id: job for job in jobs.all()}
    chosen = st.query_params.get("job", NEW)
    if chosen and chosen not in known:
        try:
            jobs.get(chosen)
        except JobError as error:
            st.warning(plain(error))
        chosen = NEW
    if known:
        st.session_state["choice"] = chosen
        st.selectbox(
            "Job",
            [NEW, *known],
            key="choice",
            format_func=lambda j: f"{j} · {STATES[known[j].state]}" if j else "Start a new one",
            on_change=_choose,
        )
    if chosen in known:
        job_view(jobs, known[chosen], context)
    else:
        form(jobs, next((job for job in known.values() if job.alive), None))


def _choose() -> None:
    """The chosen job goes into the URL, from where the page takes it."""
    if st.session_state["choice"]:
        st.query_params["job"] = st.session_state["choice"]
    else:
        st.query_params.pop("job", None)
