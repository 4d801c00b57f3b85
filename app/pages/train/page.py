"""The train page: start a job on a folder of photos, follow its losses and maps, stop it and resume it."""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from xattn.app import models, state
from xattn.app.components import command, component, sent_value
from xattn.app.jobs.job_files import JobError, Spec
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.library import JOBS
from xattn.app.navigation import address
from xattn.app.pages.train.job_view import (
    EVERY,
    KINDS,
    STATES,
    job_view,
    overlay_view,
    results_table,
)
from xattn.app.state import Context, plain
from xattn.config import PROBE_RECIPES, RECIPES
from xattn.eval.evaluation.plan import duration
from xattn.packs.format import MANIFEST
from xattn.photos.image_names import SUFFIXES
from xattn.runtime.files import Signature
from xattn.runtime.names import reason, visible
from xattn.runtime.stores import StorePath

DEPTH = 4  # levels of folders below the data folder
MAX_ENTRIES = 200_000  # most files searched, so that the page still opens on a huge disk
FEWEST = 4  # fewest photos; folders of classes with one or two photos would hide the others
LABELS = (".csv", ".json")


@dataclass(frozen=True)
class PhotoFolder:
    """A folder with photos in it or in its subfolders; ``name`` is its path relative to the data folder, or
    "." for the data folder itself."""

    name: str
    photos: int
    classes: tuple[str, ...]
    """Names of its subfolders that contain photos."""
    labels: tuple[str, ...]
    """Files beside its photos that may contain their labels."""

    @property
    def id(self) -> str:
        """The folder's id in a URL."""
        return hashlib.sha256(os.fsencode(self.name)).hexdigest()[:12]


def photo_folders(root: Path) -> tuple[list[PhotoFolder], bool]:
    """Folders by name, and whether all of ``root`` was searched.

    Packs, jobs, hidden folders, links to folders and folders with fewer than ``FEWEST`` photos are skipped.
    """
    counts: dict[str, int] = {}
    inside: dict[str, list[str]] = {}
    labels: dict[str, tuple[str, ...]] = {}
    seen = 0
    for folder, folders, files in os.walk(root):
        path = Path(folder)
        relative = path.relative_to(root)
        seen += len(files) + len(folders)
        if seen > MAX_ENTRIES:
            break
        if MANIFEST in files or relative.parts[:1] == (JOBS,):
            folders.clear()
            continue
        if len(relative.parts) >= DEPTH:
            folders.clear()
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and not (path / f).is_symlink()
        )
        photos = sum(
            os.path.splitext(f)[1].lower() in SUFFIXES and not f.startswith(".") for f in files
        )
        name = relative.as_posix()
        labels[name] = tuple(sorted(f for f in files if f.endswith(LABELS)))[:20]
        for above in (relative, *relative.parents) if photos else ():
            counts[above.as_posix()] = counts.get(above.as_posix(), 0) + photos
    for name in counts:
        if name != ".":
            inside.setdefault(Path(name).parent.as_posix(), []).append(Path(name).name)
    found = [
        PhotoFolder(name, count, tuple(sorted(inside.get(name, ()))), labels.get(name, ()))
        for name, count in counts.items()
        if count >= FEWEST
    ]
    return sorted(found, key=lambda f: (f.name != ".", f.name.casefold())), seen <= MAX_ENTRIES


NEW = ""
TRAINED = {"train": "Explanation head", "probe": "Classifier heads"}
ABOUT = {
    "train": "Learns from photos without labels to show what a network looks at. Afterwards one pass "
    "explains a photo.",
    "probe": "Learns your own classes on a frozen network, and shows for each class what it looks at. "
    "The photos need labels.",
}
PROBES = ("gap", "efficient_probe", "abmilp")


def form(jobs: Jobs, running: Job | None) -> None:
    """Show the form; ``running`` is a job that has to end first."""
    from xattn.heads import head_entry

    found, whole = photo_folders(jobs.data)
    if state.settings().data is None:  # the root also holds packs and results
        found.sort(key=lambda f: f.name == ".")
    if not found:
        _no_photos(jobs)
        return
    left, right = st.columns([3, 2], gap="large")
    with left:
        kind = address.segmented(
            "Kind",
            TRAINED,
            "kind",
            label_visibility="collapsed",
        )
        st.caption(ABOUT[kind])
        by_id = {f.id: f for f in found}
        titles = {key: _title(f) for key, f in by_id.items()}
        folder = by_id[address.selectbox("Photos", titles, "data")]
        if not whole:
            st.caption("There are too many folders to search them all; start with --data FOLDER.")
        model = _model()
        heads, labels, problem = _heads(kind, folder)
        recipe = head_entry(heads[0]).recipe if kind == "train" else "small"
        epochs, batch_size, seed = _more(kind, recipe)
    spec = Spec(kind, folder.name, model, heads, labels, epochs, batch_size, seed, recipe)
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
    command(f"xattn app {shlex.quote(str(jobs.root))} --data PHOTOS")


def _model() -> str:
    """The job's network; "" is the one that the viewer was started with."""
    names = models.backbones()
    own = names[0] if state.settings().model is not None else None
    name = address.selectbox("Network", names, "model")
    return NEW if name == own else name


