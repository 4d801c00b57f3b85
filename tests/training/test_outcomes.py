"""The table of outcomes: a network's own answers, whole or not at all, bound to its key, killable."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training_runs import in_two_processes, write_photos

import xattn
from xattn.heads import create_head
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.training.outcome_rows import (
    HeadGuide,
    MaskSettings,
    RowMaker,
    cost_line,
    kept_logits,
    mask_pairs,
    masks_of,
)
from xattn.training.outcomes import OutcomeBatch, cache_outcomes, log_odds

COUNT, MASKS = 21, 8


class Wide(nn.Module):
    """A network of 2,100 classes, many of which compete."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.classifier = nn.Linear(8, 2100)
        nn.init.normal_(self.classifier.weight, std=3)
        self.classifier_weight, self.classifier_bias = (
            p.data for p in self.classifier.parameters()
        )
        self.preprocessing = xattn.Preprocessing((32, 32))

    def forward_taps(self, x):
        features = self.conv(x).relu()
        return self.classifier(features.mean((2, 3))), (features,)


def network(name="test_efficientnet", **options):
    torch.manual_seed(0)
    return xattn.load_backbone(name, None, **{"input_size": 64, "num_classes": 7, **options})


@pytest.fixture(scope="module")
def cnn():
    return network()


@pytest.fixture(scope="module")
def vit():
    return network("test_vit")


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return xattn.load_backbone(Wide())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), COUNT)


@pytest.fixture(scope="module")
def few(photos):
    return sorted(photos.iterdir())[:3]


@pytest.fixture(scope="module")
def whole(cnn, photos, tmp_path_factory):
    """The folder of a whole table of two crops, to be copied."""
    folder = tmp_path_factory.mktemp("whole") / "t"
    cached(cnn, photos, folder, crops=2)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "t")


