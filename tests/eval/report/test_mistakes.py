"""Confusion, rows of classes, slices and mean maps of a pack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_explanations import make

from xattn.eval.report.mistakes import (
    OTHERS,
    calibration_error,
    class_rows,
    confusion,
    mean_map,
    slice_row,
)
from xattn.packs.explanation import ImageFacts
from xattn.packs.reader import Pack
from xattn.packs.writer import save_pack

pytest.importorskip("pandas")
METRICS = {"AD": {"higher_is_better": False, "formula": "", "protocol_id": "one"}}
NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture
def pack_of(tmp_path):
    def save(pairs, **options):
        """A photo for each (true, predicted, confidence); None for what is not known."""
        explanations = []
        for i, (true, predicted, p) in enumerate(pairs):
            top = () if predicted is None else ((predicted, NAMES[predicted], p),)
            facts = ImageFacts(top, true, None if true is None else NAMES[true])
            made = make(
                image_id=f"photo-{i}", seed=i, facts=facts, metrics={"AD": i / 10}, **options
            )
            explanations.append(made)
        save_pack(tmp_path / "pack", explanations, overlays=False, metrics=METRICS)
        return Pack(tmp_path / "pack", trusted=True)

    return save


PAIRS = [(0, 0, 0.9), (0, 1, 0.8), (1, 1, 0.7), (2, 0, 0.6), (0, 0, 0.5), (None, 0, 0.4)]


def test_cells_hold_the_photos_that_they_count(pack_of):
    found = confusion(pack_of(PAIRS))
    assert found.classes == ((0, "ant"), (1, "bee"), (2, "cat")) and found.unknown == 1
    assert found.counts.tolist() == [[2, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert found.photos[0, 0] == ("photo-0", "photo-4") and found.photos[2, 0] == ("photo-3",)
    assert {cell: len(ids) for cell, ids in found.photos.items()} == {
        (i, j): n for (i, j), n in np.ndenumerate(found.counts) if n
    }


def test_rare_classes_are_folded_and_no_photo_is_lost(pack_of):
    found = confusion(pack_of(PAIRS), most=1)
    assert found.classes == ((0, "ant"), (None, OTHERS))
    assert found.counts.tolist() == [[2, 1], [1, 1]]


def test_a_class_has_its_accuracy_its_confidence_and_its_metrics(pack_of):
    ant, cat, bee = class_rows(pack_of(PAIRS))
    assert [row.name for row in (ant, cat, bee)] == ["ant", "cat", "bee"]
    assert ant.photos == ("photo-0", "photo-1", "photo-4")
    assert ant.accuracy.mean == pytest.approx(2 / 3) and ant.accuracy.n == 3
    assert ant.confidence.mean == pytest.approx(2.2 / 3)
    assert ant.overconfidence.mean == pytest.approx(0.2 / 3)
    assert ant.metrics["AD"].mean == pytest.approx((0 + 0.1 + 0.4) / 3)
    assert cat.accuracy.mean == 0 and cat.overconfidence.mean == pytest.approx(0.6)


def test_a_slice_counts_what_is_known(pack_of):
    row = slice_row(pack_of(PAIRS), "some", ["photo-0", "photo-1", "photo-5"])
    assert (row.photos, row.known, row.accuracy.mean) == (3, 2, 0.5)
    assert row.ece == pytest.approx((0.1 + 0.8) / 2)
    assert row.metrics["AD"].n == 3


def test_slices_without_photos_or_of_another_pack_are_refused(pack_of):
    pack = pack_of(PAIRS)
    with pytest.raises(ValueError, match=r"^photos: the slice 'none' is empty"):
        slice_row(pack, "none", [])
    with pytest.raises(ValueError, match=r"^photos: 'stranger' in the slice 'some' is not in this"):
        slice_row(pack, "some", ["stranger"])


def test_calibration_is_that_of_torchmetrics():
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.02, 0.98, 300)
    right = (rng.uniform(size=300) < confidence).astype(float)
    theirs = binary_calibration_error(
        torch.tensor(confidence), torch.tensor(right), n_bins=15, norm="l1"
    )
    assert calibration_error(confidence, right) == pytest.approx(float(theirs), abs=1e-6)
    bins = np.ceil(15 * confidence)
    gaps = [abs((right - confidence)[bins == b].sum()) for b in range(1, 16)]
    assert calibration_error(confidence, right) == pytest.approx(sum(gaps) / 300, abs=1e-6)


def test_without_labels_there_is_nothing_to_tell(pack_of):
    pack = pack_of([(None, 0, 0.5)])
    assert confusion(pack).classes == () and confusion(pack).unknown == 1
    assert class_rows(pack) == []


def test_the_mean_of_one_map_is_that_map(tmp_path):
    corner = np.zeros((28, 28), np.float32)
    corner[:4, :4] = 3.0
    one = replace(make(image_id="a"), map=corner)
    other = replace(make(image_id="b"), map=corner[::-1])
    save_pack(tmp_path / "pack", [one, other], overlays=False)
    pack = Pack(tmp_path / "pack", trusted=True)
    assert np.allclose(mean_map(pack, [one.id]), corner / 3)
    both = mean_map(pack, [one.id, other.id])
    assert both[0, 0] == both[-1, 0] == 0.5 and both[14, 14] == 0
    with pytest.raises(ValueError, match=r"^entry_ids: got none"):
        mean_map(pack, [])
