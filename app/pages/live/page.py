"""The live page: photos or a clip of one's own, explained while one waits; and a pack's film."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import models, state
from xattn.app.components import film as film_component
from xattn.app.components import grid
from xattn.app.live import explaining, uploads
from xattn.app.live.explaining import SIDE, Job, Request
from xattn.app.live.uploads import Upload
from xattn.app.models import ModelError
from xattn.app.navigation import url_widgets
from xattn.app.pictures import film as films
from xattn.app.pictures.rendering import (
    Look,
    blank_maps,
    data_uri,
    legends,
    overlay_bytes,
    overlay_url,
    photo_bytes,
    photo_url,
)
from xattn.app.state import Context, plain
from xattn.pictures.contact_sheet import legends_html
from xattn.runtime.display_text import reason

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.backbone import Backbone
    from xattn.packs.reader import Pack

REASONS, NAMED = 4, 2  # lines, and names in a line, about what was left out
FEW = 3  # pictures that fit beside each other on a phone
QUICK = 0.8  # seconds in which a short job may finish before its progress is shown
POLL = 0.5  # seconds
NO_HEAD = "none"
SANITY = ("random", "centre", "ones")  # explainers that explain nothing, to compare with
FIRST = ("head", "gradcam", "rollout")  # what is chosen by default, the first that is allowed
INPUTS = {"photos": "Photos", "clip": "Video"}
STYLE = """
<style>[class*="st-key-few-"]{max-width:960px}</style>
"""
VIEWS = {"crop": "Centre crop", "whole": "Whole picture"}
_WANTED: set[str] = set()  # networks that somebody chose, or pressed "Load it" for, since the start


def page(context: Context) -> None:
    """Controls on the left, what came out of them on the right."""
    st.html(STYLE)
    st.title("Explain your own photos", anchor=False)
    _body(context)


@st.fragment
def _body(context: Context) -> None:
    """All of the page, which runs without the rest of the script when something on it is used."""
    try:
        _both_sides(context)
    except ValueError as error:
        st.error(plain(error))


def _both_sides(context: Context) -> None:
    """The results first, since they are what somebody waits for."""
    left, right = st.columns([1, 2], gap="large")
    with left:
        kind = url_widgets.segmented(
            "Input",
            list(INPUTS),
            "input",
            format_func=lambda k: INPUTS[k],
            label_visibility="collapsed",
        )
    given = st.query_params.get("job")
    begun: Job | None = st.session_state.pop("_begun", None)
    job = begun or explaining.jobs().get(given or st.session_state.get("_job"))
    if begun is not None:
        st.query_params.pop("frame", None)  # of the film that was shown before
        begun.wait(QUICK)
    if job is not None:
        st.session_state["_job"] = job.id
        if given != job.id:
            st.query_params["job"] = job.id
    with right:
        earlier = st.empty()
        if job is not None:
            _outcome(context, job)
        elif given is not None:
            st.info(
                "The results of this address are gone: they are kept until the viewer stops, or "
                "until many others came after them. Explain the photos again; to keep results, "
                "save them as a pack."
            )
        else:
            _nothing_yet()
            if kind == "clip" and context.pack is not None and films.frames(context.pack):
                _film_of_pack(context.pack)
    with left:
        request = _controls(context, kind, job)
    other = None if job is None or kind != "clip" else _other_clip(job)
    if job is not None and other is not None:
        shown = _subject(job)
        which = f"another file named {plain(shown)}" if shown == other else plain(shown)
        chosen = "the chosen one" if shown == other else plain(other)
        earlier.info(f"These are the results of {which}. Press Explain for those of {chosen}.")
    if begun is not None and request is not None and begun.given != request.light():
        explaining.jobs().stop(begun)  # a value was typed in the moment before the click
        _begin(context.library, request)
        st.rerun()


def _other_clip(job: Job) -> str | None:
    """The name of the clip that is chosen now, if a job is finished and was about another one."""
    file = st.session_state.get("clip")
    if file is None or not job.finished.is_set():
        return None
    kept = st.session_state.get("_light")
    if kept is None or kept[0] != file.file_id:
        kept = file.file_id, Upload(uploads.clean_name(file.name), file.getvalue()).light()
        st.session_state["_light"] = kept
    return None if kept[1] == job.given.clip else kept[1].name


def _subject(job: Job) -> str:
    """What a job explains."""
    if job.given.clip is not None:
        return job.given.clip.name
    count = len(job.given.photos)
    return job.given.photos[0].name if count == 1 else f"{count} photos"


def _nothing_yet() -> None:
    with st.container(border=True):
        st.markdown("**See where a network looks.**")
        st.markdown(
            "1. Choose photos, or a video.\n"
            "2. Choose a network and one or more ways to explain it.\n"
            "3. Press Explain. The maps appear here, side by side."
        )
        st.caption(
            "Photos stay on the machine that runs this viewer. Their metadata are dropped, and "
            "everything is deleted when the viewer stops, unless you keep it as a pack."
        )


# ---------------------------------------------------------------------- controls


def _controls(context: Context, kind: str, job: Job | None) -> Request | None:
    """The widgets; returns what they ask for, None without a network."""
    sent = _photos() if kind == "photos" else _clip()
    name, weights = _backbone()
    if not _wanted(name, weights):
        return None
    head_id = _head(name)
    try:
        with st.spinner("Loading the network", show_time=True):
            if not name:
                raise ModelError("Choose a network.")
            loaded, head = models.network(name, weights, head_id or None)
            allowed, refused = models.explainers(loaded, head)
    except ModelError as error:
        st.error(plain(error))
        return None
    chosen = _explainers(allowed, kind == "photos")
    with st.expander("More choices"):
        classes, top = _classes(loaded, kind == "photos")
        more = _view(kind) if kind == "photos" else {**_view(kind), **_frames()}
        if refused:
            with st.popover(f"{len(refused)} methods do not fit", type="tertiary"):
                st.caption("What this network, or the lack of a head, does not allow:")
                for method, why in refused.items():
                    st.markdown(f"**{plain(method)}**: {plain(why)}")
    busy = job is not None and not job.finished.is_set()
    ready = bool(sent) and bool(chosen) and not busy
    request = Request(
        backbone=name,
        weights=weights,
        head=head_id or None,
        explainers=tuple(chosen),
        photos=tuple(sent) if kind == "photos" else (),
        clip=sent[0] if kind == "clip" and sent else None,
        classes=classes,
        top=top,
        **more,
    )
    st.button(
        "Explain",
        key="explain_now",
        type="primary",
        disabled=not ready,
        width="stretch",
        on_click=_begin,
        args=(context.library, request),
    )
    hint = _hint(bool(sent), bool(chosen), busy, kind, allowed, chosen)
    if hint:
        st.caption(hint)
    refused = st.session_state.pop("_refused", None)
    if refused is not None:
        st.error(plain(refused))
    return request


def _begin(library: Library, request: Request) -> None:
    """Start before the script runs again."""
    try:
        st.session_state["_begun"] = explaining.jobs().start(request, library)
    except ValueError as error:
        st.session_state["_refused"] = str(error)


def _hint(
    sent: bool, chosen: bool, busy: bool, kind: str, allowed: dict[str, int], names: list[str]
) -> str:
    """One line on what is missing, or what the run costs."""
    if busy:
        return "A run is under way. It goes on if you leave or reload this page."
    if not sent:
        return "Choose photos first." if kind == "photos" else "Choose a video first."
    if not chosen:
        return "Choose a method."
    passes = sum(allowed[name] for name in names)
    each = "photo" if kind == "photos" else "frame"
    if passes < 100:
        return ""
    return (
        f"About {passes:,} forward passes a {each}: this takes a while. You can stop at any time."
    )


def _photos() -> list[uploads.Upload]:
    files = st.file_uploader(
        f"Photos, up to {uploads.MAX_PHOTOS}",
        type=uploads.PHOTO_TYPES,
        accept_multiple_files=True,
        key="photos",
        max_upload_size=_megabytes(uploads.MAX_BYTES),
    )
    good, problems = uploads.accept(files)
    if problems:
        _problems(problems, "left out")
    return good


def _clip() -> list[uploads.Upload]:
    file = st.file_uploader(
        "Video",
        type=uploads.CLIP_TYPES,
        key="clip",
        max_upload_size=_megabytes(uploads.MAX_CLIP_BYTES),
    )
    if file is None:
        return []
    try:
        return [uploads.accept_clip(file)]
    except ValueError as error:
        _problems([(uploads.clean_name(file.name), str(error))], "left out")
        return []


def _megabytes(limit: int) -> int:
    """Our limit of bytes, or the server's where that is lower."""
    return min(limit >> 20, int(st.get_option("server.maxUploadSize")))


