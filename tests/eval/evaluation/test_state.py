"""An evaluation's state: killed runs go on, foreign files are refused, failures have reasons."""

import json
import sqlite3

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone, Maps

from xattn.eval import evaluate
from xattn.eval.evaluation.store import ImageRow, Store, kept_images
from xattn.eval.report.results_files import to_dict


def run(state=None, rows=None, images=None, **options):
    options = {"max_forward_batch": 4, "progress": False, **options}
    images = fakes.images(10) if images is None else images
    return evaluate(FakeBackbone(), rows or fakes.rows(), images, state=state, **options)


def numbers(results):
    data = to_dict(results)
    del data["cost"]
    return json.dumps(data)


def test_a_killed_run_goes_on_and_computes_nothing_twice(tmp_path):
    whole = run()
    seen = []

    class Dies(Maps):
        def attribute(self, inputs, target):
            seen.append(len(inputs))
            if len(seen) == 2:
                raise KeyboardInterrupt
            return super().attribute(inputs, target)

    rows = fakes.rows()
    rows["bright"] = Dies(fakes.brightness)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.sqlite", rows)
    calls = []

    class Counts(Dies):
        def attribute(self, inputs, target):
            calls.append(len(inputs))
            return self.function(inputs, target)

    rows["bright"] = Counts(fakes.brightness)
    rows["bright"].__class__.__qualname__ = Dies.__qualname__
    resumed = run(tmp_path / "state.sqlite", rows)
    assert numbers(resumed) == numbers(whole)
    assert len(calls) in (2, 3), "three chunks, of which the first may be there"


def test_a_finished_run_is_only_read(tmp_path):
    first = run(tmp_path / "state.sqlite")
    again = run(tmp_path / "state.sqlite")
    assert numbers(again) == numbers(first)
    assert again.cost["images_scored"] == 0


def test_another_method_is_added_to_a_state(tmp_path):
    rows = fakes.rows()
    bright = {"bright": rows["bright"]}
    run(tmp_path / "state.sqlite", bright)
    both = run(tmp_path / "state.sqlite", rows)
    assert numbers(both) == numbers(run(rows=rows))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"levels": (1.0,)}, "metrics"),
        ({"max_forward_batch": 8}, "max_forward_batch"),
        ({"classes": 2}, "classes"),
        ({"seed": 3}, "protocol"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, change, named):
    run(tmp_path / "state.sqlite")
    with pytest.raises(ValueError, match=f"state: .* belongs to another run.*{named}"):
        run(tmp_path / "state.sqlite", **change)