def cached(backbone, data, folder, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* photos could be read, but a head needs")
        return cache_outcomes(
            backbone, data, folder, **{"masks": MASKS, "progress": False, **options}
        )


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.lock"}


@pytest.fixture
def computed(monkeypatch):
    """The names of the photos whose rows are computed."""
    names, real = [], RowMaker.__call__

    def call(self, image, seed, name):
        names.append(name.rpartition("/")[2])
        return real(self, image, seed, name)

    monkeypatch.setattr(RowMaker, "__call__", call)
    return names


# ---------------------------------------------------------------- what a row holds


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_row_is_what_the_network_answers(name, request, few, tmp_path):
    backbone = request.getfixturevalue(name)
    table = cached(backbone, few, tmp_path / "t", seed=3)
    assert len(table) == 3 and table.names == list(map(str, few))
    assert (table.crops, table.masks, table.num_classes, table.task) == (1, MASKS, 7, "multiclass")
    image = prepare(load_image(few[2]), backbone.preprocessing)[0]
    with torch.no_grad():
        taps = backbone(image[None])
        row = backbone.classifier_weight[taps.logits[0].argmax()]
        cam = torch.einsum("c,chw->hw", row, taps.maps[-1][0])
        pairs = mask_pairs(image, cam, MASKS // 2, "3/0/2")
        expected = torch.cat([taps.logits, backbone.logits(pairs.images)])
    got = table.row(2)
    torch.testing.assert_close(got.logits[0], expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(got.masks[0], masks_of(pairs.cells[None])[0])
    assert torch.equal(got.masks[0, :4] + got.masks[0, 4:], torch.ones(4, 28, 28))
    assert got.masks.dtype == got.logits.dtype == torch.float32
    assert got.classes is None and got.rest is None
    assert got.top(1).tolist() == [[int(taps.logits[0].argmax())]]


def test_rows_do_not_depend_on_their_neighbours(cnn, few, tmp_path):
    three = cached(cnn, few, tmp_path / "a").batch([0, 1])
    two = cached(cnn, few[:2], tmp_path / "b").batch([0, 1])
    assert torch.equal(three.logits, two.logits) and torch.equal(three.masks, two.masks)


def test_crops_after_the_first_are_random_crops_of_a_seed(cnn, photos, whole, few, tmp_path):
    two, one = cached(cnn, photos, whole, crops=2), cached(cnn, photos, tmp_path / "one")
    index = list(range(COUNT))
    assert two.crops == 2
    assert torch.equal(two.batch(index).logits, one.batch(index).logits)
    assert not torch.equal(two.batch(index, 1).logits[:, 0], one.batch(index).logits[:, 0])
    mixed = two.batch([4, 4], torch.tensor([1, 0]))
    assert torch.equal(mixed.logits[0], two.row(4, 1).logits[0])
    assert torch.equal(mixed.masks[1], two.row(4).masks[0])
    for crop in (-1, 2, torch.tensor([-1, 1]), torch.tensor([0, 2])):
        with pytest.raises(ValueError, match=r"crop: got .*; the table has the crops 0\.\.1"):
            two.batch([4, 4], crop)
    with pytest.raises(ValueError, match="crop: got 2"):
        two.batch([0], 2)
    seeds = [cached(cnn, few, tmp_path / f"s{seed}", seed=seed).row(0) for seed in (0, 1)]
    assert torch.equal(seeds[0].logits[:, 0], seeds[1].logits[:, 0])
    assert not torch.equal(seeds[0].masks, seeds[1].masks)


def test_a_guide_takes_the_place_of_the_first_guess(cnn, few, tmp_path):
    plain = cached(cnn, few, tmp_path / "a")
    head = create_head("ttame", cnn).eval()
    guided = cached(cnn, few, tmp_path / "b", guide=HeadGuide(head))
    assert guided.key["guide"].startswith("ttame ") and guided.digest != plain.digest
    same = (plain.batch([0, 1, 2]).masks == guided.batch([0, 1, 2]).masks).all((0, 2, 3))
    assert same.tolist() == [True, True, True, False] * 2  # only those of evidence differ
    with pytest.raises(ValueError, match=r"head.eval\(\)"):
        cached(cnn, few, tmp_path / "c", guide=HeadGuide(head.train()))
    with pytest.raises(ValueError, match="guide: only masks of the kind 'evidence'"):
        cached(cnn, few, tmp_path / "d", guide=HeadGuide(head), kinds=["blobs"])


def test_without_masks_of_evidence_taps_do_not_matter(cnn, few, tmp_path):
    first = cached(cnn, few, tmp_path / "t", kinds=["blobs", "squares16"])
    again = cached(cnn.with_taps(["stage.2"]), few, tmp_path / "t", kinds=["blobs", "squares16"])
    assert first.digest == again.digest
    other = cached(cnn.with_taps(["stage.2"]), few, tmp_path / "u")
    assert other.key["guide"] == "norm on stage.2"  # the classifier's rows are wider


def test_mixed_precision_changes_no_more_than_rounding(cnn, few, tmp_path):
    full, mixed = (cached(cnn, few, tmp_path / p, precision=p) for p in ("no", "bf16"))
    a, b = full.batch([0, 1, 2]).logits, mixed.batch([0, 1, 2]).logits
    assert not torch.equal(a, b)
    torch.testing.assert_close(a[:, 0], b[:, 0], atol=0.05 * float(a.abs().max()), rtol=0)


# ---------------------------------------------------------------- probabilities and log-odds


def batch_of(logits, task="multiclass"):
    """Outcomes with full logits (B, 1 + N, K), or with those that a table would keep."""
    kept = [kept_logits(photo) for photo in logits]
    parts = [torch.stack(part).float() for part in zip(*kept, strict=True)]
    values, classes, rest = parts if len(parts) == 3 else (*parts, None, None)
    masks = torch.zeros(len(logits), logits.shape[1] - 1, 28, 28)
    classes = None if classes is None else classes.long()
    names = tuple(f"{i}.png" for i in range(len(logits)))
    return OutcomeBatch(masks, values, classes, rest, task, logits.shape[2], names)


@pytest.mark.parametrize("classes", [2, 7, 2100])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_chosen_classes_have_the_probabilities_of_all(classes, task):
    torch.manual_seed(1)
    logits = torch.randn(3, 6, classes) * 5
    logits[0, 2, logits[0, 0].argmax()] = 40.0  # log-odds far beyond what 1 - p can hold
    batch = batch_of(logits, task)
    chosen = batch.top(min(5, classes)).flip(1)
    assert torch.equal(chosen.flip(1), logits[:, 0].topk(min(5, classes)).indices)
    wide = logits.double()[:, 1:].transpose(1, 2)
    p = wide.sigmoid() if task == "multilabel" else wide.softmax(1)
    index = chosen[..., None].expand(-1, -1, 5)
    torch.testing.assert_close(batch.probabilities(chosen), p.gather(1, index).float())
    others = [
        [torch.cat([z[:k], z[k + 1 :]]).logsumexp(0) for k in row]
        for z, row in zip(wide, chosen.tolist(), strict=True)
    ]
    others = torch.stack([torch.stack(row) for row in others])
    odds = wide.gather(1, index) - (0 if task == "multilabel" else others)
    torch.testing.assert_close(batch.log_odds(chosen), odds.float())


def test_log_odds_are_those_of_the_softmax_and_have_gradients():
    torch.manual_seed(2)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 6, 0]]).expand(2, 5, 3)
    p = logits.softmax(-1).gather(-1, index)
    torch.testing.assert_close(log_odds(logits, index, "multiclass"), (p / (1 - p)).log())
    assert torch.autograd.gradcheck(lambda z: log_odds(z, index, "multiclass"), logits)


