"""The engine: exact oracles, one batch shape, bounded work, invalid maps, unreadable images."""

import inspect
import weakref

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone, Maps
from PIL import Image

from xattn.eval import Column, MaskedScorer, Protocol, evaluate, functional
from xattn.eval.metrics.scorer import pad_batch

LEVELS = (1.0, 0.5, 0.15)


def run(explainers=None, images=None, backbone=None, **options):
    options = {"max_forward_batch": 4, "progress": False, **options}
    images = fakes.images(6) if images is None else images
    return evaluate(backbone or FakeBackbone(), explainers or fakes.rows(), images, **options)


def column(results, method, metric, level):
    return results.methods[method].values[Column(metric, level)]


# ---------------------------------------------------------------- oracles


def test_all_ones_changes_nothing_at_any_level():
    results = run()
    for level in LEVELS:
        for metric in ("AD", "IC", "AG"):
            assert (column(results, "ones", metric, level) == 0).all()
    p = np.array([image.p for image in results.images])
    for level in LEVELS:
        assert (results.methods["ones"].scores[f"q@{100 * level:g}"] == p).all()


@pytest.mark.parametrize("masked_value", ["black", "mean"])
def test_values_equal_the_definition_image_by_image(masked_value):
    backbone, x = FakeBackbone(), fakes.images(5)
    results = run(images=x, protocol=Protocol(masked_value=masked_value))
    fill = torch.zeros(3, 1, 1) if masked_value == "black" else torch.tensor([0.5, 0.4, 0.3])
    fill = fill.view(3, 1, 1)

    def probability(image, target):
        return backbone.logits(image.expand(4, -1, -1, -1)).double().softmax(1)[0, target]

    for i, image in enumerate(x):
        full = backbone.logits(image.expand(4, -1, -1, -1)).double().softmax(1)[0]
        target = int(full.argmax())
        assert results.images[i].target == target
        grey, _ = functional.saliency(fakes.brightness(image[None], None), (18, 20))
        for level in LEVELS:
            keep = functional.threshold_mask(grey, level)[0]
            drop = 1 - keep
            q = probability(image * keep + fill * (1 - keep), target)[None]
            d = probability(image * drop + fill * (1 - drop), target)[None]
            p = full[target][None]
            for metric in ("AD", "IC", "ADD", "AG"):
                function = functional.VALUES[metric]
                got = column(results, "bright", metric, level)[i]
                want = function(p, d if metric == "ADD" else q).item()
                assert got == pytest.approx(want, rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------- one batch shape


def test_every_pass_has_the_one_shape_and_memory_is_bounded():
    backbone = FakeBackbone()
    results = run(backbone=backbone)
    assert set(backbone.shapes) == {(4, 3, 18, 20)}
    assert results.cost["forward_batches"] == len(backbone.shapes)


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_results_of_an_image_do_not_depend_on_how_many_there_are(n):
    x = fakes.images(9)
    whole, part = run(images=x), run(images=x[:n])
    assert whole.images[:n] == part.images
    for name in whole.methods:
        for key, values in part.methods[name].values.items():
            assert np.array_equal(whole.methods[name].values[key][:n], values)


def test_a_method_scores_the_same_whatever_stands_beside_it():
    rows = fakes.rows()
    alone, together = run({"bright": rows["bright"]}), run(rows)
    for key, values in alone.methods["bright"].values.items():
        assert np.array_equal(together.methods["bright"].values[key], values)


def test_identical_requests_are_scored_once():
    x = fakes.images(4)
    twice = {"a": Maps(fakes.brightness), "b": Maps(fakes.brightness), "ones": fakes.ones()}
    cost = run(twice, x).cost
    assert cost["scores_requested"] == 4 * 3 * 6
    assert cost["images_scored"] <= 4 + 4 * 6 + 4  # clean, one of a and b, black for "ones"


def test_explainers_see_full_batches_and_the_fixed_class():
    seen = []

    def spy(inputs, target):
        seen.append((tuple(inputs.shape), target.tolist()))
        return fakes.brightness(inputs, target)

    results = run({"spy": Maps(spy)}, fakes.images(6))
    targets = [image.target for image in results.images]
    assert seen == [
        ((4, 3, 18, 20), targets[:4]),
        ((4, 3, 18, 20), [*targets[4:], targets[5], targets[5]]),
    ]


def test_few_perturbed_images_are_alive_however_many_there_are(monkeypatch):
    alive, most, submit = weakref.WeakSet(), [0], MaskedScorer.submit

    def counted(self, perturbed, target, *options):
        alive.add(perturbed.untyped_storage())
        ticket = submit(self, perturbed, target, *options)
        assert len(self._waiting) <= 4 and len(self._buffer) == 4
        assert len(self._known) <= 4 * 8, "what is known is dropped with its chunk"
        most[0] = max(most[0], len(alive))
        return ticket

    monkeypatch.setattr(MaskedScorer, "submit", counted)
    run({"bright": Maps(fakes.brightness)}, (torch.rand(3, 18, 20) for _ in range(17)))
    assert most[0] <= 2, "beside the buffer only the image in hand"


def test_a_ticket_of_another_class_shares_the_pass():
    backbone, x = FakeBackbone(), fakes.images(2)
    scorer = MaskedScorer(backbone, 4)
    a, b, again = scorer.submit(x[0], 0), scorer.submit(x[0], 1), scorer.submit(x[0], 0)
    other = scorer.submit(x[1], 1)
    assert not a.done and again is a
    scorer.flush()
    expected = backbone.logits(pad_batch(x, 4)).double().softmax(1)
    assert (a.score, b.score) == (expected[0, 0].item(), expected[0, 1].item())
    assert other.score == expected[1, 1].item()
    assert (scorer.requested, scorer.scored, scorer.batches) == (4, 2, 1)


# ---------------------------------------------------------------- invalid maps


def test_invalid_maps_are_counted_and_left_out():
    def broken(inputs, target):
        maps = fakes.brightness(inputs, target).clone()
        bright = inputs.mean((1, 2, 3))
        maps[bright == 0.5] = 0.25  # constant
        maps[bright == 0.25] = float("nan")
        return maps

    x = fakes.images(6)
    x[1], x[4] = 0.5, 0.25
    results = run({"broken": Maps(broken), "centre": Maps(fakes.centre)}, x)
    assert results.methods["broken"].valid.tolist() == [True, False, True, True, False, True]
    values = column(results, "broken", "AD", 0.5)
    assert np.isnan(values).tolist() == [False, True, False, False, True, False]
    row = next(r for r in results.rows() if r.method == "broken")
    assert (row.n, row.n_invalid) == (4, 2)
    assert row.mean == pytest.approx(np.nanmean(column(results, "broken", "AD", 1.0)))
    assert results.compare("broken", "centre")[0].n == 4
    assert (results.protocol.n, results.protocol.n_invalid) == (6, 2)
    assert any("broken: 2 invalid maps" in w for w in results.warnings())


def test_a_method_without_one_valid_map_has_no_mean():
    results = run({"flat": fakes.Flat(FakeBackbone())})
    row = results.rows()[0]
    assert row.n == 0 and row.n_invalid == 6 and np.isnan(row.mean)


# ---------------------------------------------------------------- classes and images


def test_given_classes_by_index_name_or_one_an_image():
    results = run(classes="cat")
    assert {image.target_name for image in results.images} == {"cat"}
    assert results.protocol.class_policy == "given"
    assert results.protocol.id != run().protocol.id
    wanted = ["bee", 0, 4, "cat", 1, 3]
    assert [image.target for image in run(classes=wanted).images] == [1, 0, 4, 2, 1, 3]
    with pytest.raises(ValueError, match="classes: got 2"):
        run(classes=[1, 2])
    with pytest.raises(ValueError, match="classes: got 2"):
        run(classes=[1, 2], images=iter(fakes.images(3)))


def photos(folder, n=3):
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def photo_backbone():
    from xattn.backbone import Preprocessing

    backbone = FakeBackbone()
    backbone.preprocessing = Preprocessing((18, 20))
    return backbone


def test_unreadable_images_are_skipped_and_listed(tmp_path, photo_backbone):
    photos(tmp_path)
    (tmp_path / "1b.png").write_bytes(b"not an image")
    results = run(images=tmp_path, backbone=photo_backbone)
    assert [image.id for image in results.images] == ["0.png", "1.png", "2.png"]
    assert [s.id for s in results.skipped] == ["1b.png"]
    assert any("1 unreadable" in w and "1b.png" in w for w in results.warnings())
    assert results.protocol.view == "crop"
    wanted = run(images=tmp_path, backbone=photo_backbone, classes=[0, 1, 2, 3])
    assert [image.target for image in wanted.images] == [0, 1, 3], "positions count skipped ones"


def test_a_list_of_paths_and_pil_images_equals_the_folder(tmp_path, photo_backbone):
    photos(tmp_path)
    paths = sorted(tmp_path.iterdir())
    folder = run(images=str(tmp_path), backbone=photo_backbone)
    mixed = run(images=[paths[0], Image.open(paths[1]), str(paths[2])], backbone=photo_backbone)
    assert [i.p for i in folder.images] == [i.p for i in mixed.images]
    whole = run(images=paths, backbone=photo_backbone, view="whole")
    assert whole.protocol.id != folder.protocol.id


def test_nothing_readable_and_nothing_given(tmp_path, photo_backbone):
    (tmp_path / "bad.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="none of 1 could be read"):
        run(images=tmp_path, backbone=photo_backbone)
    with pytest.raises(ValueError, match="images: got none"):
        run(images=[])
    with pytest.raises(OSError):
        run(images=tmp_path / "missing", backbone=photo_backbone)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.full((1, 3, 18, 20), torch.nan), "NaN"),
        (3, "got a int"),
        ([torch.zeros(3, 18, 20), torch.zeros(3, 18, 21)], "sizes"),
        ([torch.zeros(3, 18, 20), "x.png"], "mixture"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_tensors_are_refused_by_name(images, said):
    with pytest.raises(ValueError, match=f"images: .*{said}"):
        run(images=images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"explainers": {"x": Maps(lambda x, t: torch.rand(len(x), 5, 3, 3))}}, "x returned"),
        ({"explainers": {"x": Maps(lambda x, t: np.zeros(3))}}, r"x returned \(3,\)"),
        ({"max_forward_batch": 0}, "max_forward_batch: got 0"),
        ({"levels": (0.0,)}, "levels"),
        ({"classes": [0]}, "classes"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        run(**options)
    with pytest.raises(ValueError, match="explainers: got none"):
        evaluate(FakeBackbone(), {}, fakes.images(1), progress=False)


def test_arguments_replace_the_protocols_fields():
    results = run(protocol=Protocol(threshold="kth", seed=3), levels=(0.25,))
    assert results.protocol.levels == (0.25,)
    assert (results.protocol.threshold, results.protocol.seed) == ("kth", 3)
    assert {c.key for c in results.columns} == {"AD@25", "IC@25", "ADD@25", "AG@25"}


def test_global_random_state_is_untouched():
    torch.manual_seed(0)
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run().rows()
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(state, np.random.get_state()[1])


def test_the_public_names_resolve_and_have_docstrings():
    import xattn.eval

    for name in xattn.eval.__all__:
        value = getattr(xattn.eval, name)
        assert not inspect.isclass(value) or value.__doc__
    with pytest.raises(AttributeError):
        xattn.eval.nothing  # noqa: B018


def test_saturated_maps_whose_ties_keep_too_much_are_counted():
    def saturated(inputs, target):
        return (
            fakes.brightness(inputs, target).sub(0.45).sign()
        )  # about half of the map at its maximum

    images = torch.rand(3, 3, 18, 20, generator=torch.Generator().manual_seed(0))
    rows = {"saturated": Maps(saturated), "plain": Maps(fakes.noise)}
    results = evaluate(FakeBackbone(), rows, images, max_forward_batch=4, progress=False)
    assert results.methods["saturated"].tied == 3 and results.methods["plain"].tied == 0
    assert any("keeps too many pixels because of ties" in line for line in results.warnings())


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (lambda: fakes.images(1), 8),
        (lambda: fakes.images(9), 12),
        (lambda: fakes.images(40), 32),
        (lambda: iter(fakes.images(3)), 32),  # of a generator nobody knows the length
    ],
)
def test_passes_are_as_small_as_the_images_are_few(given, size):
    seen = []

    def counted(x, t):
        seen.append(len(x))
        return fakes.brightness(x, t)

    backbone = FakeBackbone()
    found = run({"counted": Maps(counted)}, given(), backbone, max_forward_batch=32)
    assert {shape[0] for shape in backbone.shapes} == set(seen) == {size}
    assert found.cost["max_forward_batch"] == size


def test_a_limit_is_the_same_run_as_so_many_images():
    x = fakes.images(40)
    few = run(images=list(x), limit=3, max_forward_batch=32)
    rows = run(images=x[:3], max_forward_batch=32)
    for name in few.methods:
        values = [column(r, name, "AD", 0.5) for r in (few, rows)]
        np.testing.assert_array_equal(*values)
