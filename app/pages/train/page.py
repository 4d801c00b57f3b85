"""The train page: start a job on a folder of photos, follow its losses and maps, stop it, go on with it."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app import models, state
from xattn.app.components import grid
from xattn.app.jobs.jobs import Job, JobError, Jobs, Spec
from xattn.app.jobs.photo_folders import PhotoFolder, photo_folders
from xattn.app.navigation import url_widgets
from xattn.app.pictures.rendering import Look, blank_maps, legends, overlay_url, photo_url
from xattn.app.state import Context, plain
from xattn.config import PROBE_RECIPES, RECIPES
from xattn.packs.contained_files import PackError, read_inside
from xattn.pictures.contact_sheet import legends_html
from xattn.runtime.display_text import reason, visible

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

NEW = ""
SCALES = {"Shared": "shared", "Each map": "map"}
KINDS = {"train": "Explanation head", "probe": "Classifier heads"}
ABOUT = {
    "train": "Learns from photos alone, without labels, to show what a network looks at: then one pass "
    "explains a photo.",
    "probe": "Learns your own classes on a frozen network, and shows for each class what it looks at. "
    "The photos need labels.",
}
PROBES = ("gap", "efficient_probe", "abmilp")
POINTS = 1000  # of a curve
MAX_RESULTS = 16 << 20  # bytes
RESULTS = {
    "head": str,
    **dict.fromkeys(("accuracy", "accuracy_lo", "accuracy_hi", "ece"), float),
    **dict.fromkeys(("parameters", "photos"), int),
}
EVERY = 2.0  # seconds between two looks at a running job
SIDE = 320
ACCENT = "#d4622f"  # between the accents of the light and the dark theme
COLOURS = [
    ACCENT,
    "#3f86b8",
    "#8a8f3c",
    "#a35fa8",
    "#3f9a82",
    "#b08440",
]  # told apart by dashes, too
STATES = {
    "running": "running",
    "stopping": "stops after this step",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "killed": "ended without a word",
}
TERMS = {
    "loss": "Loss",
    "cross_entropy": "Cross-entropy of the masked photo",
    "area": "Area of the mask",
    "variation": "Variation of the mask",
    "validation_loss": "Loss on validation photos",
    "accuracy": "Accuracy on validation photos",
}


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
    jobs = Jobs(settings.root, settings.data, settings.model)
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
        _job(jobs, known[chosen], context)
    else:
        _form(jobs, next((job for job in known.values() if job.alive), None))


def _choose() -> None:
    """The chosen job goes into the URL, from where the page takes it."""
    if st.session_state["choice"]:
        st.query_params["job"] = st.session_state["choice"]
    else:
        st.query_params.pop("job", None)


# ---------------------------------------------------------------------- a new job


def _form(jobs: Jobs, running: Job | None) -> None:
    found, whole = photo_folders(jobs.data)
    if state.settings().data is None:  # the root also holds packs and results
        found.sort(key=lambda f: f.name == ".")
    if not found:
        _no_photos(jobs)
        return
    left, right = st.columns([3, 2], gap="large")
    with left:
        kind = url_widgets.segmented(
            "Kind",
            list(KINDS),
            "kind",
            format_func=lambda k: KINDS[k],
            label_visibility="collapsed",
        )
        st.caption(ABOUT[kind])
        by_id = {f.id: f for f in found}
        folder = by_id[
            url_widgets.selectbox(
                "Photos", list(by_id), "data", format_func=lambda i: _title(by_id[i])
            )
        ]
        if not whole:
            st.caption("There are more folders than could be looked at; start with --data FOLDER.")
        model = _model()
        heads, labels, problem = _heads(kind, folder)
        epochs, batch_size, seed = _more(kind)
    spec = Spec(kind, folder.name, model, heads, labels, epochs, batch_size, seed)
    with right:
        suggested = jobs.free_name(f"{_short(folder.name)}-{'-'.join(heads) or kind}"[:56])
        name = st.text_input("Name", suggested, key=f"name-{suggested}", max_chars=64).strip()
        if running is not None:
            problem = f"{running.id} is {STATES[running.state]}; one job runs at a time."
        pressed = st.button(
            "Start training",
            type="primary",
            width="stretch",
            disabled=problem is not None,
            key="start",
        )
        if problem is not None:
            st.caption(plain(problem))
        if pressed and problem is None:
            try:
                st.query_params.from_dict({"job": jobs.start(spec, name).id})
            except (JobError, OSError) as error:
                st.error(plain(reason(error)))
            else:
                st.rerun()
        _command(jobs, spec, name)


def _title(folder: PhotoFolder) -> str:
    name = "All photos of the data folder" if folder.name == "." else visible(folder.name)
    return f"{name} · {folder.photos:,} photos"


def _short(name: str) -> str:
    return "photos" if name == "." else name.rpartition("/")[2]


def _no_photos(jobs: Jobs) -> None:
    st.markdown(
        "**No photos here yet.** Put a folder of photos into the folder that the viewer was started on, "
        "or start the viewer with another one:"
    )
    st.code(f"xattn app {jobs.root} --data PHOTOS", language="sh")


def _model() -> str:
    """The network's name for the job: "" is the one that the viewer was started with."""
    names = models.backbones()
    own = names[0] if state.settings().model is not None else None
    name = url_widgets.selectbox("Network", names, "model")
    return NEW if name == own else name


