"""Offers to make the demo pack in a viewer without packs, and shows its progress."""

from __future__ import annotations

import streamlit as st

from xattn.app import state
from xattn.app.components import command
from xattn.app.demo import pack_job
from xattn.app.jobs.job_files import JobError, Spec
from xattn.app.jobs.jobs import Job, Jobs, time_left
from xattn.app.state import plain

EVERY = 1.0  # seconds


WITH = "with photos and a network from installed packages. It takes about a minute:"


def show_offer(text: str = f"Or look around first, {WITH}") -> None:
    """Show a button that makes the demo pack, or its progress; nothing if jobs are off."""
    settings = state.settings()
    if not settings.training:
        return
    jobs = Jobs.of(settings)
    job = demo_job(jobs)
    if job is not None and job.alive:
        st.fragment(_follow, run_every=EVERY)(jobs, job.id)
        return
    st.markdown(text)
    if (line := pack_job.missing()) is not None:
        st.markdown("These packages are not installed yet:")
        command(line)
        return
    if job is not None and job.message:
        st.error(plain(job.message))
    if st.button("Make the demo pack", type="primary"):
        try:
            start_demo(jobs)
        except (JobError, OSError) as error:
            st.error(plain(error.args[-1]))
        else:
            st.rerun()


def demo_job(jobs: Jobs) -> Job | None:
    """The demo's job, if there is one."""
    return next((job for job in jobs.all() if job.spec.kind == "demo"), None)


def start_demo(jobs: Jobs) -> Job:
    """Make the demo pack or resume an interrupted one; a finished one is left as it is."""
    job = demo_job(jobs)
    if job is None:
        return jobs.start(Spec("demo"), jobs.free_name(pack_job.NAME))
    return jobs.resume(job.id) if job.resumable else job


def make_demo() -> None:
    """Start the demo's job for ``xattn app --demo``.

    Raises:
        ValueError: a package is missing, or another job is running.
    """
    settings = state.settings()
    if (line := pack_job.missing()) is not None:
        raise ValueError(f"demo: photos or weights are missing; run: {line}")
    start_demo(Jobs.of(settings))


def _follow(jobs: Jobs, job_id: str) -> None:
    job = jobs.get(job_id)
    if not job.alive:
        st.rerun()
    st.markdown("**Making the demo pack.** This page shows it as soon as it is ready.")
    found = jobs.progress(job_id)
    if found is None:
        st.progress(0.0, "The network is being loaded")
    else:
        text = f"{found[0]:,} of {found[1]:,} maps measured{time_left(found)}"
        st.progress(min(found[0] / found[1], 1.0), text)