def _problems(problems: list[uploads.Problem], what: str) -> None:
    """A line a reason, as plain text; who they are in full where a line cannot name them all."""
    names: dict[str, list[str]] = {}
    for name, why in problems:
        names.setdefault(why, []).append(name)
    lines = [f"{_some(found)}: {plain(why)}" for why, found in list(names.items())[:REASONS]]
    if len(names) > REASONS:
        more = sum(map(len, list(names.values())[REASONS:]))
        lines.append(f"and {more} more for other reasons")
    st.warning(f"{len(problems)} {what}:  \n" + "  \n".join(lines))
    if len(names) > REASONS or max(map(len, names.values())) > NAMED:
        with st.expander(f"All {len(problems)} {what}"):
            for why, found in names.items():
                st.markdown(f"{plain(why)}:  \n" + "  \n".join(map(plain, found)))


def _some(names: list[str]) -> str:
    """The first names, and how many more."""
    more = len(names) - NAMED
    return ", ".join(map(plain, names[:NAMED])) + (f" and {more} more" if more > 0 else "")


def _backbone() -> tuple[str, str]:
    names = models.backbones()
    files = models.weight_files()
    name = url_widgets.selectbox(
        "Network",
        names,
        "model",
        accept_new_options=True,
        on_change=_want,
        placeholder="Name of a timm model",
        help="One of the list, or the name of any timm model; its weights then come from the hub.",
    )
    weights = "auto"
    if files:
        weights = url_widgets.selectbox(
            "Weights",
            ["auto", *files],
            "weights",
            format_func=lambda w: "Its own" if w == "auto" else files[w].name,
        )
    return name or "", weights


