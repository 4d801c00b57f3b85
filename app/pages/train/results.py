"""What a finished job gave: accuracies of heads, and how to use a head."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.state import plain
from xattn.packs.contained_files import PackError, read_inside

MAX_RESULTS = 16 << 20  # bytes
RESULTS = {
    "head": str,
    **dict.fromkeys(("accuracy", "accuracy_lo", "accuracy_hi", "ece"), float),
    **dict.fromkeys(("parameters", "photos"), int),
}


def results_table(job: Job) -> pd.DataFrame | None:
    """What ``xattn probe`` has measured of its heads; None before that."""
    if job.spec.kind != "probe":
        return None
    folder = job.output.parent.resolve()
    try:
        data = read_inside(folder, f"{job.output.name}/results.csv", MAX_RESULTS)
    except PackError:
        return None  # not there yet
    try:
        table = pd.read_csv(io.BytesIO(data))[list(RESULTS)].astype(RESULTS)
    except (ValueError, KeyError):
        raise ValueError("results.csv of this job is damaged; train again.") from None
    if not table["accuracy"].between(0, 1).all() or not set(table["head"]) <= set(job.spec.heads):
        raise ValueError("results.csv of this job is damaged; train again.")
    return table if len(table) else None


def results_view(table: pd.DataFrame) -> None:
    """The accuracies, head by head."""
    low, high = table["accuracy_lo"], table["accuracy_hi"]
    shown = pd.DataFrame(
        {
            "Head": table["head"],
            "Accuracy": [f"{value:.1%}" for value in table["accuracy"]],
            "95 % interval": [f"{a:.0%} to {b:.0%}" for a, b in zip(low, high, strict=True)],
            "Calibration error": [f"{value:.3f}" for value in table["ece"]],
            "Weights": [f"{value:,}" for value in table["parameters"]],
        }
    )
    st.markdown(f"**Results** on {int(table['photos'].iloc[0]):,} photos that were held out")
    st.dataframe(shown, hide_index=True, width="stretch")


def next_steps(jobs: Jobs, job: Job, head: str | None, best: str | None) -> None:
    """What to do with the results: ``head`` of several is the one that is looked at."""
    if job.spec.kind == "demo":
        if st.button("Open the demo", type="primary", key="open"):
            state.go("gallery", pack=None)
        return
    folder = head_folder(job, head)
    name = "it"
    if job.spec.kind == "probe":
        name = plain(folder.parent.name)
        if folder.parent.name == best and len(job.spec.heads) > 1:
            name += ", the most accurate,"
    st.markdown(f"**Use {name}** on the command line:")
    st.code(jobs.explain_line(job.spec, folder), language="sh", wrap_lines=True)


def head_folder(job: Job, head: str | None) -> Path:
    """Where the trained head lies; of several, the one named ``head`` or the first."""
    if job.spec.kind == "probe":
        return job.output / (head or job.spec.heads[0]) / "head"
    return job.output / "head"