def _heads(kind: str, folder: PhotoFolder) -> tuple[tuple[str, ...], str, str | None]:
    """Heads, the file of labels, and what is missing."""
    from xattn.heads import AttentiveHead, head_class, list_heads

    attentive = {name: issubclass(head_class(name), AttentiveHead) for name in list_heads()}
    if kind == "train":
        names = sorted((n for n, a in attentive.items() if not a), key=lambda n: n != "ttame")
        head = url_widgets.selectbox(
            "Head", names, "head", help="ttame is the library's own default."
        )
        return (head,), "", None
    sources = [*([NEW] if len(folder.classes) > 1 else []), *folder.labels]
    if not sources:
        return (
            (),
            "",
            "These photos have no labels: neither folders of classes nor a .csv or .json.",
        )
    labels = st.selectbox(
        "Labels",
        sources,
        key=f"labels of {folder.id}",  # or a browser goes on showing those of the folder before
        format_func=lambda s: s or f"The {len(folder.classes):,} folders: {_some(folder.classes)}",
    )
    heads = url_widgets.multiselect(
        "Heads",
        [name for name, is_attentive in attentive.items() if is_attentive],
        "heads",
        default=PROBES,
        help="Each is trained on the same features; their accuracies end in one table.",
    )
    return tuple(heads), labels, None if heads else "Choose at least one head."


