"""The planted cue of detections: only the mark tells a diamond's class, and the study asks for that first."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from xattn.eval.studies import detection_cues as cues


def test_nothing_but_the_mark_tells_the_kinds_of_diamonds_apart():
    for number in range(12):
        one = cues.picture(number)
        assert int(one.labels[0]) == 2 + number % cues.KINDS
        assert torch.equal(one.pixels, cues.picture(number).pixels)
        grey = (one.pixels == one.pixels[:1]).all(0)
        x0, y0, x1, y1 = one.mark
        if number % cues.KINDS == 2:
            assert grey.all()
            continue
        colour = torch.tensor(cues.MARKS[number % cues.KINDS])
        assert torch.equal(one.pixels[:, y0, x0], colour)
        grey[y0:y1, x0:x1] = True
        assert grey.all()
        left, top, right, bottom = one.boxes[0].tolist()
        assert right <= x0 or left >= x1 or bottom <= y0 or top >= y1


class Reader:
    """A detector that reads the colours of the whole picture, or always says the same."""

    def __init__(self, label=None):
        self.label = label

    def best_candidates(self, pixels, most):
        colours = pixels[0] - pixels[2]
        label = 2 if colours.max() > 0.3 else 3 if colours.min() < -0.3 else 4
        return [SimpleNamespace(label=0), SimpleNamespace(label=self.label or label)]


def test_a_class_follows_the_mark_or_does_not():
    for number in (0, 1, 3, 4):
        one = cues.picture(number)
        own = int(one.labels[0])
        assert cues.follows(Reader(), one, own) == (True, True)
        assert cues.follows(Reader(own), one, own) == (False, False)


def test_a_map_is_placed_by_its_maximum_also_outside_the_box():
    one = cues.picture(0)
    x0, y0, x1, y1 = one.mark
    box = one.boxes[0].tolist()
    view = SimpleNamespace(detections=[SimpleNamespace(place=box)])
    values = torch.zeros(1, cues.SIDE, cues.SIDE)
    values[0, int(box[1] + box[3]) // 2, int(box[0] + box[2]) // 2] = 2.0
    values[0, (y0 + y1) // 2, (x0 + x1) // 2] = 1.0
    found = cues.places(values, [d.place for d in view.detections], [one])
    expected = (0, 1, 1, pytest.approx(1 / 3))
    assert tuple(found[column][0] for column in cues.PLACES) == expected


def test_what_is_outside_a_box_begins_at_the_pixel_that_holds_its_edge():
    # The box lies in pixels 20..29, and NEAR pixels around them belong to it.
    mark = SimpleNamespace(mark=(40, 40, 44, 44))
    box = (20.6, 20.6, 29.4, 29.4)
    for place, beside in (
        (20 - cues.NEAR, 1),
        (19 - cues.NEAR, 0),
        (29 + cues.NEAR, 1),
        (30 + cues.NEAR, 0),
    ):
        values = torch.zeros(2, cues.SIDE, cues.SIDE)
        values[0, place, 25] = values[1, 25, place] = 2.0
        values[:, 42, 42] = 1.0
        found = cues.places(values, [box] * 2, [mark] * 2)
        assert found[cues.PLACES[2]] == [beside] * 2


def test_a_detector_that_does_not_read_the_mark_is_not_scored(tmp_path, monkeypatch):
    config = replace(cues.DEFAULTS, pictures=4, steps=1, batch=2)
    monkeypatch.setattr(
        cues, "diamond", lambda detector, pixels: [SimpleNamespace(label=2, score=0.9)]
    )
    with pytest.raises(ValueError, match=r"^config.steps: of 2 classes 0 follow the mark's colour"):
        list(cues.study(tmp_path, config))
    assert not (tmp_path / "report.md").exists()
