"""A job on the train page: its state, its buttons, and its results so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import streamlit as st

from xattn.app import models
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.jobs.spec import JobError
from xattn.app.pages.train.losses import losses_view
from xattn.app.pages.train.results import next_steps, results_table, results_view
from xattn.app.pages.train.sample_maps import sample_maps
from xattn.app.pages.train.tidying import tidying
from xattn.app.pages.train.uses import uses
from xattn.app.state import Context, plain
from xattn.eval.evaluation.plan import duration
from xattn.runtime.display_text import reason

KINDS = {"train": "explanation head", "probe": "classifier heads", "demo": "demo pack"}
EVERY = 2.0  # seconds between two looks at a running job
STATES = {
    "running": "running",
    "stopping": "stops after this step",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "killed": "ended without a word",
}


def job_view(jobs: Jobs, job: Job, context: Context) -> None:
    """Show a job, again and again while it runs."""
    every = EVERY if job.alive else None
    st.fragment(_follow, run_every=every)(jobs, job.id, context, job.alive)


def _follow(jobs: Jobs, job_id: str, context: Context, was_alive: bool) -> None:
    try:
        job = jobs.get(job_id)
    except JobError:  # its folder was deleted; the page says so
        st.rerun()
    if job.alive is not was_alive:
        st.rerun()
    try:
        _show(jobs, job, context)
    except (ValueError, OSError) as error:  # a fragment's own runs are not in the page's hands
        st.error(plain(reason(error)))


def _show(jobs: Jobs, job: Job, context: Context) -> None:
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    bar.header(plain(job.id), anchor=False, width="content")
    bar.badge(STATES[job.state], color="red" if job.state in ("failed", "killed") else "gray")
    bar.space("stretch")
    _buttons(jobs, job, bar)
    st.caption(plain(_facts(job)))
    progress = jobs.progress(job.id) if job.alive else None
    if progress is not None:
        _progress(job, progress[0], progress[1], jobs.time_left(job.id))
    _problem(job)
    logs = jobs.losses(job.id)
    if any(logs.values()):
        with _said():
            losses_view(job, logs)
    elif job.alive and progress is None:
        st.caption(_waiting(job))
    results = None
    with _said():
        results = results_table(job)
    best = None if results is None else str(results.loc[results["accuracy"].idxmax(), "head"])
    head = sample_maps(job, context, best)
    if results is not None:
        results_view(results)
    if job.state == "finished":
        uses(jobs, job, context, head or best)
        next_steps(jobs, job, head or best, best)
    with st.expander("What the job printed"):
        st.code(jobs.tail(job.id) or "Nothing yet.", language=None, wrap_lines=True)
    with st.expander("The same on the command line"):
        st.code(jobs.preview(job.spec, job.id), language="sh", wrap_lines=True)


@contextmanager
def _said() -> Iterator[None]:
    """Report a damaged file of a job, and still show the rest of the job."""
    try:
        yield
    except ValueError as error:
        st.error(plain(error))


def _waiting(job: Job) -> str:
    if job.spec.kind == "probe":
        return "The network runs once over all photos; then the heads are trained."
    if job.spec.kind == "demo":
        return "The demo explains eight photos and measures the maps."
    return "The network is being loaded; losses come with the first step."


def _buttons(jobs: Jobs, job: Job, bar: Any) -> None:
    def act(action: Any, **options: Any) -> None:
        try:
            action(job.id, **options)
        except (JobError, OSError) as error:
            st.session_state["_job_problem"] = reason(error)

    if job.state == "running":
        bar.button(
            "Stop",
            on_click=act,
            args=(jobs.stop,),
            key="stop",
            help="After this step, with a checkpoint.",
        )
    elif job.state == "stopping":
        bar.button(
            "Stop at once",
            on_click=act,
            args=(jobs.stop,),
            kwargs={"at_once": True},
            key="kill",
            help="What was done since the last checkpoint is lost.",
        )
    elif job.resumable:
        bar.button("Resume", type="primary", on_click=act, args=(jobs.resume,), key="resume")
    if not job.alive:
        tidying(jobs, job, bar)
    if problem := st.session_state.pop("_job_problem", None):
        st.error(plain(problem))


def _facts(job: Job) -> str:
    spec = job.spec
    model = spec.model or models.backbones()[0]
    parts = [f"{KINDS[spec.kind]} {', '.join(spec.heads)}".strip()]
    if spec.kind != "demo":
        place = "the data folder" if spec.data == "." else f"the folder {spec.data}"
        parts += [f"on {model}", f"photos in {place}"]
    parts.append(f"started {time.strftime('%d %b, %H:%M', time.localtime(job.started))}")
    if job.ended is not None:
        parts.append(f"took {duration(job.ended - job.started)}")
    return " · ".join(parts)


def _progress(job: Job, done: int, total: int, left: str) -> None:
    more = f", {left}" if left else ""
    unit = " steps" if job.spec.kind == "train" else ""
    st.progress(min(done / total, 1.0), f"{done:,} of {total:,}{unit}{more}")


def _problem(job: Job) -> None:
    if job.state == "failed":
        st.error(plain(job.message or f"The job ended with exit code {job.code}."))
    elif job.state == "killed":
        st.error(
            "The job was ended from outside, as by a full memory or a restart of the machine. Resume goes "
            "on from its last checkpoint."
        )
        if job.message:
            st.code(job.message, language=None, wrap_lines=True)
    elif job.state == "stopped":
        st.info("Stopped, with a checkpoint. Resume goes on from there.")
