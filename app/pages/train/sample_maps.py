"""The maps of the fixed photos of a job: before training, and at the last checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.components import grid
from xattn.app.jobs.jobs import Job
from xattn.app.pictures.rendering import Look, blank_maps, legends, overlay_url, photo_url
from xattn.app.state import Context, plain
from xattn.packs.contained_files import PackError
from xattn.pictures.contact_sheet import legends_html

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


SCALES = {"Shared": "shared", "Each map": "map"}
SIDE = 320


def sample_maps(job: Job, context: Context, best: str | None) -> str | None:
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
