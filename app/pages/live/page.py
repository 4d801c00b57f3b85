"""The live page: explains a person's own photos or clip while they wait, and shows a pack's film."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import components as film_component
from xattn.app import state
from xattn.app.components import grid
from xattn.app.live import queue, uploads
from xattn.app.live.run import SIDE, LiveRun, save_as
from xattn.app.live.uploads import Upload
from xattn.app.navigation import address
from xattn.app.pages.live.controls import begin, controls
from xattn.app.pages.live.photo_files import left_out
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
from xattn.pictures.explained import probability_text
from xattn.runtime.names import count_phrase, reason

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


FEW = 3  # pictures that fit beside each other on a phone
POLL = 0.5  # seconds


def outcome(context: Context, run: LiveRun) -> None:
    """Show the run's progress, and then its results."""
    if not run.finished.is_set():
        _follow(run.id)
        return
    if run.message:
        (st.info if run.status == "stopped" else st.error)(plain(run.message))
    for note in run.notes:
        st.info(plain(note))
    if run.problems:
        left_out(run.problems, "left out")
    if run.unsaved:
        _unsaved(run)
    elif run.pack_id is None:
        if not run.message:
            st.error("No photo could be explained.")
    else:
        pack = context.library.open(run.pack_id)
        _summary(run, pack)
        if note := blank_maps(pack, pack.entries.index, pack.images["title"].__getitem__):
            st.warning(plain(note))
        if films.frames(pack):
            _film_of(pack)
        else:
            _pictures(pack)


@st.fragment(run_every=POLL)
def _follow(run_id: str) -> None:
    """Show and refresh the progress of a run; the whole page runs again when it is done."""
    run = queue.live_queue().get(run_id)
    if run is None or run.finished.is_set():
        st.rerun()
    st.progress(run.share, text=plain(_progress_text(run)))
    stopping = run.stopping.is_set()
    st.button(
        "Stopping" if stopping else "Stop",
        key="stop",
        disabled=stopping,
        on_click=queue.live_queue().stop,
        args=(run,),
        help="All maps made until then are kept.",
    )
    if run.wait(POLL / 2):
        st.rerun()


def _progress_text(run: LiveRun) -> str:
    if run.status == "waiting":
        ahead = queue.live_queue().ahead(run)
        return f"Waiting for other runs: {ahead} before this one." if ahead else "Next in line."
    unit = "frames" if run.request.clip else "photos"
    of = f" of {run.total}" if run.total else ""
    return f"{run.done}{of} {unit}: {run.step}"


def _unsaved(run: LiveRun) -> None:
    """Offer to write results that are only in memory because the disk was full."""
    if st.button("Try to write the results again", key="again"):
        try:
            queue.retry_save(run)
        except (ValueError, OSError) as error:
            st.error(plain(reason(error)))
        else:
            run.message = ""
            st.rerun()


def _summary(run: LiveRun, pack: Pack) -> None:
    """Show one line about the run, and actions for its results."""
    images, maps = len(pack.images), len(pack.entries)
    unit = "frame" if films.frames(pack) else "photo"
    clip = "" if run.given.clip is None else f"{plain(run.given.clip.name)}: "
    line = st.container(horizontal=True, vertical_alignment="center", gap="small")
    line.markdown(
        f"**{clip}{count_phrase(images, unit)}, {count_phrase(maps, 'map')}** in {run.seconds:.1f} s",
        width="stretch",
    )
    if line.button("Open in the gallery", key="open", type="tertiary"):
        state.go("gallery", pack=pack.id)
    if line.button("What if", key="live_whatif", type="tertiary", help="Hide a part of the photo"):
        state.go("whatif", pack=pack.id, image=str(pack.images.index[0]))
    with line.popover("Keep as a pack"):
        name = st.text_input("Name", key="keep_name", placeholder="my photos", max_chars=80)
        st.caption("It is saved as a folder beside the other packs.")
        if st.button("Keep", key="keep", type="primary", disabled=not name.strip()):
            _keep(run, name)


def _keep(run: LiveRun, name: str) -> None:
    try:
        folder = save_as(run, name)
    except (ValueError, OSError) as error:
        st.error(plain(reason(error)))
        return
    st.success(f"Kept as {plain(folder.name)}.")