def test_other_images_are_refused(tmp_path):
    from PIL import Image

    for name, shade in (("a", 90), ("b", 30)):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(shade).integers(0, 255, (18, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / f"{name}.png")
    from xattn import load_backbone

    backbone = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    rows = {"bright": Maps(fakes.brightness)}
    options = {"progress": False, "state": tmp_path / "state.sqlite", "max_forward_batch": 4}
    evaluate(backbone, rows, tmp_path / "a", **options)
    with pytest.raises(ValueError, match=r"state: image 0 was a\.png and is now b\.png"):
        evaluate(backbone, rows, tmp_path / "b", **options)


def test_a_changed_picture_is_refused(tmp_path):
    x = fakes.images(6)
    run(tmp_path / "state.sqlite", images=x)
    x[3, 0, 0, 0] += 0.01
    with pytest.raises(ValueError, match="state: image 3 has changed since it was measured"):
        run(tmp_path / "state.sqlite", images=x)


def test_fewer_and_more_images_of_one_state_are_those_that_were_asked_for(tmp_path):
    x = fakes.images(9)
    run(tmp_path / "state.sqlite", images=x[:7])
    assert numbers(run(tmp_path / "state.sqlite", images=x[:5])) == numbers(run(images=x[:5]))
    assert numbers(run(tmp_path / "state.sqlite", images=x)) == numbers(run(images=x))


def test_a_run_of_few_images_goes_on_with_more_at_its_own_shape(tmp_path):
    x, state = fakes.images(14), tmp_path / "state.sqlite"
    run(state, images=x[:5], max_forward_batch=32)
    with pytest.raises(ValueError, match=r"^state: .*resume it with max_forward_batch=8"):
        run(state, images=x, max_forward_batch=32)
    grown = run(state, images=x, max_forward_batch=8)
    assert numbers(grown) == numbers(run(images=x, max_forward_batch=8))


def test_a_user_can_read_the_state(tmp_path):
    results = run(tmp_path / "state.sqlite")
    with sqlite3.connect(tmp_path / "state.sqlite") as database:
        query = "SELECT avg(json_extract(measured, '$.\"AD@50\"')) FROM results WHERE method = ?"
        (mean,) = database.execute(query, ("bright",)).fetchone()
        (png,) = database.execute("SELECT map FROM results WHERE method = 'bright'").fetchone()
    assert mean == pytest.approx(results.mean("bright", "AD", 0.5))
    assert png.startswith(b"\x89PNG")


# ---------------------------------------------------------------- failing explainers


def test_an_explainer_that_fails_on_one_image_is_counted_with_its_reason():
    x = fakes.images(6)
    x[2] = x[2] * 0.1

    def picky(inputs, target):
        if (inputs.mean((1, 2, 3)) < 0.2).any():
            raise RuntimeError("too dark for me")
        return fakes.brightness(inputs, target)

    results = run(rows={"picky": Maps(picky), "bright": Maps(fakes.brightness)}, images=x)
    picky_, bright = results.methods["picky"], results.methods["bright"]
    assert picky_.valid.tolist() == [True, True, False, True, True, True]
    assert picky_.reasons == {2: "RuntimeError: too dark for me"}
    assert any("too dark for me" in w for w in results.warnings())
    for column, values in picky_.values.items():
        good = [0, 1, 3, 4, 5]
        assert np.array_equal(values[good], bright.values[column][good]) and np.isnan(values[2])


def test_an_explainer_that_never_works_raises_its_error():
    def never(inputs, target):
        raise RuntimeError("not my model")

    with pytest.raises(ValueError, match="never cannot work: it raised RuntimeError: not my"):
        run(rows={"never": Maps(never)})


def test_non_finite_and_constant_maps_have_a_reason():
    def odd(inputs, target):
        maps = fakes.brightness(inputs, target)
        maps[0, 0, 0, 0], maps[1] = torch.inf, 1.0
        return maps

    results = run(rows={"odd": Maps(odd)}, images=fakes.images(4))
    assert results.methods["odd"].reasons == {0: "non-finite map", 1: "constant map"}


def test_explainers_with_batches_of_their_own_get_images_unpadded_one_by_one():
    seen = []

    class Perturbs(Maps):
        one_by_one = True

        def attribute(self, inputs, target):
            seen.append(len(inputs))
            return super().attribute(inputs, target)

    alone = run(rows={"bright": Perturbs(fakes.brightness)}, images=fakes.images(5))
    assert seen == [1] * 5
    padded = run(rows={"bright": Maps(fakes.brightness)}, images=fakes.images(5))
    assert numbers(alone) == numbers(padded)


def test_a_state_tells_options_apart_that_are_no_plain_values():
    from xattn import create_head, load_backbone
    from xattn.eval.evaluation.facts import describe
    from xattn.explainers import create_explainer

    backbone = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
    head = create_head("ttame", backbone)
    made = [
        create_explainer("gradient_shap", backbone, baselines=torch.zeros(1, 3, 1, 1)),
        create_explainer("gradient_shap", backbone, baselines=torch.ones(1, 3, 1, 1)),
        create_explainer("rise", backbone, masks=np.int64(8)),
        create_explainer("rise", backbone, masks=np.int64(9)),
        create_explainer("head", backbone, head, maps="scores"),
        create_explainer("head", backbone, head, maps="mask"),
        create_explainer("layercam", backbone, layer=backbone.model.layer1),
        create_explainer("layercam", backbone, layer=backbone.model.layer2),
    ]
    assert len({json.dumps(describe(explainer), sort_keys=True) for explainer in made}) == 8


def test_an_explainer_that_worked_before_the_kill_is_not_given_up(tmp_path):
    def picky(inputs, target):
        if (inputs.mean((1, 2, 3)) < 0.2).any():
            raise RuntimeError("too dark")
        return fakes.brightness(inputs, target)

    class Perturbs(Maps):
        one_by_one = True

    x = fakes.images(8)
    x[4:] *= 0.1
    rows = {"picky": Perturbs(picky)}
    whole = run(rows=rows, images=x)
    assert whole.methods["picky"].valid.tolist() == 4 * [True] + 4 * [False]
    run(tmp_path / "state.sqlite", rows=rows, images=x[:4])
    assert numbers(run(tmp_path / "state.sqlite", rows=rows, images=x)) == numbers(whole)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "damage", [b"my thesis, do not delete" * 100, lambda data: data[:2000] + b"\1" * 3000]
)
def test_a_file_that_is_damaged_or_no_state_is_refused_in_one_line_and_kept(tmp_path, damage):
    path = tmp_path / "state.sqlite"
    if callable(damage):
        run(path)
        damage = damage(path.read_bytes())
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"^state: .*state.sqlite cannot be used .*another file$"):
        run(path)
    assert path.read_bytes() == damage


def test_the_database_of_another_program_is_refused_and_kept(tmp_path):
    path = tmp_path / "bills.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE bills(id INTEGER)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"bills.sqlite is not the state of an evaluation.*'bills'"
    ):
        run(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_state_is_one_file_after_a_run_a_refusal_and_a_reader(tmp_path):
    path = tmp_path / "state.sqlite"
    run(path, images=fakes.images(6), kept_maps=6)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="belongs to another run"):
        run(path, images=fakes.images(6), seed=9)
    assert list(tmp_path.iterdir()) == [path]
    assert len(list(kept_images(path, None, 6))) == 6
    assert list(tmp_path.iterdir()) == [path]


def test_processes_write_into_one_file_and_leave_nothing_beside_it(tmp_path):
    path = tmp_path / "state.sqlite"
    stores = [Store(path, {}) for _ in range(2)]
    for rank, store in enumerate(stores):
        store.add_images([ImageRow(rank, f"{rank}.png", 1, "bee", 0.5)])
        store.add_map(rank, "cam", np.full((2, 3), rank))
    for store in stores:
        assert [image.id for image in store.images()] == ["0.png", "1.png"]
    for store in stores:
        store.close()
    assert [set(kept.maps) for kept in kept_images(path, None, 9)] == [{"cam"}, {"cam"}]
    assert list(tmp_path.iterdir()) == [path]
