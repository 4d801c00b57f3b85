"""Lists on the page Mistakes: labels that are probably wrong, duplicates, and shortcuts with a way to mend
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import streamlit as st
from numpy.typing import NDArray

from xattn.app import state
from xattn.app.components import download, grid, sent_value
from xattn.app.navigation import address, chosen, last_view
from xattn.app.pages.photomap.data import (
    class_button,
    correctness,
    name_list,
    photos,
    photos_grid,
    pooled_maps,
    rows_of,
)
from xattn.app.pages.photomap.data import summary as summary_of
from xattn.app.pages.photomap.page import GROUP, card, chosen_group
from xattn.app.state import cache_by_version, plain, short
from xattn.app.triage.selection import View
from xattn.app.triage.selection_files import csv_lines, list_lines
from xattn.app.triage.tag_files import Person
from xattn.eval.report.data_issues.duplicates import (
    KINDS,
    Pair,
    Picture,
    find_duplicates,
    groups,
)
from xattn.eval.report.data_issues.label_errors import (
    LabelErrors,
    LabelledPhotos,
    find_label_errors,
    labelled_photos,
)
from xattn.eval.report.data_issues.last_layer import (
    FOLDS,
    GroupRow,
    RetrainResult,
    held_out_probabilities,
    retrain,
    split_by,
)
from xattn.eval.report.data_issues.shortcuts import Shortcut, find_shortcuts
from xattn.eval.report.photo_map.cache import load_or_make as on_disk
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

PREFIX = "issues."
SHORTCUTS = f"{PREFIX}shortcuts"
MOST_CARDS = 12
CHANCE = 0.05  # a group with a lower p is marked
AT_ONCE = 2000  # of more photos, duplicates are searched for only on request
MOST_FITTED = 3e8  # photos x features x classes for which a last layer is fitted
SOURCES = {
    "network": "The network's own",
    "held-out": "A new last layer, cross-validated",
}


class PhotoList(NamedTuple):
    """A list of photos to show and to export: their indices, and a line of the CSV for each."""

    name: str
    rows: list[int]
    header: tuple[str, ...]
    lines: list[tuple[Any, ...]]


# ---------------------------------------------------------------------- label errors


def label_errors_tab(pack: Pack, method: str) -> None:
    """Show the photos whose label is probably wrong."""
    labelled = _labelled(pack)
    sources = _sources(pack, labelled)
    if not sources:
        st.info(
            "The pack stores no probabilities of its photos, and no features to compute them from."
        )
        return
    by = next(iter(sources))
    if len(sources) > 1:
        by = address.selectbox("Probabilities", sources, "by", width=300)
    found = _label_errors(pack, by)
    labels = _names(labelled)
    share = 1 - float(np.trace(found.joint))
    st.markdown(
        plain(
            f"{count_phrase(len(found.rows), 'label')} of {len(labelled.rows):,} "
            f"{'is' if len(found.rows) == 1 else 'are'} probably wrong; estimated share of wrong labels "
            f"{share:.1%}."
        )
    )
    note = (
        "They are the probabilities that the pack stores. If the network learned these very labels, choose "
        "the new last layer."
        if by == "network"
        else "Each photo is judged by a last layer that was fitted on other photos."
    )
    st.caption(
        "A photo is listed if the class that the probabilities point to is not its label (confident "
        f"learning, arXiv 1911.00068). The largest contradiction comes first. {note}"
    )
    if not len(found.rows):
        return
    rows = [int(labelled.rows[i]) for i in found.rows]
    suggested = [labels[found.suggested[i]] for i in found.rows]
    scores = [float(found.score[i]) for i in found.rows]
    images = photos(pack, method).loc[rows]
    lines = [
        (image_id, title, label, name, f"{score:.4f}")
        for image_id, title, label, name, score in zip(
            images["image_id"],
            images["title"],
            images["label_name"],
            suggested,
            scores,
            strict=True,
        )
    ]
    header = ("image_id", "file", "label", "suggested", "margin")
    _exports(pack, method, PhotoList("label-errors", rows, header, lines))
    photos_grid(
        pack,
        rows,
        method,
        f"{PREFIX}labels",
        "Photos whose label is probably wrong, the most suspicious first",
        lambda n: f"suggested: {short(suggested[n])}",
    )


@cache_by_version(4)
def _labelled(pack: Pack) -> LabelledPhotos:
    return labelled_photos(pack, rows_of(pack))


def _names(labelled: LabelledPhotos) -> list[str]:
    return [labelled.names[int(number)] for number in labelled.classes]


def _sources(pack: Pack, labelled: LabelledPhotos) -> dict[str, str]:
    """Where probabilities can come from."""
    own = ["network"] if labelled.probabilities is not None else []
    counts = np.bincount(labelled.labels)
    counts = counts[counts > 0]
    if pack.has_features and len(counts) > 1 and counts.min() >= 2:
        features = _features(pack)
        if len(labelled.rows) * features.shape[1] * len(counts) <= MOST_FITTED:
            own.append("held-out")
    return {key: SOURCES[key] for key in own}


@cache_by_version(2)
def _features(pack: Pack) -> NDArray[np.float16]:
    found = pack.features()
    assert found is not None, "asked for where the pack has features"
    return found


@cache_by_version(8, "The labels are being checked")
def _label_errors(pack: Pack, by: str) -> LabelErrors:
    labelled = _labelled(pack)
    if by == "network":
        assert labelled.probabilities is not None, "a source only if there are some"
        return find_label_errors(labelled.probabilities, labelled.labels)
    features = _features(pack)[labelled.rows].astype(np.float64)
    own, labels = np.unique(labelled.labels, return_inverse=True)  # others cannot be learned
    probabilities = np.zeros((len(labels), len(labelled.classes)))
    probabilities[:, own] = held_out_probabilities(features, labels, len(own))
    return find_label_errors(probabilities, labelled.labels)


# ---------------------------------------------------------------------- duplicates


def duplicates_tab(pack: Pack, method: str) -> None:
    """Show groups of photos that show the same picture."""
    count = len(rows_of(pack))
    asked = f"{PREFIX}search {pack.id} {pack.version}"
    if count > AT_ONCE and not st.session_state.get(asked):
        st.button(
            f"Search {count:,} photos for duplicates",
            key=f"{PREFIX}search",
            on_click=lambda: st.session_state.update({asked: True}),
            help="Takes about a minute per 5,000 photos; the result is kept.",
        )
        return
    pairs = _duplicates(pack)
    own = photos(pack, method)
    if not pairs:
        st.info("There are no duplicates among these photos.")
        return
    rows = rows_of(pack)
    names = own["label_name"].tolist()
    found = groups(pairs)
    mixed = [len({names[i] for i in group if isinstance(names[i], str)}) > 1 for group in found]
    found = [
        group for _, group in sorted(zip(mixed, found, strict=True), key=lambda one: not one[0])
    ]
    best = _best(pairs)
    text = f"{count_phrase(len(found), 'group')} of {sum(map(len, found)):,} photos"
    if any(mixed):
        text += f"; {sum(mixed):,} with different labels, which come first"
    st.markdown(text + ".")
    kinds = Counter(pair.kind for pair in pairs)
    st.caption(
        plain("Pairs: " + ", ".join(f"{KINDS[k]} ({n:,})" for k, n in kinds.most_common()) + ".")
    )
    order, lines, notes = [], [], []
    for number, group in enumerate(found, 1):
        for i in group:
            image = own.iloc[i]
            order.append(int(rows[i]))
            known = (image["image_id"], image["title"], image["label_name"])
            lines.append((number, *known, best[i].kind, f"{best[i].agreement:.4f}"))
            notes.append(f"group {number}: {KINDS[best[i].kind]}")
    header = ("group", "image_id", "file", "label", "kind", "agreement")
    _exports(pack, method, PhotoList("duplicates", order, header, lines))
    photos_grid(
        pack, order, method, f"{PREFIX}duplicates", "Duplicates by group", notes.__getitem__
    )


@cache_by_version(4, "The photos are being compared")
def _duplicates(pack: Pack) -> list[Pair]:
    """Pairs of photos on the map by their position there."""

    def search() -> dict[str, NDArray[Any]]:
        rows = rows_of(pack)
        names = [pack.image_ids[int(row)] for row in rows]
        shown = [
            Picture.of(pack.photo(name), pack.photo_bytes(name)) if pack.has_photo(name) else None
            for name in names
        ]
        known = [i for i, picture in enumerate(shown) if picture is not None]
        features = _features(pack)[rows[known]] if pack.has_features and known else None
        found = find_duplicates([p for p in shown if p is not None], features)
        return {
            "pairs": np.array([(known[p.first], known[p.second]) for p in found]).reshape(-1, 2),
            "kinds": np.array([list(KINDS).index(p.kind) for p in found], np.int64),
            "agreement": np.array([p.agreement for p in found]),
        }

    stored = on_disk(pack.version, f"duplicates, {len(rows_of(pack))}", search)
    kinds = list(KINDS)
    each = zip(stored["pairs"], stored["kinds"], stored["agreement"], strict=True)
    return [Pair(int(p[0]), int(p[1]), kinds[int(k)], float(a)) for p, k, a in each]


def _best(pairs: Sequence[Pair]) -> dict[int, Pair]:
    """The pair with the highest agreement of each photo."""
    found: dict[int, Pair] = {}
    for pair in pairs:
        found.setdefault(pair.first, pair)
        found.setdefault(pair.second, pair)
    return found


# ---------------------------------------------------------------------- shortcuts


def shortcuts_tab(pack: Pack, method: str) -> None:
    """Show groups of photos on which the network looks at a place where it does not look on the other
    photos of the class."""
    found = _shortcuts(pack, method)[:MOST_CARDS]
    if not found:
        st.info("There are no groups: at least three photos need maps that are not constant.")
        return
    st.caption(
        "Groups of photos on which the network looks at the same place. Those come first where the rest of "
        "the class looks elsewhere: this may be a shortcut, such as a watermark. p is the probability of "
        "such a group if where the network looks had nothing to do with the class."
    )
    chosen = chosen_group(len(found))
    grid(
        [_card(pack, one, i, method, i == chosen) for i, one in enumerate(found)],
        SHORTCUTS,
        label="Groups of photos",
        width=150,
        aspect=1,
        on_open=_opened,
    )
    one = found[chosen]
    st.subheader(plain(f"Group {chosen + 1}: {one.group.place}"), anchor=False)
    rows = [int(row) for row in pooled_maps(pack, method)[0][one.group.rows]]
    st.markdown(summary_of(pack, rows, method))
    st.caption(
        plain(
            f"p = {one.p:.3f} by permutation of the classes, corrected for the number of groups. "
            f"{one.edge:.0%} of the mean map lies near the photo's edge (75 % would be even)."
        )
    )
    images = photos(pack, method).loc[rows]
    columns = ("image_id", "title", "label_name", "predicted_name")
    lines = [(chosen + 1, *line) for line in images[list(columns)].itertuples(index=False)]
    header = ("group", "image_id", "file", "label", "predicted")
    _exports(pack, method, PhotoList(f"group-{chosen + 1}", rows, header, lines))
    class_button(pack, rows, method, f"{PREFIX}class")
    _mending(pack, rows)
    photos_grid(pack, rows, method, f"{PREFIX}group", "Photos of the group, the most typical first")


@cache_by_version(8, "The maps are being grouped and tested")
def _shortcuts(pack: Pack, method: str) -> list[Shortcut]:
    rows, values = pooled_maps(pack, method)
    own = photos(pack, method).loc[rows]
    return find_shortcuts(values, name_list(own["predicted_name"]), correctness(own["right"]))


def _opened() -> None:
    opened = sent_value(SHORTCUTS, "open")
    if isinstance(opened, str):
        st.query_params[GROUP] = opened
        st.session_state.pop(f"{PREFIX}group.page", None)


def _card(pack: Pack, one: Shortcut, number: int, method: str, selected: bool) -> dict[str, Any]:
    href = state.link("mistakes", pack=pack.id, method=method, group=number + 1, table="Shortcuts")
    found = card(one.group, number, selected, href)
    badge = {"text": "Unlikely by chance", "kind": "plain"} if one.p <= CHANCE else None
    return found | {"badge": badge, "lines": [*found["lines"], f"p = {one.p:.3f}"]}


# ---------------------------------------------------------------------- mend


def _mending(pack: Pack, rows: Sequence[int]) -> None:
    """Offer to retrain the last layer so that photos in the group and outside count the same."""
    labelled = _labelled(pack)
    if "held-out" not in _sources(pack, labelled):
        return
    inside = np.isin(labelled.rows, rows)
    parts = split_by(labelled.labels, inside)
    if not (parts % 2).any() or np.unique(parts, return_counts=True)[1].min() < FOLDS:
        return
    with st.expander("Mend: retrain the last layer", on_change="rerun", key=f"{PREFIX}mend") as box:
        if not box.open:
            return
        found = _mended(pack, tuple(rows))
        names = _names(labelled)
        table = pd.DataFrame(
            [_mend_line(row, names) for row in found.groups] + [_mend_line(found.mean, names)]
        )
        st.dataframe(table, hide_index=True, width="stretch")
        before, after = found.worst
        st.markdown(plain(f"Worst group: {before:.1%} before, {after:.1%} after."))
        st.caption(
            "Two last layers are fitted on the stored features: one on the photos as they are, one with "
            "equal weight for each class inside and outside the group. Both are tested on photos that "
            f"they did not see ({FOLDS} folds). The network itself is not changed."
        )


@cache_by_version(8, "The last layer is being retrained")
def _mended(pack: Pack, rows: tuple[int, ...]) -> RetrainResult:
    labelled = _labelled(pack)
    features = _features(pack)[labelled.rows].astype(np.float64)
    parts = split_by(labelled.labels, np.isin(labelled.rows, rows))
    return retrain(features, np.unique(labelled.labels, return_inverse=True)[1], parts)


def _mend_line(row: GroupRow, names: Sequence[str]) -> dict[str, Any]:
    label, inside = divmod(row.group, 2)
    name = "all" if row.group < 0 else f"{short(names[label])}{', in the group' if inside else ''}"
    before, after = row.before.percent(), row.after.percent()
    return {
        "photos of": name,
        "photos": row.photos,
        "right before, %": before.text(1),
        "right after, %": after.text(1),
        "difference": row.gain.percent().text(1),
    }


# ---------------------------------------------------------------------- files


def _exports(pack: Pack, method: str, listed: PhotoList) -> None:
    """Offer the list as files, and its photos as chosen photos in the gallery."""
    ids = photos(pack, method).loc[listed.rows, "image_id"].tolist()
    bar = st.container(horizontal=True, gap="small")
    key = f"{PREFIX}{listed.name}"
    download(bar, "CSV", lambda: csv_text(listed), f"{pack.id}-{listed.name}.csv", f"{key} csv")
    download(
        bar, "List of photos", lambda: paths(ids), f"{pack.id}-{listed.name}.txt", f"{key} list"
    )
    bar.button(
        f"Choose {'them' if len(ids) > 1 else 'it'} in the gallery",
        key=f"{key} choose",
        on_click=_choose,
        args=(pack, method, ids),
        help="There they can be tagged, rated, noted and exported as a pack.",
    )


def csv_text(listed: PhotoList) -> str:
    """The list as CSV."""
    return csv_lines([listed.header, *listed.lines])


def paths(ids: Sequence[str]) -> str:
    """The photos as a list for ``xattn explain``, in the given order."""
    return "\n".join(list_lines(ids)) + "\n"


def _choose(pack: Pack, method: str, ids: Sequence[str]) -> None:
    chosen.choose(Person.of(pack), chosen.chosen_photos(pack), list(ids))
    last_view.to_gallery(pack, View(method=method, only=chosen.digest(pack)))