def _want() -> None:
    """The network was chosen here, by a person."""
    _WANTED.add(st.session_state["model"])


def _wanted(name: str, weights: str) -> bool:
    """Whether the network may be loaded: opening an address alone downloads nothing."""
    if not name or weights != "auto" or name in _WANTED or name in models.backbones():
        return True
    st.info(f"This address asks for {plain(name)}, whose weights come from the hub.")
    st.button("Load it", key="load", on_click=_want)
    return False


def _head(name: str) -> str:
    heads = models.heads(name)
    if not heads:
        return ""
    chosen = url_widgets.selectbox(
        "Head",
        [NO_HEAD, *heads],
        "head",
        default=next(iter(heads)),
        format_func=lambda h: heads.get(h, "None"),
        help="A trained head explains in one pass. One of xattn probe also brings its own classes.",
    )
    return "" if chosen == NO_HEAD else chosen


def _explainers(allowed: dict[str, int], several: bool) -> list[str]:
    names = [n for n in FIRST if n in allowed]
    names += [n for n in allowed if n not in (*FIRST, *SANITY)]
    names += [n for n in SANITY if n in allowed]

    def title(name: str) -> str:
        if name in SANITY:
            return f"{name} (no explanation, to compare with)"
        return f"{name} ({allowed[name]:,} passes)" if allowed[name] > 1 else name

    if several:
        chosen = url_widgets.multiselect(
            "Methods",
            names,
            "explain",
            default=names[:1],
            format_func=title,
            placeholder="Choose one or more",
        )
    else:
        chosen = [url_widgets.selectbox("Method", names, "explain_clip", format_func=title)]
    return chosen


