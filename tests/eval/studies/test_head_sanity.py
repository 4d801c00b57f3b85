"""Sanity of heads: maps with a known answer pass or fail each check, and finished blocks are kept."""

import json

import numpy as np
import pytest
import timm
import torch
from eval_fakes import FakeBackbone
from PIL import Image
from torch.nn import functional as F

from xattn import load_backbone
from xattn.eval.studies import head_sanity
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.head_sanity import (
    HeadSanity,
    check_heads,
    labelled,
    report,
    verdict,
    verdicts,
)
from xattn.eval.studies.sanity_checks import (
    ALL_RANDOM,
    ANOTHER,
    CHECKS,
    CORRELATION,
    MEASURES,
    TWO_CLASSES,
    Block,
    Method,
    Settings,
    corner_canvases,
    partners,
    placement,
    quadrants,
)
from xattn.heads import create_head, save_head

# ---------------------------------------------------------------- canvases


@pytest.mark.parametrize("fill", ["mean", "blur", "black"])
@pytest.mark.parametrize("size", [(15, 22), (8, 9)])
def test_a_canvas_holds_the_photo_at_half_its_size_in_one_corner(size, fill):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(images, (size[0] // 2, size[1] // 2), mode="bilinear", antialias=True)
    canvases = corner_canvases(images, fill)
    assert canvases.shape == (2, 4, 3, *size)
    for k, quadrant in enumerate(quadrants(*size)):
        assert torch.allclose(canvases[:, k][:, :, quadrant], small.flatten(2), atol=1e-6)
        rest = canvases[:, k][:, :, ~quadrant]
        colour = {"mean": images.mean((2, 3)), "black": torch.zeros(2, 3)}.get(fill)
        if colour is not None:
            assert torch.allclose(rest, colour[:, :, None].expand_as(rest), atol=1e-6)
    assert quadrants(*size).sum(0).max() == 1


def test_a_map_that_stays_where_it_is_has_the_values_of_chance():
    generator = torch.Generator().manual_seed(3)
    fixed = torch.randn(1, 1, 12, 18, generator=generator).expand(4, 1, 12, 18)
    measured = placement(fixed, torch.arange(4))
    for name, chance in MEASURES.items():
        assert float(measured[name].mean()) == pytest.approx(chance, abs=1e-9)


@pytest.mark.parametrize("size", [(12, 18), (13, 7)])
def test_a_map_on_the_photo_alone_has_one(size):
    maps = quadrants(*size)[:, None].float() - 0.5  # negative elsewhere
    for name, values in placement(maps, torch.arange(4)).items():
        tolerance = 0.06 if name == "place" and size[0] % 2 else 1e-9
        assert values.tolist() == pytest.approx([1] * 4, abs=tolerance)
    opposite = placement(maps.flip(0), torch.arange(4))
    assert torch.allclose(opposite["place"], -placement(maps, torch.arange(4))["place"])
    assert not any(opposite[name].any() for name in ("mass", "top quarter", "maximum"))


def test_maps_without_evidence_have_no_place():
    maps = torch.stack([-torch.rand(1, 6, 6), torch.full((1, 6, 6), torch.nan)])
    measured = placement(maps, torch.tensor([0, 1]))
    assert measured["mass"].isnan().all() and measured["place"].isnan().all()
    assert measured["maximum"].isnan().tolist() == [False, True]


# ---------------------------------------------------------------- checks


class Colours(FakeBackbone):
    """Each class counts the pixels of its colour, so their map is the whole truth."""

    num_classes = 3
    class_names = ("red", "green", "blue")

    def logits(self, images):
        return 40 * images.double().square().mean((2, 3)).float()


def exact(inputs, target):
    """What each pixel adds to the logit of ``target``."""
    return inputs[torch.arange(len(inputs)), target][:, None].square()


def photos(count=9, size=(24, 20)):
    """A block of one colour somewhere on a darker ground."""
    generator = torch.Generator().manual_seed(1)
    images = 0.2 * torch.rand(count, 3, *size, generator=generator)
    for i, image in enumerate(images):
        top, left = (int(torch.randint(0, side // 2, (), generator=generator)) for side in size)
        part = image[i % 3, top : top + size[0] // 2, left : left + size[1] // 2]
        part += 0.6 + 0.1 * torch.rand(part.shape, generator=generator)
        image[(i + 1) % 3, : size[0] // 3] += 0.2
    return images


def centre(inputs, target):
    y, x = (torch.linspace(-1, 1, side) ** 2 for side in inputs.shape[2:])
    return torch.exp(-2 * (y[:, None] + x))[None, None].repeat(len(inputs), 1, 1, 1)


def brightness(inputs, target):
    return inputs.sum(1, keepdim=True)


def noise(inputs, target):
    return (inputs.sum(1, keepdim=True) * 9973).frac()


METHODS = {
    "exact": Method("exact", exact, lambda _, x, t: noise(x, t), ("top", "all")),
    "brightness": Method(
        "brightness", brightness, lambda _, x, t: brightness(x, t), ("top", "all")
    ),
    "centre": Method("centre", centre, lambda _, x, t: torch.zeros_like(x[:, :1]), ("top", "all")),
}
SETTINGS = Settings(fills=("black",), max_forward_batch=8)


@pytest.fixture(scope="module")
def table():
    backbone = Colours()
    block = Block.of(backbone, photos())
    return {
        name: {
            check: {k: v.numpy() for k, v in run(backbone, method, block, SETTINGS).items()}
            for check, run in CHECKS.items()
        }
        for name, method in METHODS.items()
    }


def verdict_of(table, method, check):
    return verdict(check, table[method][check], table["centre"][check])


def test_an_exact_class_map_passes_every_check(table):
    for check in CHECKS:
        assert verdict_of(table, "exact", check) == "passed"
    measured = table["exact"]["corners"]
    assert (measured["class stays, black"] == 1).all()
    assert measured["mass, black"].min() > 0.999 and measured["maximum, black"].min() == 1


def test_a_blob_in_the_centre_fails_the_corners(table):
    assert verdict_of(table, "centre", "corners").startswith("not shown: mass, black; top quarter")
    for name, chance in MEASURES.items():
        measured = table["centre"]["corners"][f"{name}, black"]
        assert measured == pytest.approx(np.full(9, chance), abs=1e-3)


def test_a_map_that_ignores_the_photo_is_as_good_on_any(table):
    found = table["centre"]["photo"]
    assert found[CORRELATION] == pytest.approx(np.ones(9))
    assert (found["insertion, own"] == found["insertion, other"]).all()
    assert verdict_of(table, "centre", "photo") == "not shown: deletion; insertion; ROAD"


def test_another_photos_map_may_not_beat_chance(table):
    found = dict(table["exact"]["photo"])
    chance = dict(found, **{"insertion, own": found["insertion, other"] - 0.1})
    assert verdict("photo", found, chance) == f"not shown: insertion of {ANOTHER}"


def test_a_map_that_ignores_the_class_has_correlation_one(table):
    assert table["brightness"]["class"][TWO_CLASSES] == pytest.approx(np.ones(9))
    assert verdict_of(table, "brightness", "class") == "not shown: two classes"


def test_a_map_that_ignores_the_weights_survives_their_randomisation(table):
    assert table["brightness"]["weights"][ALL_RANDOM] == pytest.approx(np.ones(9))
    assert verdict_of(table, "brightness", "weights") == f"not shown: {ALL_RANDOM}"
    assert (table["centre"]["weights"][ALL_RANDOM] == 0).all()  # a constant map shares nothing
    assert set(table["exact"]["weights"]) == {"random down to top", ALL_RANDOM, ANOTHER}


def test_photos_whose_class_changes_in_a_corner_are_left_out_and_counted():
    class Fickle(Colours):
        def logits(self, images):  # whatever is bright in the top left quarter is red
            logits = super().logits(images)
            logits[:, 0] += 1e3 * (images[:, :, :12, :10].sum((1, 2, 3)) > 100)
            return logits

    backbone, asked = Fickle(), []

    def explain(inputs, target):
        asked.append(len(inputs))
        return exact(inputs, target)

    images = torch.zeros(2, 3, 24, 20)
    images[0, 0], images[0, 2], images[1, 2] = 0.3, 0.9, 0.1
    block = Block.of(backbone, images)
    assert block.classes[:, 0].tolist() == [0, 2]
    found = CHECKS["corners"](backbone, Method("m", explain, None, ()), block, SETTINGS)
    assert found["class stays, black"].tolist() == [0.25, 1.0] and asked == [5]
    assert found["mass, black"].tolist() == [1.0, 1.0]


def test_partners_are_of_other_classes():
    assert partners(torch.tensor([4, 4, 1, 4])).tolist() == [2, 2, 3, 2]
    assert partners(torch.tensor([3, 3])).tolist() == [-1, -1]
    block = Block.of(Colours(), photos(7)[::3])  # all red
    found = CHECKS["photo"](Colours(), METHODS["exact"], block, SETTINGS)
    assert found[CORRELATION].isnan().all() and found["insertion, other"].isnan().all()
    assert found["insertion, own"].isfinite().all()


def test_a_head_has_to_beat_those_of_random_labels(table):
    passed = verdicts(table, ["exact"], ["centre"])
    assert passed["exact"]["labels"] == "passed" and "labels" not in passed["centre"]
    same = verdicts({**table, "twin": table["exact"]}, ["exact"], ["centre", "twin"])
    assert same["exact"]["labels"] == "not shown: deletion, twin; insertion, twin; ROAD, twin"
    text = report(table, ["exact"], "", ["centre"])
    assert (
        "| labels | passed | - | - |" in text and "than each of centre, trained on random" in text
    )


def test_too_few_photos_get_no_verdict(table):
    few = {name: values[:7] for name, values in table["exact"]["class"].items()}
    assert "too few" in verdict("class", few)


def test_the_report_counts_what_was_left_out(table):
    table = json.loads(json.dumps(table, default=lambda values: values.tolist()))
    table = {
        m: {c: {k: np.array(v) for k, v in f.items()} for c, f in t.items()}
        for m, t in table.items()
    }
    table["exact"]["corners"]["mass, black"][:2] = np.nan
    text = report(table, ["exact"], "9 photos.")
    assert "n=7" in text and text.startswith("9 photos.\n\n| check | exact | brightness | centre |")
    assert "**exact**, minus another method, paired:" in text


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Arguments for a small network, two heads, and five photos."""
    root = tmp_path_factory.mktemp("sanity")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet")
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    torch.save(model.state_dict(), root / "w.pth")
    backbone = load_backbone("test_efficientnet", root / "w.pth")
    for name in ("first", "second"):
        save_head(create_head("ttame", backbone), root / name)
    (root / "photos").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 90)).save(root / "photos" / f"{i}.png")
    return dict(
        data=str(root / "photos"), backbone="test_efficientnet", weights=str(root / "w.pth"),
        heads=(str(root / "first"),), block=3, stages=2, max_forward_batch=8,
        checks=("weights", "class", "corners"),
    )  # fmt: skip


@pytest.mark.slow
def test_finished_blocks_are_read_and_new_methods_added(command, tmp_path, monkeypatch):
    args = HeadSanity(**command, output=tmp_path / "out")
    whole = check_heads(args, progress=False)
    files = sorted(tmp_path.glob("out/first/*.json"))
    assert [f.name for f in files] == [
        f"{c}-00{i}.json" for c in sorted(args.checks) for i in (0, 1)
    ]
    values = (tmp_path / "out" / "values.csv").read_text().splitlines()
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(kept["methods"]) == 4 and kept["photos"] == 5
    assert values[0] == "method,check,measure,photo,value" and len(values) % 5 == 1

    files[1].unlink()  # as if killed before
    done = []
    check = CHECKS["class"]
    counted = {**CHECKS, "class": lambda *a: done.append(a[1].label) or check(*a)}
    monkeypatch.setattr(head_sanity, "CHECKS", counted)
    assert check_heads(args, progress=False) == whole
    assert done == ["first"]
    more = HeadSanity(
        **{
            **command,
            "heads": (*command["heads"], command["heads"][0][:-5] + "second:maps=scores"),
        },
        output=tmp_path / "out",
    )
    check_heads(more, progress=False)
    assert done == ["first", *["second:maps=scores"] * 2]

    other = HeadSanity(**{**command, "stages": 3}, output=tmp_path / "out")
    with pytest.raises(ValueError, match="^output: .*first/weights-000.json has other settings"):
        check_heads(other, progress=False)
    files[0].write_text("{")
    with pytest.raises(ValueError, match="^output: .* is damaged .*; delete it"):
        check_heads(args, progress=False)


def test_the_command_prints_the_report(command, tmp_path, capsys):
    given = {**command, "output": tmp_path, "checks": ("photo",), "photos": 2, "block": 2}
    words = ["head-sanity", given.pop("data")]
    for key, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    main(words)
    text = capsys.readouterr().out
    assert "| check | first | gradcam | random | centre |" in text
    assert (tmp_path / "report.md").read_text() in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"explainers": ("first=cam",)}, "^heads: got first twice; write LABEL"),
        ({"explainers": ("gradcam", "gradcam")}, "^explainers: got 'gradcam' twice"),
    ],
)
def test_bad_input_is_named(command, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_heads(HeadSanity(**{**command, **changes}, output=tmp_path), progress=False)


def test_labels_are_given_or_are_the_end_of_a_path():
    texts = ["a=runs/x/head", "runs/y/head/", "gradcam", "lime:samples=50"]
    assert labelled(texts, "heads") == {
        "a": "runs/x/head", "head": "runs/y/head/", "gradcam": "gradcam",
        "lime:samples=50": "lime:samples=50",
    }  # fmt: skip
