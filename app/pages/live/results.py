"""What a run gave: its progress, its maps or its film, and keeping them as a pack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.components import film as film_component
from xattn.app.components import grid
from xattn.app.live import queue, saving
from xattn.app.live.run import SIDE, LiveRun
from xattn.app.pages.live.left_out import left_out
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
from xattn.runtime.display_text import reason

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


FEW = 3  # pictures that fit beside each other on a phone
POLL = 0.5  # seconds


def outcome(context: Context, run: LiveRun) -> None:
    """Progress while the run runs, and then its results."""
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
        _summary(context, run, pack)
        if note := blank_maps(pack, pack.entries.index, pack.images["title"].__getitem__):
            st.warning(plain(note))
        if films.frames(pack):
            _film_of(pack)
        else:
            _pictures(pack)


@st.fragment(run_every=POLL)
def _follow(run_id: str) -> None:
    """The progress of a run, asked for again and again; the whole page runs when it is done."""
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
        help="What is explained until then is kept.",
    )
    if run.wait(POLL / 2):
        st.rerun()


def _progress_text(run: LiveRun) -> str:
    if run.status == "waiting":
        ahead = queue.live_queue().ahead(run)
        return f"Waiting for other runs; {ahead} before this one." if ahead else "Next in line."
    unit = "frames" if run.request.clip else "photos"
    of = f" of {run.total}" if run.total else ""
    return f"{run.done}{of} {unit}: {run.step}"


def _unsaved(run: LiveRun) -> None:
    """The disk was full: the results are in memory."""
    if st.button("Try to write the results again", key="again"):
        try:
            queue.save_again(run)
        except (ValueError, OSError) as error:
            st.error(plain(reason(error)))
        else:
            run.message = ""
            st.rerun()


def _summary(context: Context, run: LiveRun, pack: Pack) -> None:
    """One line on the run, and what to do with its results."""
    images, maps = len(pack.images), len(pack.entries)
    unit = "frame" if films.frames(pack) else "photo"
    clip = "" if run.given.clip is None else f"{plain(run.given.clip.name)}: "
    line = st.container(horizontal=True, vertical_alignment="center", gap="small")
    line.markdown(
        f"**{clip}{images} {unit}{'s' * (images != 1)}, {maps} map{'s' * (maps != 1)}** "
        f"in {run.seconds:.1f} s",
        width="stretch",
    )
    if line.button("Open in the gallery", key="open", type="tertiary"):
        state.go("gallery", pack=pack.id)
    if line.button("What if", key="live_whatif", type="tertiary", help="Hide a part of the photo"):
        state.go("whatif", pack=pack.id, image=str(pack.images.index[0]))
    with line.popover("Keep as a pack"):
        name = st.text_input("Name", key="keep_name", placeholder="my photos", max_chars=80)
        st.caption("Becomes a folder beside the other packs.")
        if st.button("Keep", key="keep", type="primary", disabled=not name.strip()):
            _keep(context, run, name)


def _keep(context: Context, run: LiveRun, name: str) -> None:
    try:
        folder = saving.keep(run, name)
    except (ValueError, OSError) as error:
        st.error(plain(reason(error)))
        return
    st.success(f"Kept as {plain(folder.name)}.")


def _pictures(pack: Pack) -> None:
    """Photo by photo: the photo, then its maps; those of the first, which the run has drawn, come with
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
                    "lines": [
                        f"{probability_text(row['probability'], row['is_value'])} · {row['method']}"
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


def film_of_pack(pack: Pack) -> None:
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
        f"{probability_text(best.at[i, 'probability'], best.at[i, 'is_value'])} "
        f"({best.at[i, 'method']})"
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
