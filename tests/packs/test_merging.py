"""Several packs as one: photos side by side, methods of one photo together, contradictions named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_packs import described, explanation, picture

from xattn.cli.entry import main
from xattn.packs.explanation import ImageFacts
from xattn.packs.merging import merge_packs
from xattn.packs.reader import Pack
from xattn.packs.writer import pack_writer


def write(folder: Path, photos, methods=("gradcam",), metrics=None, **changes) -> Path:
    with pack_writer(folder, photos=2) as writer:
        writer.metrics = described() if metrics is None else metrics
        writer.skipped = [(f"{folder.name}.png", "cut short")]
        for i in photos:
            group = [explanation(i, m, **({"source": picture(i)} | changes)) for m in methods]
            writer.add(group)
    return folder


def merged(*folders: Path, output: Path) -> Pack:
    merge_packs([Pack(f, name=f.name, trusted=True) for f in folders], output, shard_photos=2)
    return Pack(output)


def test_packs_of_other_photos_stand_one_after_the_other(tmp_path):
    first = write(tmp_path / "a", range(3))
    second = write(tmp_path / "b", range(3, 5))
    found = merged(first, second, output=tmp_path / "c")
    assert found.counts == (5, 5) and found.skipped == [(f"{n}.png", "cut short") for n in "ab"]
    for pack in (Pack(first), Pack(second)):
        for id in pack.entry_ids:
            a, b = pack.explanation(id), found.explanation(id)
            np.testing.assert_array_equal(a.map, b.map)
            assert (a.facts, a.metrics, a.curves, a.protocol) == (
                b.facts,
                b.metrics,
                b.curves,
                b.protocol,
            )
            assert pack.photo_bytes(a.image_id) == found.photo_bytes(b.image_id)


def test_photos_that_both_have_get_the_methods_of_both(tmp_path):
    first = write(tmp_path / "a", range(4), ("gradcam", "random"))
    second = write(tmp_path / "b", range(2, 6), ("saliency", "random"))
    found = merged(first, second, output=tmp_path / "c")
    methods = [[found.key(id)[2] for id in found.entries_of(image)] for image in found.image_ids]
    assert methods == [["gradcam", "random"]] * 2 + [["gradcam", "random", "saliency"]] * 2 + [["saliency", "random"]] * 2  # fmt: skip
    assert found.images["methods"].tolist() == [2, 2, 3, 3, 2, 2]


def test_merging_equal_packs_gives_the_bytes_of_writing_once(tmp_path):
    whole = write(tmp_path / "whole", range(5), ("gradcam", "saliency"))
    parts = [
        write(tmp_path / name, range(*ends), ("gradcam", "saliency"))
        for name, ends in (("a", (0, 3)), ("b", (3, 5)))
    ]
    merged(*parts, output=tmp_path / "c")
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "c").iterdir())
    for name in set(names) - {"manifest.json"}:  # which lists what was skipped
        assert (whole / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def test_packs_of_other_networks_keep_their_protocols(tmp_path):
    first = write(tmp_path / "a", [0], ("gradcam",))
    second = write(tmp_path / "b", [0], ("saliency",), protocol={"backbone": {"name": "another"}})
    found = merged(first, second, output=tmp_path / "c")
    backbones = [found.provenance(id)["backbone"]["name"] for id in found.entry_ids]
    assert backbones == ["made up", "another"]


def test_a_true_class_that_one_pack_knows_is_that_of_the_photo(tmp_path):
    first = write(tmp_path / "a", [0], ("gradcam",), facts=ImageFacts())
    second = write(tmp_path / "b", [0], ("saliency",))
    known = merged(first, second, output=tmp_path / "c").images.iloc[0]
    assert (known["label"], known["label_name"]) == (1, "great white shark")


WOLF, FOX = ((5, "wolf", 0.5), (2, "fox", 0.25)), ((2, "fox", 0.75),)


@pytest.mark.parametrize(
    "tops, wanted", [((WOLF, FOX), WOLF), ((FOX, WOLF), FOX), (((), FOX), FOX), ((WOLF, ()), WOLF)]
)
def test_the_first_classes_are_those_of_the_first_pack_that_has_some(tmp_path, tops, wanted):
    folders = [
        write(tmp_path / name, [0], (method,), facts=ImageFacts(top))
        for name, method, top in zip("ab", ("gradcam", "saliency"), tops, strict=True)
    ]
    found = merged(*folders, output=tmp_path / "c")
    assert {found.explanation(id).facts.top for id in found.entry_ids} == {wanted}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"source": picture(9)}, "photo-00001 is one photo in a and a different photo in b"),
        ({"probability": 0.123}, r"map photo-00001@1.gradcam is not the same in a and in b.*xattn diff"),
        ({"facts": ImageFacts((), 5, "wolf"), "target": 5}, "true class of photo-00001.*wolf in b"),
    ],
)  # fmt: skip
def test_contradictions_are_named_and_nothing_is_written(tmp_path, change, says):
    first, second = write(tmp_path / "a", range(3)), write(tmp_path / "b", [1], **change)
    with pytest.raises(ValueError, match=says):
        merged(first, second, output=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_metrics_of_another_protocol_are_named(tmp_path):
    other = described() | {"ROAD": {"higher_is_better": False, "formula": "", "protocol_id": "x"}}
    first, second = write(tmp_path / "a", [0]), write(tmp_path / "b", [1], metrics=other)
    with pytest.raises(ValueError, match="packs: the metrics ROAD of a are not those of b"):
        merged(first, second, output=tmp_path / "c")


def test_the_command_says_what_it_made(tmp_path, capsys):
    folders = [
        str(write(tmp_path / "a", range(3))),
        str(write(tmp_path / "b", [2, 3], ("random",))),
    ]
    words = ["merge", *folders, "--output", str(tmp_path / "c")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "merged: 2 packs, 4 photos, 1 of them in several packs, 5 maps" in out
    assert f"pack: {tmp_path / 'c'}" in out
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["entries"] == 5
    assert main(words) == 2 and "already holds results" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