def _classes(loaded: Backbone, several: bool) -> tuple[tuple[int, ...], int]:
    names = loaded.class_names
    classes = st.multiselect(
        "Classes",
        range(len(names)),
        key=f"classes of {loaded.fingerprint}",  # or a browser goes on showing those of another one
        format_func=lambda c: names[c],
        placeholder="The most probable",
        max_selections=5,
        help="Explain these classes in every picture; by default the most probable ones.",
    )
    top = 1
    if several and not classes and len(names) > 1:
        top = st.number_input(
            "How many of the most probable",
            1,
            min(5, len(names)),
            1,
            key="top",
            bind="query-params",
        )
    return tuple(classes), int(top)


def _view(kind: str) -> dict[str, Any]:
    order = list(VIEWS) if kind == "photos" else list(VIEWS)[::-1]
    view = url_widgets.segmented(
        "What the network sees",
        order,
        f"see_{kind}",
        format_func=lambda v: VIEWS[v],
        help="The centre crop is what the network was tested on. The whole picture is squeezed "
        "into its input.",
    )
    return {"view": view}


def _frames() -> dict[str, Any]:
    every = st.number_input("Explain each n-th frame", 1, 1000, 5, key="every", bind="query-params")
    smoothing = st.slider(
        "Smoothing over frames", 0.0, 0.95, 0.0, 0.05, key="smoothing", bind="query-params"
    )
    return {"every": int(every), "smoothing": smoothing}


# ---------------------------------------------------------------------- what came out


def _outcome(context: Context, job: Job) -> None:
    """Progress while the job runs, and then its results."""
    if not job.finished.is_set():
        _follow(job.id)
        return
    if job.message:
        (st.info if job.status == "stopped" else st.error)(plain(job.message))
    for note in job.notes:
        st.info(plain(note))
    if job.problems:
        _problems(job.problems, "left out")
    if job.unsaved:
        _unsaved(job)
    elif job.pack_id is None:
        if not job.message:
            st.error("No photo could be explained.")
    else:
        pack = context.library.open(job.pack_id)
        _summary(context, job, pack)
        if note := blank_maps(pack, pack.entries.index):
            st.warning(plain(note))
        if films.frames(pack):
            _film_of(pack)
        else:
            _pictures(pack)


@st.fragment(run_every=POLL)
def _follow(job_id: str) -> None:
    """The progress of a job, asked for again and again; the whole page runs when it is done."""
    job = explaining.jobs().get(job_id)
    if job is None or job.finished.is_set():
        st.rerun()
    st.progress(job.share, text=plain(_progress_text(job)))
    stopping = job.stopping.is_set()
    st.button(
        "Stopping" if stopping else "Stop",
        key="stop",
        disabled=stopping,
        on_click=explaining.jobs().stop,
        args=(job,),
        help="What is explained until then is kept.",
    )
    if job.wait(POLL / 2):
        st.rerun()


def _progress_text(job: Job) -> str:
    if job.status == "waiting":
        ahead = explaining.jobs().ahead(job)
        return f"Waiting for other runs; {ahead} before this one." if ahead else "Next in line."
    unit = "frames" if job.request.clip else "photos"
    of = f" of {job.total}" if job.total else ""
    return f"{job.done}{of} {unit}: {job.step}"


def _unsaved(job: Job) -> None:
    """The disk was full: the results are in memory."""
    if st.button("Try to write the results again", key="again"):
        try:
            explaining.save_again(job)
        except (ValueError, OSError) as error:
            st.error(plain(reason(error)))
        else:
            job.message = ""
            st.rerun()