def _some(names: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _more(kind: str) -> tuple[int | None, int | None, int]:
    recipe = (RECIPES if kind == "train" else PROBE_RECIPES)["small"]
    with st.expander("More choices"):
        epochs = st.number_input("Epochs", 1, 10_000, recipe["epochs"], key=f"epochs-{kind}")
        size = st.number_input(
            "Photos a step",
            1,
            4096,
            recipe["batch_size"],
            key=f"batch-{kind}",
            help="Fewer need less memory.",
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key=f"seed-{kind}")
    changed = (
        epochs if epochs != recipe["epochs"] else None,
        size if size != recipe["batch_size"] else None,
    )
    return (*changed, seed)


def _command(jobs: Jobs, spec: Spec, name: str) -> None:
    try:
        line = jobs.preview(spec, name)
    except JobError:
        return
    with st.expander("The same on the command line"):
        st.code(line, language="sh", wrap_lines=True)


# ---------------------------------------------------------------------- a job


def _job(jobs: Jobs, job: Job, context: Context) -> None:
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
            _losses(job, logs)
    elif job.alive and progress is None:
        st.caption(_waiting(job))
    results = None
    with _said():
        results = _table(job)
    best = None if results is None else str(results.loc[results["accuracy"].idxmax(), "head"])
    head = _sample(job, context, best)
    if results is not None:
        _results(results)
    if job.state == "finished":
        _next(jobs, job, head or best, best)
    with st.expander("What the job printed"):
        st.code(jobs.tail(job.id) or "Nothing yet.", language=None, wrap_lines=True)
    with st.expander("The same on the command line"):
        st.code(jobs.preview(job.spec, job.id), language="sh", wrap_lines=True)


@contextmanager
def _said() -> Iterator[None]:
    """A damaged file of a job is a message, and the rest of the job is shown all the same."""
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
    if problem := st.session_state.pop("_job_problem", None):
        st.error(plain(problem))


def _facts(job: Job) -> str:
    spec = job.spec
    model = spec.model or models.backbones()[0]
    what = {"train": "explanation head", "probe": "classifier heads", "demo": "demo pack"}[
        spec.kind
    ]
    parts = [f"{what} {', '.join(spec.heads)}".strip()]
    if spec.kind != "demo":
        place = "the data folder" if spec.data == "." else f"the folder {spec.data}"
        parts += [f"on {model}", f"photos in {place}"]
    parts.append(f"started {time.strftime('%d %b, %H:%M', time.localtime(job.started))}")
    if job.ended is not None:
        parts.append(f"took {_duration(job.ended - job.started)}")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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


def _losses(job: Job, logs: dict[str, list[dict[str, float]]]) -> None:
    tables = {
        name: pd.DataFrame(records).drop_duplicates("step", keep="last")
        for name, records in logs.items()
        if records
    }
    steps = max(int(t["step"].iloc[-1]) for t in tables.values())
    epochs = [t["epoch"].max() for t in tables.values() if "epoch" in t]
    epoch = f", epoch {int(max(epochs)) + 1:,}" if epochs else ""
    st.markdown(f"**Loss**, step {steps:,}{epoch}")
    st.altair_chart(_curve(tables, "loss"), width="stretch")
    st.caption("A dot is a step, the line the mean over an epoch.")
    others = [c for c in TERMS if c != "loss" and any(c in t for t in tables.values())]
    if others:
        with st.expander("Terms of the loss" if job.spec.kind == "train" else "More of the log"):
            for column in others:
                st.caption(TERMS[column])
                st.altair_chart(_curve(tables, column, 140), width="stretch")


def _curve(tables: dict[str, pd.DataFrame], column: str, height: int = 240) -> alt.Chart:
    """Each step as a dot, and their mean over an epoch as a line."""
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
        raise ValueError(f"log.jsonl of this job holds no {column}; look at what it printed.")
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


def _sample(job: Job, context: Context, best: str | None) -> str | None:
    """The maps of the fixed photos: before training, and at the last checkpoint; of one head at a time,
    ``best`` at first, or the one that is trained now. Returns that head, None without maps."""
    head = None
    try:
        packs = {p.name: p.id for p in context.library.packs() if p.problem is None}
        heads = job.spec.heads if job.spec.kind == "probe" else ("",)
        names = {head: "/".join(filter(None, (job.id, head, "sample"))) for head in heads}
        there = [head for head in heads if names[head] in packs]
        if not there:
            return None
        head = best if best in there else there[-1]
        if len(there) > 1:  # a new one, and then the best, is shown as soon as it is there
            key = f"sample of {len(there)} heads, best {best}"
            head = st.segmented_control("Head", there, default=head, key=key, required=True)
        _maps(context.library.open(packs[names[head]]))
    except PackError:  # just being replaced by the job
        st.caption("The maps of a checkpoint are being written.")
    return head


def _maps(pack: Pack) -> None:
    methods = pack.entries["method"]
    if not methods.str.fullmatch(r"step [0-9]{1,15}").all():
        return  # a pack of something else that was put there
    steps = methods.str.removeprefix("step ").astype(int)
    now, before = int(steps.max()), bool((steps == 0).any())
    when = {
        (True, False): " before training; the next ones come with a checkpoint",
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
        "from its least to its greatest value.",
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
                "id": f"{image_id}",
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
    if note := blank_maps(pack, pack.entries.index[steps > 0]):
        st.warning(plain(note))
    opened = grid(
        cells, key="sample", label="Maps of the fixed photos", columns=1 + len(set(steps)), width=96
    )
    if opened is not None:
        state.go("image", pack=pack.id, image=opened.partition("/")[0])


def _table(job: Job) -> pd.DataFrame | None:
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


def _results(table: pd.DataFrame) -> None:
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


def _next(jobs: Jobs, job: Job, head: str | None, best: str | None) -> None:
    """What to do with the results: ``head`` of several is the one that is looked at."""
    if job.spec.kind == "demo":
        if st.button("Open the demo", type="primary", key="open"):
            state.go("gallery", pack=None)
        return
    name = "it"
    folder = job.output / "head"
    if job.spec.kind == "probe":
        head = head or job.spec.heads[0]
        folder = job.output / head / "head"
        name = plain(head) + (
            ", the most accurate," if head == best and len(job.spec.heads) > 1 else ""
        )
    st.markdown(
        f"**Use {name}** on the page Live, where it is in the list of heads, or on the command line:"
    )
    st.code(jobs.explain_line(job.spec, folder), language="sh", wrap_lines=True)
