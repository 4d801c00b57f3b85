"""A job on the train page: its state, its buttons, and its results so far."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app import models, state
from xattn.app.components import command, grid
from xattn.app.jobs.job_files import JobError
from xattn.app.jobs.jobs import Job, Jobs, time_left
from xattn.app.pictures.rendering import Look, blank_maps, legends, overlay_url, photo_url
from xattn.app.state import Context, plain
from xattn.eval.evaluation.plan import duration
from xattn.packs.contained_files import LocalFolder, PackError
from xattn.pictures.contact_sheet import legends_html
from xattn.runtime.names import reason

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


MOST, NAMED = 20_000, 6  # most files counted; most heads and packs named


def rename_and_delete(jobs: Jobs, job: Job, bar: Any) -> None:
    """Show popovers to rename and to delete ``job``."""
    with bar.popover("Rename"):
        name = st.text_input("New name", job.id, key=f"new name of {job.id}", max_chars=64).strip()
        pressed = st.button("Rename", key="rename", disabled=name in ("", job.id))
        st.caption("The folder of its results is renamed as well.")
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
    """Run a change of the job, which may also change the open pack; returns whether it succeeded, and
    shows errors."""
    try:
        action()
    except (JobError, OSError) as error:
        st.error(plain(reason(error)))
        return False
    try:
        state.library().open(st.session_state.get("_pack", ""))
    except PackError:  # the open pack was among the results
        st.session_state.pop("_pack", None)
        st.query_params.pop("pack", None)
    return True


def _lost(job: Job) -> str:
    """A sentence on what deleting a job removes."""
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
        f"This deletes {job.id}: its output, and everything in {state.settings().root.name}/{job.id}, "
        f"{number} of {of}{also}. It cannot be undone."
    )


def _count(folder: Path) -> tuple[int, int]:
    """The number of files below a folder and their bytes; links are not followed."""
    files = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            files += 1
            size += os.lstat(os.path.join(place, name)).st_size
        if files >= MOST:
            break
    return files, size


SCALES = {"Shared": "shared", "Each map": "map"}
SIDE = 320


def sample_maps(job: Job, context: Context, best: str | None) -> str | None:
    """Show the maps of the fixed photos before training and at the last checkpoint, for one head at a time.

    The first head shown is ``best``, or the one being trained. Returns the head that is shown, or None if
    there are no maps."""
    head = None
    try:
        packs = {p.name: p.id for p in context.library.packs() if p.problem is None}
        heads = job.spec.heads if job.spec.kind == "probe" else ("",)
        names = {head: "/".join(filter(None, (job.id, head, "sample"))) for head in heads}
        there = [head for head in heads if names[head] in packs]
        if not there:
            return None
        head = best if best in there else there[-1]
        if len(there) > 1:  # a new head, and later the best one, is shown as soon as it exists
            key = f"sample of {len(there)} heads, best {best}"
            head = st.segmented_control("Head", there, default=head, key=key, required=True)
        _maps(context.library.open(packs[names[head]]))
    except PackError:  # just being replaced by the job
        st.caption("The maps of a checkpoint are being written.")
    return head


def _maps(pack: Pack) -> None:
    methods = pack.entries["method"]
    if not methods.str.fullmatch(r"step [0-9]{1,15}").all():
        return  # somebody put another pack there
    steps = methods.str.removeprefix("step ").astype(int)
    now, before = int(steps.max()), bool((steps == 0).any())
    when = {
        (True, False): " before training; the next maps come with a checkpoint",
        (True, True): f", before training and at step {now:,}, the last checkpoint",
        (False, True): f" at step {now:,}, the last checkpoint",
    }[before, now > 0]
    st.markdown(f"**Maps of {len(pack.images)} photos**{when}")
    scale = st.segmented_control(
        "Colour scale",
        list(SCALES),
        default=next(iter(SCALES)),
        required=True,
        key="sample scale",
        help="Shared: raw scores on one scale for all these maps, so that steps can be compared. Each map: "
        "from its smallest to its largest value.",
    )
    look = Look(side=SIDE, scale=SCALES[scale])
    if look.scale == "shared":
        ends = float(pack.entries["min"].min()), float(pack.entries["max"].max())
        look = replace(look, limits=ends)
    cells: list[dict[str, Any]] = []
    for image_id, row in pack.images.iterrows():
        entries = pack.entries[pack.entries["image_id"] == image_id]
        name = str(row["title"])
        cells.append(
            {
                "id": f"{image_id}/photo",
                "src": photo_url(pack, str(image_id), SIDE),
                "title": name,
                "alt": name,
            }
        )
        for entry_id, entry in entries.iterrows():
            step = int(steps[entry_id])
            cells.append(
                {
                    "id": f"{image_id}/{step}",
                    "src": overlay_url(pack, str(entry_id), look),
                    "title": f"Step {step:,}",
                    "alt": f"{name}: map of {entry['target_name']} at step {step}",
                    "lines": [f"{entry['target_name']}  {entry['probability']:.1%}"],
                }
            )
    st.html(legends_html(legends(pack, pack.entries.index, look)))
    if note := blank_maps(pack, pack.entries.index[steps > 0], pack.images["title"].__getitem__):
        st.warning(plain(note))
    if before and now > 0 and st.button("Both steps in Two runs", key="sample.runs"):
        state.go("runs", pack=pack.id, other=pack.id, by="step 0", by2=f"step {now}")
    opened = grid(
        cells, key="sample", label="Maps of the fixed photos", columns=1 + len(set(steps)), width=96
    )
    if opened is not None:
        state.go("image", pack=pack.id, image=opened.rpartition("/")[0])


MAX_RESULTS = 16 << 20  # bytes
RESULTS = {
    "head": str,
    **dict.fromkeys(("accuracy", "accuracy_lo", "accuracy_hi", "ece"), float),
    **dict.fromkeys(("parameters", "photos"), int),
}


def results_table(job: Job) -> pd.DataFrame | None:
    """The results that ``xattn probe`` has measured for its heads; None if there are none yet."""
    if job.spec.kind != "probe":
        return None
    folder = job.output.parent.resolve()
    try:
        data = LocalFolder(folder).read(f"{job.output.name}/results.csv", MAX_RESULTS)
    except PackError:
        return None  # not written yet
    try:
        table = pd.read_csv(io.BytesIO(data))[list(RESULTS)].astype(RESULTS)
    except (ValueError, KeyError):
        raise ValueError("results.csv of this job is damaged; train again.") from None
    if not table["accuracy"].between(0, 1).all() or not set(table["head"]) <= set(job.spec.heads):
        raise ValueError("results.csv of this job is damaged; train again.")
    return table if len(table) else None


def results_view(table: pd.DataFrame) -> None:
    """Show the accuracy of each head."""
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
    """Show what can be done with the results; ``head`` is the head being viewed if there are several."""
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
    command(jobs.explain_line(job.spec, folder))


def head_folder(job: Job, head: str | None) -> Path:
    """The folder of the trained head; if there are several, the head named ``head`` or, without a name, the
    first."""
    if job.spec.kind == "probe":
        return job.output / (head or job.spec.heads[0]) / "head"
    return job.output / "head"


POINTS = 1000  # most points of a curve
ACCENT = "#d4622f"  # between the accents of the light and the dark theme
COLOURS = [
    ACCENT,
    "#3f86b8",
    "#8a8f3c",
    "#a35fa8",
    "#3f9a82",
    "#b08440",
]  # also distinguished by dashes
TERMS = {
    "loss": "Loss",
    "cross_entropy": "Cross-entropy of the masked photo",
    "area": "Area of the mask",
    "variation": "Variation of the mask",
    "validation_loss": "Loss on validation photos",
    "accuracy": "Accuracy on validation photos",
}


def losses_view(job: Job, logs: dict[str, list[dict[str, float]]]) -> None:
    """Show the loss, and its terms in an expander."""
    tables = _tables(logs)
    steps = max(int(t["step"].iloc[-1]) for t in tables.values())
    epochs = [t["epoch"].max() for t in tables.values() if "epoch" in t]
    epoch = f", epoch {int(max(epochs)) + 1:,}" if epochs else ""
    st.markdown(f"**Loss**, step {steps:,}{epoch}")
    st.altair_chart(_curve(tables, "loss"), width="stretch")
    st.caption("Each dot is a step; the line is the mean over an epoch.")
    others = [c for c in TERMS if c != "loss" and any(c in t for t in tables.values())]
    if others:
        with st.expander("Terms of the loss" if job.spec.kind == "train" else "More of the log"):
            for column in others:
                st.caption(TERMS[column])
                st.altair_chart(_curve(tables, column, 140), width="stretch")


def overlay_view(logs: dict[str, list[dict[str, float]]]) -> None:
    """Show the losses of several jobs in one chart; ``logs`` are keyed by their names in the legend."""
    tables = {name: table for name, table in _tables(logs).items() if "loss" in table}
    if not tables:
        st.info("None of these jobs has written a loss yet.")
        return
    st.markdown(f"**Losses of {len(tables)} runs**")
    st.altair_chart(_curve(tables, "loss"), width="stretch")
    st.caption(
        "Each dot is a step; the line is the mean over an epoch. Losses can be compared between heads "
        "of the same kind; different kinds measure different things."
    )


def _tables(logs: dict[str, list[dict[str, float]]]) -> dict[str, pd.DataFrame]:
    """The logs that are not empty; if a step was repeated after a kill, its last record counts."""
    return {
        name: pd.DataFrame(records).drop_duplicates("step", keep="last")
        for name, records in logs.items()
        if records
    }


def _curve(tables: dict[str, pd.DataFrame], column: str, height: int = 240) -> alt.Chart:
    """A chart with each step as a dot and the mean over each epoch as a line."""
    parts = []
    for name, table in tables.items():
        if column not in table:
            continue
        part = table[["step", column]].dropna().rename(columns={column: "value"})
        width = int(table["epoch"].value_counts().max()) if "epoch" in table else 1
        part["mean"] = part["value"].rolling(max(width, 1), min_periods=1).mean()
        part["head"] = name or TERMS[column]
        parts.append(part.iloc[:: max(1, len(part) // POINTS)])
    if not parts:
        raise ValueError(f"log.jsonl of this job holds no {column}; see the job's output.")
    data = pd.concat(parts)
    base = alt.Chart(data, height=height, description=f"{TERMS[column]} by step").encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format=",d")),
    )
    colour: Any = alt.value(ACCENT)
    dash: Any = alt.value([1, 0])
    if len(parts) > 1:
        heads = [part["head"].iloc[0] for part in parts]
        legend = alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=2)
        colour = alt.Color(
            "head:N", title=None, sort=heads, scale=alt.Scale(range=COLOURS), legend=legend
        )
        dash = alt.StrokeDash("head:N", title=None, sort=heads, legend=legend)
    tip = [
        alt.Tooltip("step:Q"),
        alt.Tooltip("value:Q", format=".4g"),
        alt.Tooltip("mean:Q", format=".4g"),
    ]
    value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    dots = base.mark_circle(size=28, opacity=0.6).encode(y=value, color=colour, tooltip=tip)
    line = base.mark_line(strokeWidth=2).encode(y="mean:Q", color=colour, strokeDash=dash)
    return dots + line


KINDS = {"train": "explanation head", "probe": "classifier heads", "demo": "demo pack"}
EVERY = 2.0  # seconds between two updates of a running job
STATES = {
    "running": "running",
    "stopping": "stops after this step",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "killed": "ended without a message",
}


def job_view(jobs: Jobs, job: Job, context: Context) -> None:
    """Show a job and refresh it while it runs."""
    every = EVERY if job.alive else None
    st.fragment(_follow, run_every=every)(jobs, job.id, context, job.alive)


def _follow(jobs: Jobs, job_id: str, context: Context, was_alive: bool) -> None:
    try:
        job = jobs.get(job_id)
    except JobError:  # its folder was deleted, and the page says so
        st.rerun()
    if job.alive is not was_alive:
        st.rerun()
    try:
        _show(jobs, job, context)
    except (ValueError, OSError) as error:  # the page cannot catch errors of a fragment's own runs
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
        done, total, _ = progress
        unit = " steps" if job.spec.kind == "train" else ""
        text = f"{done:,} of {total:,}{unit}{time_left(progress)}"
        st.progress(min(done / total, 1.0), text)
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
        next_step_buttons(jobs, job, context, head or best)
        next_steps(jobs, job, head or best, best)
    with st.expander("What the job printed"):
        st.code(jobs.tail(job.id) or "Nothing yet.", language=None, wrap_lines=True)
    with st.expander("The same on the command line"):
        command(jobs.preview(job.spec, job.id))


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
            help="Everything since the last checkpoint is lost.",
        )
    elif job.resumable:
        bar.button("Resume", type="primary", on_click=act, args=(jobs.resume,), key="resume")
    if not job.alive:
        rename_and_delete(jobs, job, bar)
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


def _problem(job: Job) -> None:
    if job.state == "failed":
        st.error(plain(job.message or f"The job ended with exit code {job.code}."))
    elif job.state == "killed":
        st.error(
            "The job was ended from outside, for example because memory ran out or the machine was "
            "restarted. Resume continues from its last checkpoint."
        )
        if job.message:
            st.code(job.message, language=None, wrap_lines=True)
    elif job.state == "stopped":
        st.info("Stopped, with a checkpoint. Resume continues from there.")


def next_step_buttons(jobs: Jobs, job: Job, context: Context, head: str | None) -> None:
    """Show buttons for the next steps after a job has finished; if there are several heads, the buttons are
    for ``head``."""
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
        ("Compare methods on its held-out photos", "runs"),
    ):
        if bar.button(label, key=page):
            pack = _labelled(job, context)
            if pack is not None:
                state.go(page, pack=pack)
            st.session_state["_mistakes_of"] = job.id
    if st.session_state.get("_mistakes_of") == job.id:
        st.markdown(
            "**No pack of this job has true classes yet.** Make one from photos that the job was not "
            "trained on, and press the button again:"
        )
        command(jobs.mistakes_line(job, folder))
        st.caption("--labels also takes a .csv or .json file with the class of each photo.")


def _labelled(job: Job, context: Context) -> str | None:
    """Among the packs in the job's results whose photos have true classes, the one with the most photos."""
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
