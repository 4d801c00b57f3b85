"""The train page: start a job on a folder of photos, follow its losses and maps, stop it, go on with it."""

from __future__ import annotations

import streamlit as st

from xattn.app import state
from xattn.app.jobs.jobs import Jobs
from xattn.app.jobs.spec import JobError
from xattn.app.pages.train.form import NEW, form
from xattn.app.pages.train.job_view import job_view
from xattn.app.pages.train.jobs_table import jobs_table
from xattn.app.state import Context, plain
from xattn.runtime.stores import StorePath


def page(context: Context) -> None:
    """The table of jobs, and below it the one that the URL names, or the form for a new one."""
    st.title("Train a head", anchor=False)
    settings = state.settings()
    if isinstance(settings.root, StorePath):
        st.info(
            f"Training is off, because this viewer shows {plain(settings.root)}. Start xattn app on a "
            "local folder to train."
        )
        return
    if not settings.training:
        st.info(
            "Training is off, because everybody in the network reaches this viewer without a "
            "token. Start it without --no-token to train here."
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
        jobs_table(jobs, list(known.values()), chosen)
    if chosen in known:
        st.button("Start a new one", on_click=_close, icon=":material/add:", type="tertiary")
        job_view(jobs, known[chosen], context)
    else:
        if known:
            st.subheader("Start a new one", anchor=False)
        form(jobs, next((job for job in known.values() if job.alive), None))


def _close() -> None:
    """No job is open; the page takes it from the URL."""
    st.query_params.pop("job", None)