def _pictures(pack: Pack) -> None:
    """Show each photo followed by its maps. The maps of the first photo, which the run has drawn, are
    embedded in the page."""
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
                    "alt": f"Map by {pack.title_of(row['method'])} of {target} on {name}",
                    "title": target,
                    "lines": [
                        probability_text(row["probability"], row["is_value"]),
                        pack.title_of(row["method"]),
                    ],
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


def show_pack_film(pack: Pack) -> None:
    """Show the film of the open pack, separately from results."""
    with st.container(border=True):
        st.markdown(f"**An earlier film, of the pack {plain(pack.name)}**")
        _film_of(pack)


def _film_of(pack: Pack) -> None:
    """Show the film of a clip's pack, frame by frame."""
    ids = films.frames(pack)
    best = pack.entries.sort_values("probability", ascending=False).groupby("image_id").first()
    titles = [
        f"{pack.images.at[i, 'title']}: {best.at[i, 'target_name'].split(',')[0]}, "
        f"{probability_text(best.at[i, 'probability'], best.at[i, 'is_value'])} "
        f"({pack.title_of(best.at[i, 'method'])})"
        for i in ids
    ]
    start = st.query_params.get("frame", "0")
    key = f"film-{pack.id}"

    def rest() -> None:
        at = film_component.stopped_frame(key, len(ids))
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
    st.html(legends_html(legends(pack, pack.entries.index[:1], Look(scale="map"))))
    st.caption("Space plays and pauses; the arrow keys go from frame to frame.")


QUICK = 0.8  # seconds to wait for a short run before showing progress
INPUTS = {"photos": "Photos", "clip": "Video"}
STYLE = """
<style>[class*="st-key-few-"]{max-width:960px}</style>
"""


def page(context: Context) -> None:
    """Show the controls on the left and the results on the right."""
    st.html(STYLE)
    st.title("Explain your own photos", anchor=False)
    _body(context)


@st.fragment
def _body(context: Context) -> None:
    """The whole page as a fragment, which runs again without the rest of the script."""
    try:
        _both_sides(context)
    except ValueError as error:
        st.error(plain(error))


def _both_sides(context: Context) -> None:
    """Run the results before the controls, since people wait for the results."""
    left, right = st.columns([1, 2], gap="large")
    with left:
        kind = address.segmented(
            "Input",
            INPUTS,
            "input",
            label_visibility="collapsed",
        )
    given = st.query_params.get("job")
    begun: LiveRun | None = st.session_state.pop("_begun", None)
    run = begun or queue.live_queue().get(given or st.session_state.get("_job"))
    if begun is not None:
        st.query_params.pop("frame", None)  # belongs to the previous film
        begun.wait(QUICK)
    if run is not None:
        st.session_state["_job"] = run.id
        if given != run.id:
            st.query_params["job"] = run.id
    with right:
        earlier = st.empty()
        if run is not None:
            outcome(context, run)
        elif given is not None:
            st.info(
                "The results of this address are gone: they are kept until the viewer stops or "
                "many later runs have replaced them. Explain the photos again; to keep results, "
                "save them as a pack."
            )
        else:
            _nothing_yet()
            if kind == "clip" and context.pack is not None and films.frames(context.pack):
                show_pack_film(context.pack)
    with left:
        request = controls(context, kind, run)
    other = None if run is None or kind != "clip" else _other_clip(run)
    if run is not None and other is not None:
        shown = _subject(run)
        which = f"another file named {plain(shown)}" if shown == other else plain(shown)
        chosen = "the chosen one" if shown == other else plain(other)
        earlier.info(
            f"These are the results of {which}. Press Explain for the results of {chosen}."
        )
    if begun is not None and request is not None and begun.given != request.without_bytes():
        queue.live_queue().stop(begun)  # a value was typed in the moment before the click
        begin(context.library, request)
        st.rerun()


def _other_clip(run: LiveRun) -> str | None:
    """The name of the clip that is chosen now, if the finished run explained another one."""
    file = st.session_state.get("clip")
    if file is None or not run.finished.is_set():
        return None
    kept = st.session_state.get("_light")
    if kept is None or kept[0] != file.file_id:
        kept = file.file_id, Upload(uploads.clean_name(file.name), file.getvalue()).without_bytes()
        st.session_state["_light"] = kept
    return None if kept[1] == run.given.clip else kept[1].name


def _subject(run: LiveRun) -> str:
    """The name of what a run explains."""
    if run.given.clip is not None:
        return run.given.clip.name
    count = len(run.given.photos)
    return run.given.photos[0].name if count == 1 else f"{count} photos"


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
