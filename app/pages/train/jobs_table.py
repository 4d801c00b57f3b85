"""The table of jobs, and the losses of those that are chosen in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import streamlit as st

from xattn.app import models, state
from xattn.app.components import component, sent
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.pages.train.job_view import EVERY, KINDS, STATES
from xattn.app.pages.train.losses import overlay_view
from xattn.app.pages.train.results import results_table
from xattn.eval.evaluation.plan import duration
from xattn.runtime.files import Signature

TABLE = "train.jobs"  # key of the table
CHOSEN = "with"  # parameter of the URL: the jobs whose losses are compared


def jobs_table(jobs: Jobs, found: Sequence[Job], open_job: str) -> None:
    """Show the jobs, again and again while one runs; ``open_job`` is the one below, or ""."""
    alive = any(job.alive for job in found)
    st.fragment(_table, run_every=EVERY if alive else None)(jobs, open_job)


def chosen(found: Sequence[Job]) -> list[str]:
    """The jobs of the URL that are there."""
    known = {job.id for job in found}
    return [name for name in dict.fromkeys(st.query_params.get_all(CHOSEN)) if name in known]


def _table(jobs: Jobs, open_job: str) -> None:
    found = jobs.all()
    names = chosen(found)
    result = component("jobs")(
        data={"jobs": [_row(jobs, job, open_job, names) for job in found]},
        key=TABLE,
        on_open_change=lambda: None,
        on_chosen_change=_choose,
    )
    if result.open in {job.id for job in found}:
        st.query_params["job"] = result.open
        st.rerun()
    if len(names) > 1:
        logs: dict[str, list[dict[str, float]]] = {}
        for name in names:
            for head, records in jobs.losses(name).items():
                logs[f"{name} · {head}" if head else name] = records
        overlay_view(logs)
    elif len(found) > 1:
        st.caption("Choose several by their boxes, and their losses stand in one chart.")


def _choose() -> None:
    names = sent(TABLE, "chosen")
    if isinstance(names, list):
        st.query_params[CHOSEN] = [str(name) for name in names]


def _row(jobs: Jobs, job: Job, open_job: str, names: Sequence[str]) -> dict[str, Any]:
    progress = jobs.progress(job.id)
    share = min(progress[0] / progress[1], 1.0) if progress else None
    if job.state == "finished":
        share, progress = 1.0, None
    ended = time.time() if job.alive else job.ended
    return {
        "id": job.id,
        "what": what(job),
        "state": STATES[job.state],
        "kind": "busy" if job.alive else "bad" if job.state in ("failed", "killed") else "plain",
        "share": share,
        "done": f"{progress[0]:,} of {progress[1]:,}" if progress else "",
        "best": _best(jobs, job, job.id, _stamps(job)),
        "started": time.strftime("%d %b, %H:%M", time.localtime(job.started)),
        "took": "" if ended is None else duration(max(0.0, ended - job.started)),
        "href": state.link("train", job=job.id),
        "chosen": job.id in names,
        "selected": job.id == open_job,
    }


def what(job: Job) -> str:
    """What a job does, in a few words."""
    parts = [f"{KINDS[job.spec.kind]} {', '.join(job.spec.heads)}".strip()]
    if job.spec.kind != "demo":
        parts.append(f"on {job.spec.model or models.backbones()[0]}")
    return " ".join(parts)


def _stamps(job: Job) -> tuple[Signature | None, ...]:
    """What changes with the figures of a job."""
    folders = [job.output] if job.spec.kind != "probe" else [job.output / h for h in job.spec.heads]
    files = [*(folder / "log.jsonl" for folder in folders), job.output / "results.csv"]
    return tuple(_stamp(path) for path in files)


def _stamp(path: Any) -> Signature | None:
    try:
        return Signature.of(path.stat())
    except OSError:
        return None


@st.cache_data(max_entries=256, show_spinner=False)
def _best(_jobs: Jobs, _job: Job, name: str, stamps: tuple[Signature | None, ...]) -> str:
    """The best figure of a job so far: an accuracy where there is one, else the least loss of an epoch."""
    try:
        results = results_table(_job)
    except ValueError:
        return "results are damaged"
    if results is not None:
        first = results.loc[results["accuracy"].idxmax()]
        return f"accuracy {first['accuracy']:.1%}, {first['head']}"
    records = [r for log in _jobs.losses(name).values() for r in log]
    accuracies = [r["accuracy"] for r in records if "accuracy" in r]
    if accuracies:
        return f"accuracy {max(accuracies):.1%}"
    epochs: dict[float, list[float]] = {}
    for record in records:
        if "loss" in record:
            epochs.setdefault(record.get("epoch", 0), []).append(record["loss"])
    means = [sum(losses) / len(losses) for losses in epochs.values()]
    finite = [mean for mean in means if mean == mean]
    return f"loss {min(finite):.4g}" if finite else ""