def test_of_many_classes_the_likeliest_are_kept(wide, few, tmp_path):
    table = cached(wide, few, tmp_path / "t")
    batch = table.batch([0, 1, 2])
    assert batch.logits.shape == (3, 1 + MASKS, 256) and batch.rest.shape == (3, 1 + MASKS)
    assert table.num_classes == 2100
    images = torch.stack([prepare(load_image(p), wide.preprocessing)[0] for p in few])
    with torch.no_grad():
        clean = torch.cat([wide.logits(image[None]) for image in images])
        pairs = mask_pairs(images[1], torch.zeros(4, 4), MASKS // 2, "0/0/1")
        masked = wide.logits(pairs.images)
    assert torch.equal(batch.classes, clean.argsort(dim=1, descending=True, stable=True)[:, :256])
    chosen = batch.top(12)
    easy = [0, 1, 2, 4, 5, 6]  # not those of evidence
    expected = masked.softmax(1)[:, chosen[1]].T[:, easy]
    got = batch.probabilities(chosen)[1][:, easy]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=2e-2)  # float16
    left = int(clean[1].argmin())
    for ask in (batch.probabilities, batch.log_odds):
        with pytest.raises(ValueError, match=f"classes: {left} is not among the 256 .*001.png"):
            ask(torch.tensor([[0 if left else 1], [left], [0]]).where(
                torch.tensor([[False], [True], [False]]), chosen[:, :1]))  # fmt: skip


def test_binary_and_multilabel_networks(few, tmp_path):
    binary = network(num_classes=1)
    batch = cached(binary, few, tmp_path / "a").batch([0, 1, 2])
    assert batch.task == "binary" and batch.logits.shape[2] == 2
    both = batch.probabilities(torch.tensor([[0, 1]]).expand(3, 2))
    torch.testing.assert_close(both.sum(1), torch.ones(3, MASKS))
    z = batch.logits[:, 1:, 1] - batch.logits[:, 1:, 0]
    torch.testing.assert_close(batch.log_odds(torch.ones(3, 1, dtype=torch.long))[:, 0], z)
    labels = cached(network(task="multilabel"), few, tmp_path / "b").row(1)
    chosen = torch.tensor([[6, 2]])
    torch.testing.assert_close(
        labels.log_odds(chosen)[0], labels.logits[0, 1:, chosen[0]].transpose(0, 1)
    )
    torch.testing.assert_close(labels.probabilities(chosen), labels.log_odds(chosen).sigmoid())


# ---------------------------------------------------------------- photos


def test_unreadable_photos_are_listed_and_leave_the_others_alone(cnn, photos, whole, tmp_path):
    data = shutil.copytree(photos, tmp_path / photos.name)
    (data / "003.png").write_bytes(b"words")
    table = cached(cnn, data, tmp_path / "t", crops=2)
    assert len(table) == COUNT - 1 and str(data / "003.png") not in table.names
    ((name, reason),) = table.skipped
    assert name.endswith("003.png") and "not an image" in reason
    others = [i for i in range(COUNT) if i != 3]
    for crop in (0, 1):
        a, b = (
            table.batch(range(COUNT - 1), crop),
            cached(cnn, photos, whole, crops=2).batch(others, crop),
        )
        assert torch.equal(a.logits, b.logits)
    assert table.subset([data / "003.png", data / "004.png"]).skipped == table.skipped
    for path in data.iterdir():
        path.write_bytes(b"words")
    with pytest.raises(ValueError, match=f"none of the {COUNT} images"):
        cached(cnn, data, tmp_path / "u")


