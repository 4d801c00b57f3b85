"""Two packs of the same photos: what became right or wrong, which maps moved, and metrics in pairs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from small_explanations import make, photo

from xattn.cli import main
from xattn.eval.report.pack_differences import compare_packs, difference_lines
from xattn.packs.explanation import ImageFacts
from xattn.packs.reader import Pack
from xattn.packs.writer import save_pack

LABEL = 3
METRICS = {"AD": {"higher_is_better": False, "formula": "", "protocol_id": "one"}}


def facts(predicted: int, p: float, label: int | None = LABEL) -> ImageFacts:
    return ImageFacts(((predicted, f"class {predicted}", p),), label, "owl")


def photos(right: str, seed: int = 0, **options):
    """A photo for each letter: "r" predicted right, "w" wrong; its confidence grows with its number."""
    return [
        make(
            image_id=f"photo-{i}",
            seed=seed + i,
            facts=facts(LABEL if letter == "r" else 1, 0.5 + i / 100),
            **options,
        )
        for i, letter in enumerate(right)
    ]


def pack(folder, explanations, metrics=None) -> Pack:
    save_pack(folder, explanations, overlays=False, metrics=metrics)
    return Pack(folder, name=folder.name, trusted=True)


@pytest.fixture
def two(tmp_path):
    def open_two(before, after, *metrics):
        return [
            pack(tmp_path / name, items, m)
            for name, items, m in zip(
                ("before", "after"), (before, after), metrics or (None, None), strict=True
            )
        ]

    return open_two


def test_what_turned_is_listed_with_the_surest_first(two):
    found = compare_packs(*two(photos("rrwwr"), photos("rwrrw")))
    assert [p.image_id for p in found.now_right] == ["photo-3", "photo-2"]
    assert [p.image_id for p in found.now_wrong] == ["photo-4", "photo-1"]
    assert len(found.changed) == 4 and found.alone == (0, 0)
    assert found.accuracy is not None
    assert found.accuracy.before.mean == found.accuracy.after.mean == 0.6
    assert found.accuracy.difference.mean == 0


def test_a_pack_does_not_differ_from_itself(two):
    found = compare_packs(*two(photos("rw"), photos("rw")))
    assert not found.changed and not found.now_right and not found.now_wrong
    assert [m.moved for m in found.moved] == pytest.approx([0, 0], abs=1e-12)


def test_maps_move_by_one_less_their_rank_correlation(two):
    before = photos("rrr")
    flipped = replace(before[0], map=-before[0].map)  # every rank is turned round
    other = replace(before[1], map=make(seed=99).map)
    found = compare_packs(*two(before, [flipped, other, before[2]]))
    assert [m.image_id for m in found.moved] == ["photo-0", "photo-1", "photo-2"]
    assert found.moved[0].moved == pytest.approx(2) and found.moved[2].moved == pytest.approx(0)


def test_constant_maps_are_no_maps_that_move(two):
    flat = [replace(e, map=np.zeros((7, 5), np.float32)) for e in photos("r")]
    assert compare_packs(*two(photos("r"), flat)).moved == []


def test_only_photos_of_both_count(two):
    found = compare_packs(*two(photos("rrr"), photos("wrrr")[:2]))
    assert len(found.common) == 2 and found.alone == (1, 0)
    assert found.accuracy is not None and found.accuracy.difference.mean == -0.5


def test_packs_of_other_photos_are_refused(two):
    strangers = [replace(e, image_id="stranger") for e in photos("r", seed=9)]
    with pytest.raises(ValueError, match=r"^packs: .* no photo in common; explain the same photos"):
        compare_packs(*two(photos("r"), strangers))


def test_metrics_are_compared_in_pairs_of_one_protocol(two):
    values = [(0.1, 0.3), (0.2, 0.4), (0.3, 0.5)]
    sides = [
        [
            replace(e, metrics={"AD": v[k], "IC": 1.0})
            for e, v in zip(photos("rrr"), values, strict=True)
        ]
        for k in (0, 1)
    ]
    described = {"AD": METRICS["AD"], "IC": METRICS["AD"]}
    changed = {"AD": METRICS["AD"], "IC": {**METRICS["AD"], "protocol_id": "two"}}
    found = compare_packs(*two(*sides, described, changed))
    assert found.left_out == ["IC"] and set(found.metrics) == {("head", "AD")}
    change = found.metrics["head", "AD"]
    assert change.difference == pytest.approx((0.2, 0.2, 0.2, 3))
    assert change.before.mean == pytest.approx(0.2) and change.after.mean == pytest.approx(0.4)


def test_two_heads_with_one_method_each_are_compared_under_both_names(two):
    found = compare_packs(*two(photos("rr"), photos("rr", method="mine")))
    assert {m.methods for m in found.moved} == {("head", "mine")} and len(found.moved) == 2


def test_without_labels_predictions_are_compared_and_the_report_says_what_is_missing(two):
    sides = [[make(facts=facts(k, 0.5, None))] for k in (1, 2)]
    found = compare_packs(*two(*sides))
    assert found.accuracy is None and len(found.changed) == 1
    assert "explain with --labels" in "\n".join(difference_lines(found))


def test_few_photos_give_no_verdict(two):
    few, many = (
        "\n".join(difference_lines(compare_packs(*two(photos("r" * n), photos("w" * n)))))
        for n in (7, 8)
    )
    assert "too few images for a verdict" in few and "too few" not in many


def test_the_command_prints_and_writes_the_same(two, tmp_path, capsys):
    two(photos("rw"), photos("ww"))
    words = ["diff", str(tmp_path / "before"), str(tmp_path / "after")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    report = (tmp_path / "out" / "difference.md").read_text()
    assert report.strip() in told and "## Now wrong (1)" in report
    kept = json.loads((tmp_path / "out" / "difference.json").read_text())
    assert kept["now_wrong"] == ["photo-0"] and kept["accuracy"]["difference"]["mean"] == -0.5
    assert main(["diff", str(tmp_path / "before"), str(tmp_path / "nowhere")]) == 2
    assert "packs: " in capsys.readouterr().err


def test_two_methods_of_one_pack_are_compared(two):
    items = [e for m in ("first", "last") for e in photos("rw", seed=len(m), method=m)]
    one, _ = two(items, items)
    found = compare_packs(one, one, ("first", "last"))
    assert {m.methods for m in found.moved} == {("first", "last")} and len(found.moved) == 2
    assert all(m.moved > 0 for m in found.moved)
    assert all(one.key(i)[0] == m.image_id for m in found.moved for i in m.entry_ids)
    with pytest.raises(
        ValueError, match=r"^methods: got lime, but before only has maps by first, last"
    ):
        compare_packs(one, one, ("first", "lime"))


def test_of_many_photos_a_sample_is_compared_and_the_report_says_so(two):
    packs = two(photos("rw" * 10), photos("ww" * 10))
    found = compare_packs(*packs, most=5)
    assert [p.image_id for p in found.common] == [f"photo-{i}" for i in (0, 4, 8, 12, 16)]
    assert found.shared == 20
    assert "5 photos of 20, evenly spread, in common" in "\n".join(difference_lines(found))


def test_the_command_compares_two_methods_of_one_pack(two, tmp_path, capsys):
    items = [e for m in ("first", "last") for e in photos("rw", seed=len(m), method=m)]
    two(items, items)
    folder = str(tmp_path / "before")
    assert main(["diff", folder, folder, "--methods", "first", "last"]) == 0
    assert "first and last" in capsys.readouterr().out
    assert main(["diff", folder, folder, "--methods", "first", "lime"]) == 2
    assert "methods: got lime" in capsys.readouterr().err


def test_photos_of_other_ids_are_joined_by_their_pictures(two):
    """A pack of a folder and one of files of it; a picture that a pack has twice joins nothing."""
    pictures = [photo(seed) for seed in (0, 1, 2, 2)]
    of_folder = [
        replace(e, image_id=f"fish/{i}.jpg", source=pictures[i])
        for i, e in enumerate(photos("rrrr"))
    ]
    of_files = [replace(of_folder[i], image_id=f"{i}.jpg") for i in (3, 1, 0)]
    before, after = two(of_folder, of_files)
    assert before.same_photos(after) == {"fish/0.jpg": "0.jpg", "fish/1.jpg": "1.jpg"}
    found = compare_packs(before, after)
    assert [(p.image_id, p.other_id) for p in found.common] == [
        ("fish/0.jpg", "0.jpg"),
        ("fish/1.jpg", "1.jpg"),
    ]
    assert found.renamed == 2 and found.alone == (2, 1)
    assert [m.moved for m in found.moved] == pytest.approx([0, 0], abs=1e-12)
    assert "2 photos have a different id in the second pack" in "\n".join(difference_lines(found))
    assert compare_packs(*two(of_folder, of_folder)).renamed == 0