def _heads(kind: str, folder: PhotoFolder) -> tuple[tuple[str, ...], str, str | None]:
    """The chosen heads, the file of labels, and a message about what is missing."""
    from xattn.heads import AttentiveHead, head_class, list_heads

    attentive = {name: issubclass(head_class(name), AttentiveHead) for name in list_heads()}
    if kind == "train":
        names = sorted((n for n, a in attentive.items() if not a), key=lambda n: n != "evidence")
        head = address.selectbox(
            "Head",
            names,
            "head",
            help="evidence learns from the network's outputs for masked photos, which take minutes to "
            "compute before training; ttame learns masks that keep the prediction.",
        )
        return (head,), "", None
    sources = [*([NEW] if len(folder.classes) > 1 else []), *folder.labels]
    if not sources:
        return (
            (),
            "",
            "These photos have no labels: neither folders for classes nor a .csv or .json file.",
        )
    labels = st.selectbox(
        "Labels",
        sources,
        key=f"labels of {folder.id}",  # otherwise a browser keeps showing those of the previous folder
        format_func=lambda s: (
            s or f"The {len(folder.classes):,} folders: {_first_of(folder.classes)}"
        ),
    )
    heads = address.multiselect(
        "Heads",
        [name for name, is_attentive in attentive.items() if is_attentive],
        "heads",
        default=PROBES,
        help="All heads are trained on the same features; one table shows their accuracies.",
    )
    return tuple(heads), labels, None if heads else "Choose at least one head."


def _first_of(classes: tuple[str, ...], most: int = 4) -> str:
    """The first names of classes, for a choice of labels."""
    return ", ".join(classes[:most]) + (", ..." if len(classes) > most else "")


def _more(kind: str, name: str) -> tuple[int | None, int | None, int]:
    recipe = (RECIPES if kind == "train" else PROBE_RECIPES)[name]
    kind = f"{kind}-{name}"  # each recipe has its own numbers
    with st.expander("More choices"):
        epochs = st.number_input("Epochs", 1, 10_000, recipe["epochs"], key=f"epochs-{kind}")
        size = st.number_input(
            "Photos per step",
            1,
            4096,
            recipe["batch_size"],
            key=f"batch-{kind}",
            help="Smaller batches need less memory.",
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
        command(line)


TABLE = "train.jobs"  # key of the table
CHOSEN = "with"  # parameter of the URL: the jobs whose losses are compared


def jobs_table(jobs: Jobs, found: Sequence[Job], open_job: str) -> None:
    """Show the jobs and refresh them while one runs; ``open_job`` is the job shown below, or ""."""
    alive = any(job.alive for job in found)
    st.fragment(_table, run_every=EVERY if alive else None)(jobs, open_job)


def chosen_jobs(found: Sequence[Job]) -> list[str]:
    """The jobs in the URL that exist."""
    known = {job.id for job in found}
    return [name for name in dict.fromkeys(st.query_params.get_all(CHOSEN)) if name in known]


def _table(jobs: Jobs, open_job: str) -> None:
    found = jobs.all()
    names = chosen_jobs(found)
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
        st.caption("Tick several jobs to see their losses in one chart.")


def _choose() -> None:
    names = sent_value(TABLE, "chosen")
    if isinstance(names, list):
        st.query_params[CHOSEN] = [str(name) for name in names]


def _row(jobs: Jobs, job: Job, open_job: str, names: Sequence[str]) -> dict[str, Any]:
    progress = None if job.state == "finished" else jobs.progress(job.id)
    share = min(progress[0] / progress[1], 1.0) if progress else None
    ended = time.time() if job.alive else job.ended
    return {
        "id": job.id,
        "what": describe_job(job),
        "state": STATES[job.state],
        "kind": "busy" if job.alive else "bad" if job.state in ("failed", "killed") else "plain",
        "share": 1.0 if job.state == "finished" else share,
        "done": f"{progress[0]:,} of {progress[1]:,}" if progress else "",
        "best": _best(jobs, job, job.id, _stamps(job)),
        "started": time.strftime("%d %b, %H:%M", time.localtime(job.started)),
        "took": "" if ended is None else duration(max(0.0, ended - job.started)),
        "href": state.link("train", job=job.id),
        "chosen": job.id in names,
        "selected": job.id == open_job,
    }


def describe_job(job: Job) -> str:
    """What a job does, in a few words."""
    parts = [f"{KINDS[job.spec.kind]} {', '.join(job.spec.heads)}".strip()]
    if job.spec.kind != "demo":
        parts.append(f"on {job.spec.model or models.backbones()[0]}")
    return " ".join(parts)


def _stamps(job: Job) -> tuple[Signature | None, ...]:
    """Signatures that change when a job's figures change."""
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
    """A job's best result so far: an accuracy if there is one, else the smallest loss of an epoch."""
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


def page(context: Context) -> None:
    """Show the table of jobs, and below it the job in the URL, or the form for a new one."""
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
            "Training is off, because others may reach this viewer without a token. Start it with "
            "XATTN_APP_TOKEN, and without --no-token, to train here."
        )
        return
    jobs = Jobs.of(settings)
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
    """Close the open job by removing it from the URL."""
    st.query_params.pop("job", None)