def _summary(context: Context, job: Job, pack: Pack) -> None:
    """One line on the run, and what to do with its results."""
    images, maps = len(pack.images), len(pack.entries)
    unit = "frame" if films.frames(pack) else "photo"
    clip = "" if job.given.clip is None else f"{plain(job.given.clip.name)}: "
    line = st.container(horizontal=True, vertical_alignment="center", gap="small")
    line.markdown(
        f"**{clip}{images} {unit}{'s' * (images != 1)}, {maps} map{'s' * (maps != 1)}** "
        f"in {job.seconds:.1f} s",
        width="stretch",
    )
    if line.button("Open in the gallery", key="open", type="tertiary"):
        state.go("gallery", pack=pack.id)
    with line.popover("Keep as a pack"):
        name = st.text_input("Name", key="keep_name", placeholder="my photos", max_chars=80)
        st.caption("Becomes a folder beside the other packs.")
        if st.button("Keep", key="keep", type="primary", disabled=not name.strip()):
            _keep(context, job, name)


def _keep(context: Context, job: Job, name: str) -> None:
    try:
        folder = explaining.keep(job, name)
    except (ValueError, OSError) as error:
        st.error(plain(reason(error)))
        return
    st.success(f"Kept as {plain(folder.name)}.")


def _pictures(pack: Pack) -> None:
    """Photo by photo: the photo, then its maps; those of the first, which the job has drawn, come with
    the page."""
    st.html(legends_html(legends(pack, list(pack.entries.index), Look(side=SIDE))))
    groups = dict(list(pack.entries.groupby("image_id", sort=False)))
    for number, image_id in enumerate(pack.images.index):
        name = pack.images.at[image_id, "title"]
        few = len(groups[image_id]) < FEW  # as wide as the page, in one row
        inline = few and number == 0
        cells: list[dict[str, Any]] = [
            {
                "id": f"{pack.id}/{image_id}",  # of the photo itself, and of this run
                "src": data_uri(photo_bytes(pack, image_id, SIDE))
                if inline
                else photo_url(pack, image_id, SIDE),
                "alt": f"Photo {name}",
                "title": name,
                "href": state.link("image", pack=pack.id, image=image_id),
            }
        ]
        for entry_id, row in groups[image_id].iterrows():
            target = row["target_name"].split(",")[0]
            cells.append(
                {
                    "id": entry_id,
                    "src": data_uri(overlay_bytes(pack, entry_id, Look(side=SIDE)))
                    if inline
                    else overlay_url(pack, entry_id, Look(side=SIDE)),
                    "alt": f"Map by {row['method']} of {target} on {name}",
                    "title": target,
                    "lines": [f"{row['probability']:.1%} · {row['method']}"],
                    "href": state.link("image", pack=pack.id, image=image_id),
                }
            )
        with st.container(key=f"{'few' if few else 'many'}-{number}"):
            opened = grid(
                cells,
                f"live-{number}",
                label=f"Maps of {name}",
                columns=len(cells) if few else None,
                width=100 if few else None,
            )
        if opened is not None:
            entry = opened if opened in pack.entries.index else None
            state.go("image", pack=pack.id, image=image_id, entry=entry)


# ---------------------------------------------------------------------- films


def _film_of_pack(pack: Pack) -> None:
    """The film of the open pack, told apart from results."""
    with st.container(border=True):
        st.markdown(f"**An earlier film, of the pack {plain(pack.name)}**")
        _film_of(pack)


def _film_of(pack: Pack) -> None:
    """The film of a clip's pack, frame by frame."""
    ids = films.frames(pack)
    best = pack.entries.sort_values("probability", ascending=False).groupby("image_id").first()
    titles = [
        f"{pack.images.at[i, 'title']}: {best.at[i, 'target_name'].split(',')[0]}, "
        f"{best.at[i, 'probability']:.1%} ({best.at[i, 'method']})"
        for i in ids
    ]
    start = st.query_params.get("frame", "0")
    key = f"film-{pack.id}"

    def rest() -> None:
        at = film_component.resting(key, len(ids))
        if at is not None:
            st.query_params["frame"] = str(at)

    film_component.film(
        films.frame_url(pack),
        titles,
        key,
        rate=films.rate(pack),
        start=min(int(start), len(ids) - 1) if start.isascii() and start.isdigit() else 0,
        label=f"Frame of {pack.name}",
        on_rest=rest,
    )
    st.html(legends_html(legends(pack, pack.entries.index[:1], Look())))
    st.caption("Space plays and pauses; the arrow keys go from frame to frame.")