def test_masked_images_that_do_not_fit_name_the_option(cnn, few, tmp_path, monkeypatch):
    def full(images):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(vars(cnn), "logits", full)
    with pytest.raises(MemoryError, match="masks: out of memory with 8 images per pass"):
        cached(cnn, few, tmp_path / "t")


def test_few_photos_are_a_warning(cnn, few, photos, tmp_path):
    with pytest.warns(UserWarning, match="table: only 3 photos could be read, but a head needs 20"):
        cache_outcomes(cnn, few, tmp_path / "t", masks=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = sorted(photos.iterdir())[:20]
        assert len(cache_outcomes(cnn, paths, tmp_path / "u", masks=2, progress=False)) == 20


def test_a_subset_has_the_rows_of_its_photos(cnn, whole, photos, tmp_path, monkeypatch):
    table = cached(cnn, photos, whole, crops=2)
    part = table.subset([7, 2])
    assert part.names == [table.names[7], table.names[2]] and len(part) == 2
    assert torch.equal(part.row(0, 1).logits, table.row(7, 1).logits)
    monkeypatch.chdir(photos.parent)
    relative = [f"{photos.name}/007.png", photos / "002.png"]
    assert table.subset(relative).digest == part.digest == table.subset(torch.tensor([7, 2])).digest
    assert len({part.digest, table.digest, table.subset([2, 7]).digest}) == 3
    assert table.subset([2, 7]).subset([1]).names == [table.names[7]]
    for wrong, words in [
        ([], "0 readable"), ([COUNT], r"0\.\.20"), ([-1], "numbers"), ([tmp_path / "x"], "is not in"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"photos: .*{words}"):
            table.subset(wrong)


def test_logits_that_float16_cannot_hold_name_the_photo(few, tmp_path):
    for value in (1e6, float("nan")):
        backbone = network()
        backbone.model.get_classifier().bias.data[3] = value
        with pytest.raises(ValueError, match=r"table: the logits of .*000.png are not finite"):
            cached(backbone, few, tmp_path / "t")


# ---------------------------------------------------------------- what a table belongs to


def test_a_table_of_something_else_is_refused_with_both_keys(cnn, vit, photos, copied):
    first = cached(cnn, photos, copied, crops=2)
    torch.manual_seed(1)
    other = xattn.load_backbone("test_efficientnet", None, input_size=64, num_classes=7)
    assert cached(cnn, photos, copied, crops=2).digest == first.digest
    for backbone, data, options, words in [
        (other, photos, {}, ["backbone", cnn.fingerprint, other.fingerprint]),
        (vit, photos, {}, ["test_vit", "test_efficientnet"]),
        (network(task="multilabel"), photos, {}, ["task", "multilabel", "multiclass"]),
        (cnn, sorted(photos.iterdir())[:5], {}, ["photos", f'"count": {COUNT}', '"count": 5']),
        (cnn, photos, {"masks": 2}, [f"masks: {MASKS} there, 2 here"]),
        (cnn, photos, {"seed": 1}, ["seed: 0 there, 1 here"]),
        (cnn, photos, {"kinds": ["blobs", "evidence"]}, ["kinds", "squares32"]),
        (cnn, photos, {"fills": ["blur"]}, ["fills", "black"]),
        (cnn, photos, {"crops": 1}, ["crops: 2 there, 1 here"]),
        (cnn, photos, {"precision": "bf16"}, ['"no" there, "bf16" here']),
    ]:
        with pytest.raises(ValueError, match=r"^table: .*another folder.*compute again") as error:
            cached(backbone, data, copied, **{"crops": 2, **options})
        assert first.digest in str(error.value)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert torch.equal(first.row(0).logits, cached(cnn, photos, copied, crops=2).row(0).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masks": 7}, "masks: got 7; give an even number of at least 2"),
        ({"masks": 0}, "masks: got 0"),
        ({"crops": True}, "crops: got True"),
        ({"kinds": ["stripes"]}, "kinds: .*superpixels"),
        ({"kinds": []}, "kinds"),
        ({"fills": "blur"}, "fills: got 'blur'; give a list"),
        ({"precision": "fp16"}, "precision: got 'fp16'"),
    ],
)
def test_bad_settings_are_refused(cnn, few, tmp_path, options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        cached(cnn, few, tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("place", [0.0, 0.1, 0.6])
def test_a_flipped_bit_is_named_and_its_shard_computed_again(
    cnn, photos, whole, copied, computed, place
):
    file = copied / "rows-00000037-00000042.safetensors"  # the last of the second crop
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 3
    file.write_bytes(data)
    (copied / "notes.txt").write_text("mine")
    with pytest.warns(
        UserWarning,
        match=r"table: these files in .* have changed since they were written: "
        r"rows-[-0-9]{17}.safetensors; their rows",
    ):
        cached(cnn, photos, copied, crops=2)
    assert computed == [f"{i:03d}.png" for i in range(16, 21)]
    assert contents(copied) == {**contents(whole), "notes.txt": b"mine"}


# ---------------------------------------------------------------- interrupts and processes


@pytest.mark.parametrize(("row", "left"), [(15, 42), (40, 5)])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    cnn, photos, whole, tmp_path, monkeypatch, row, left
):
    real, calls = RowMaker.__call__, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == row + 1:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RowMaker, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            cached(cnn, photos, tmp_path / "b", crops=2)
        calls[:] = [1] * 50
        cached(cnn, photos, tmp_path / "b", crops=2)
        assert len(calls) == 50 + left  # shards of 16 rows; those of a crop end with it
    assert contents(whole) == contents(tmp_path / "b")


JOB = """
import os, signal, sys
import xattn
from xattn.runtime.distributed import leave_group
from xattn.training import cache
from xattn.training.outcomes import cache_outcomes

weights, photos, folder, at = sys.argv[1:]
real, calls = cache._store, []

def dying(path, data):
    calls.append(1)
    if len(calls) == int(at):
        real(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, data)

cache._store = dying
backbone = xattn.load_backbone("test_efficientnet", weights, input_size=64)
cache_outcomes(backbone, photos, folder, crops=2, masks=8, progress=False)
leave_group()
"""


def test_two_processes_finish_what_a_killed_one_began_with_the_bits_of_one(
    cnn, photos, whole, tmp_path
):
    save_file(cnn.model.state_dict(), str(tmp_path / "w.safetensors"))
    backbone = xattn.load_backbone("test_efficientnet", tmp_path / "w.safetensors", input_size=64)
    cached(backbone, photos, tmp_path / "one", crops=2)
    (tmp_path / "job.py").write_text(JOB)
    command = [sys.executable, str(tmp_path / "job.py"), *map(
        str, (tmp_path / "w.safetensors", photos, tmp_path / "two")
    )]  # fmt: skip
    killed = subprocess.run([*command, "3"], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert len(list((tmp_path / "two").glob("rows-*"))) == 2  # of four
    codes, errors = in_two_processes([*command, "0"], {})
    assert codes == [0, 0], errors
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ---------------------------------------------------------------- the price


@pytest.mark.parametrize(
    ("photos", "rows", "seconds", "line"),
    [
        (400, 400, 0.285, "400 photos x 1 crop x 16 masks = 6,800 passes, about 1.9 minutes, "),
        (
            1,
            2,
            0.05,
            "1 photo x 4 crops x 16 masks, 2 of 4 rows to compute = 34 passes, about 1 seconds",
        ),
    ],
)
def test_the_price_is_one_line(cnn, monkeypatch, photos, rows, seconds, line):
    monkeypatch.setattr("xattn.training.outcome_rows.time_row", lambda maker: seconds)
    maker = RowMaker(cnn, MaskSettings(crops=1 if photos == 400 else 4))
    assert cost_line(maker, photos, rows, 1).startswith(f"table of outcomes: {line}")


def test_the_price_is_told_before_anything_is_computed(cnn, photos, few, copied, tmp_path):
    lines: list[str] = []
    table = cached(cnn, few, tmp_path / "u", say=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f"table of outcomes: 3 photos x 1 crop x {MASKS} masks = 27 passes")
    size = 3 * sum(t.nbytes for t in table._cache.first_row().values())
    assert lines[0].endswith(f", {size / 1e6:.1f} MB")
    cached(cnn, few, tmp_path / "u", say=lines.append)
    cached(cnn, photos, copied, crops=2, say=lines.append)
    assert len(lines) == 1  # nothing is missing
