"""The first page of a viewer without packs: what xattn is for, an example, and three ways to start.

The example shows a photo from scikit-image and where a network looks in it, drawn by
``tests/draw_example.py``.
"""

from __future__ import annotations

import base64
import html as markup
import shlex
from importlib import resources

import streamlit as st

from xattn.app import state
from xattn.app.components import command, explain_command
from xattn.app.pages import demo_offer
from xattn.app.pages.live.photo_files import hand_over, photo_uploader
from xattn.app.state import Context, plain

TEXT = (
    "A photo, and where EfficientNet-Lite0 finds its evidence for tiger cat: the brighter, the more "
    "evidence."
)


def html() -> str:
    """The example picture with its caption, as HTML."""
    data = base64.b64encode(
        (resources.files("xattn.app.demo") / "example.jpg").read_bytes()
    ).decode("ascii")
    text = markup.escape(TEXT)
    return (
        f'<figure class="example"><img alt="{text}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


AIM = "See what an image classifier looks at, and measure which explanation to trust."


def page(context: Context) -> None:
    """Show the first page, because there is no pack that opens."""
    st.title(AIM, anchor=False)
    st.html(html())
    doors = st.columns(3, gap="medium")
    # Finding out what is installed takes a moment, so the demo comes last.
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
        demo_offer.show_offer(f"Make a demo pack {demo_offer.WITH}")
        return
    st.markdown("Jobs are off in this viewer. Whoever runs it can start it with the demo:")
    command(f"xattn app {shlex.quote(str(state.settings().local_root))} --demo")


def _own() -> None:
    st.subheader("Your data", anchor=False)
    st.markdown("A pack is a folder of photos with their maps. Make one of your own photos:")
    explain_command("first")
    st.caption(
        "PHOTOS is a folder with a subfolder for each class; without classes, leave out --labels and "
        "--classes. This page shows the pack as soon as you reload."
    )
