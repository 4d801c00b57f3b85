"""What a viewer without a pack shows: what xattn is for, an example, and three ways to begin."""

from __future__ import annotations

import shlex

import streamlit as st

from xattn.app import state
from xattn.app.demo import example, pack_offer
from xattn.app.pages.live.photo_files import hand_over, photo_uploader
from xattn.app.state import Context, plain

AIM = "See what an image classifier looks at, and measure which explanation to trust."


def page(context: Context) -> None:
    """The first run: no pack that opens."""
    st.title(AIM, anchor=False)
    st.html(example.html())
    doors = st.columns(3, gap="medium")
    # What is installed takes a moment to find out, so the demo comes last.
    for i, part in ((0, _photo), (2, _own), (1, _demo)):
        with doors[i], st.container(border=True, height="stretch"):
            part()
    for info in context.library.packs():
        if info.problem is not None:
            st.warning(f"**{plain(info.name)}**  \n{plain(info.problem)}")


def _photo() -> None:
    st.subheader("Drop a photo", anchor=False)
    st.markdown("A network that is installed explains it while you wait.")
    good, whole = photo_uploader("Photos", "first photos", label_visibility="collapsed")
    if good and (whole or st.button("Explain the others")):
        hand_over(good)
        state.go("live")


def _demo() -> None:
    st.subheader("Look around", anchor=False)
    if state.settings().training:
        pack_offer.offer(f"Make a demo pack {pack_offer.WITH}")
        return
    st.markdown("Jobs are off in this viewer. Its owner can start it with the demo:")
    st.code(
        f"xattn app {shlex.quote(str(state.settings().local_root))} --demo",
        language="sh",
        wrap_lines=True,
    )


def _own() -> None:
    st.subheader("Your data", anchor=False)
    st.markdown("A pack is a folder of photos with their maps. Make one of your own photos:")
    output = state.settings().root / "first"
    st.code(
        f"xattn explain PHOTOS --output {shlex.quote(str(output))}", language="sh", wrap_lines=True
    )
    st.caption("This page shows it as soon as you reload.")
