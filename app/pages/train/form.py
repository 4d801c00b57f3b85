"""The form of a new job."""

from __future__ import annotations

import streamlit as st

from xattn.app import models, state
from xattn.app.jobs.jobs import Job, Jobs
from xattn.app.jobs.photo_folders import PhotoFolder, photo_folders
from xattn.app.jobs.spec import JobError, Spec
from xattn.app.navigation import url_widgets
from xattn.app.pages.train.job_view import STATES
from xattn.app.state import plain
from xattn.config import PROBE_RECIPES, RECIPES
from xattn.runtime.display_text import reason, visible

NEW = ""
KINDS = {"train": "Explanation head", "probe": "Classifier heads"}
ABOUT = {
    "train": "Learns from photos alone, without labels, to show what a network looks at: then one pass "
    "explains a photo.",
    "probe": "Learns your own classes on a frozen network, and shows for each class what it looks at. "
    "The photos need labels.",
}
PROBES = ("gap", "efficient_probe", "abmilp")


def form(jobs: Jobs, running: Job | None) -> None:
    """Show the form; ``running`` is the job that has to end first."""
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
        recipe = _recipe(heads[0]) if kind == "train" else "small"
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
        names = sorted((n for n, a in attentive.items() if not a), key=lambda n: n != "evidence")
        head = url_widgets.selectbox(
            "Head",
            names,
            "head",
            help="evidence learns what the network answers for masked photos, which takes minutes to ask "
            "before it trains; ttame learns masks that keep the prediction.",
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


def _recipe(head: str) -> str:
    from xattn.heads import head_entry

    return head_entry(head).recipe


def _some(names: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _more(kind: str, name: str) -> tuple[int | None, int | None, int]:
    recipe = (RECIPES if kind == "train" else PROBE_RECIPES)[name]
    kind = f"{kind}-{name}"  # each recipe has numbers of its own
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
