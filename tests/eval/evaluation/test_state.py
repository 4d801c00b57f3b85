"""An evaluation's state: killed runs go on, foreign files are refused, failures have reasons."""

import json
import sqlite3

import eval_fakes as fakes
import numpy as np
import pytest
import torch
from eval_fakes import FakeBackbone, Maps

from xattn.eval import evaluate
from xattn.eval.evaluation.database import ImageRow
from xattn.eval.evaluation.kept_maps import kept_images
from xattn.eval.evaluation.store import Store
from xattn.eval.report.html_data import map_images
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
    with pytest.raises(ValueError, match=r"state: image 0 was a\.png and is b\.png now"):
        evaluate(backbone, rows, tmp_path / "b", **options)


def test_a_changed_picture_is_refused(tmp_path):
    x = fakes.images(6)
    run(tmp_path / "state.sqlite", images=x)
    x[3, 0, 0, 0] += 0.01
    with pytest.raises(ValueError, match="state: image 3 is not the picture that was measured"):
        run(tmp_path / "state.sqlite", images=x)


def test_fewer_and_more_images_of_one_state_are_those_that_were_asked_for(tmp_path):
    x = fakes.images(9)
    run(tmp_path / "state.sqlite", images=x[:7])
    assert numbers(run(tmp_path / "state.sqlite", images=x[:5])) == numbers(run(images=x[:5]))
    assert numbers(run(tmp_path / "state.sqlite", images=x)) == numbers(run(images=x))


def test_a_run_of_few_images_goes_on_with_more_at_its_own_shape(tmp_path):
    x, state = fakes.images(14), tmp_path / "state.sqlite"
    run(state, images=x[:5], max_forward_batch=32)
    with pytest.raises(ValueError, match=r"^state: .*max_forward_batch=8 goes on with it"):
        run(state, images=x, max_forward_batch=32)
    grown = run(state, images=x, max_forward_batch=8)
    assert numbers(grown) == numbers(run(images=x, max_forward_batch=8))


def test_a_file_that_is_no_state_is_refused_and_kept(tmp_path):
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"my thesis, do not delete" * 100)
    with pytest.raises(ValueError, match="state: .* is not an SQLite file"):
        run(path)
    assert path.read_bytes() == b"my thesis, do not delete" * 100


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


# ---------------------------------------------------------------- files of several processes


def test_a_file_that_another_process_is_just_making_is_no_state_yet(tmp_path):
    (tmp_path / "state.rank1.sqlite").touch()
    results = run(tmp_path / "state.sqlite")
    assert numbers(results) == numbers(run())
    assert not (tmp_path / "state.rank1.sqlite").exists()


def test_what_another_process_left_is_taken_in(tmp_path):
    whole = run(tmp_path / "whole.sqlite", images=fakes.images(8))
    (tmp_path / "whole.sqlite").rename(tmp_path / "state.rank1.sqlite")
    again = run(tmp_path / "state.sqlite", images=fakes.images(8))
    assert numbers(again) == numbers(whole) and again.cost["images_scored"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["state.sqlite"]


def test_other_files_beside_the_state_are_left_alone(tmp_path):
    run(tmp_path / "state.2.sqlite")
    run(tmp_path / "state.sqlite")
    assert (tmp_path / "state.2.sqlite").exists()


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


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results of a run and the bytes of its state, with maps."""
    path = tmp_path_factory.mktemp("finished") / "state.sqlite"
    return run(path, images=fakes.images(6), kept_maps=6), path.read_bytes()


def read_all(path):
    """All that a comparison reads of its state."""
    results = run(path, images=fakes.images(6), kept_maps=6)
    map_images(results, path, [(m, i) for m in range(len(results.methods)) for i in range(6)])
    list(kept_images(path, None, 6))
    return results


def refused(path):
    """What is said of a state, None where it is read."""
    try:
        read_all(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def test_a_state_that_is_cut_or_flipped_anywhere_is_refused_in_one_line_or_read(tmp_path, finished):
    data = finished[1]
    rng, messages = np.random.default_rng(0), []
    for number in range(60):
        changed = bytearray(data)
        at = int(rng.integers(len(data)))
        if number % 3 == 0:
            changed = changed[:at]
        elif number % 3 == 1:
            changed[at] ^= 1 << int(rng.integers(8))
        else:
            length = int(rng.integers(1, 4096))
            changed[at : at + length] = rng.bytes(len(changed[at : at + length]))
        path = tmp_path / f"{number}.sqlite"
        path.write_bytes(changed)
        messages.append(refused(path))
        if messages[-1] is not None:
            assert str(path) in messages[-1] and "\n" not in messages[-1]
            assert "give another file" in messages[-1] and path.read_bytes() is not None
        assert [p.name for p in tmp_path.iterdir()] == [path.name], "no -wal and no -shm"
        path.unlink()
    assert sum(message is not None for message in messages) > 20


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = '{' WHERE key = 'protocol'",
        "UPDATE meta SET value = NULL",
        "UPDATE images SET id = x'ff' WHERE position = 1",
        "UPDATE images SET target = 'cat'",
        "UPDATE images SET target = NULL",
        "UPDATE images SET score = 'high' WHERE position = 2",
        "UPDATE images SET digest = CAST(x'ff' AS TEXT) WHERE position = 2",
        "UPDATE results SET measured = '[1, 2]'",
        'UPDATE results SET measured = \'{"AD@50": "high"}\'',
        "UPDATE results SET measured = '{\"AD@51\": 1.0}'",
        "UPDATE results SET measured = '{\"AD@50\": 1' || printf('%.400d', 0) || '}'",
        "UPDATE results SET scores = '{\"deletion\": 1}'",
        "UPDATE results SET scores = printf('%.*c', 100000, '[')",
        "UPDATE results SET tied = 'many', seconds = NULL",
        "UPDATE results SET map = x'89504e47'",
        "UPDATE results SET map = 'no bytes'",
        "UPDATE maps SET height = 1000000",
        "UPDATE maps SET width = NULL",
        "UPDATE maps SET data = zeroblob(3)",
        "UPDATE maps SET data = x'0000c07f' || substr(data, 5)",
        "UPDATE tops SET top = '[[1, 2, 3]]'",
        "UPDATE tops SET top = '7'",
        "DELETE FROM maps; UPDATE images SET target = 1000",
        "ALTER TABLE images DROP COLUMN digest",
        "ALTER TABLE results RENAME COLUMN measured TO counted; ALTER TABLE results DROP COLUMN map",
    ],
)
def test_a_state_that_says_what_cannot_be_is_refused_by_name_with_the_remedy(
    tmp_path, finished, statement
):
    path = tmp_path / "state.sqlite"
    path.write_bytes(finished[1])
    database = sqlite3.connect(path)
    database.executescript(statement)
    database.close()
    message = refused(path)
    assert message is not None and message.startswith("state: ") and "\n" not in message
    assert str(path) in message and "give another file" in message


def test_the_database_of_another_program_is_refused_and_kept(tmp_path):
    path = tmp_path / "bills.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE bills(id INTEGER)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"bills.sqlite is not of an evaluation.*'bills'"):
        run(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_state_is_one_file_after_a_run_a_refusal_and_a_reader(tmp_path, finished):
    path = tmp_path / "state.sqlite"
    read_all(path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="belongs to another run"):
        run(path, seed=9)
    assert list(tmp_path.iterdir()) == [path]
    database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    assert database.execute("SELECT count(*) FROM images").fetchone() == (6,)
    database.close()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("again", [False, True])
def test_processes_read_one_file_in_the_end_and_leave_nothing_beside_it(tmp_path, again):
    path = tmp_path / "state.sqlite"
    if again:  # both files are there: each process opens the other's
        for store in [Store(path, {}, rank) for rank in range(2)]:
            store.close()
    stores = [Store(path, {}, rank) for rank in range(2)]
    for rank, store in enumerate(stores):
        store.add_images([ImageRow(rank, f"{rank}.png", 1, "bee", 0.5)])
    stores[1].close()
    stores[0].merge()
    stores[1].reopen()
    assert [[image.id for image in store.images()] for store in stores] == 2 * [["0.png", "1.png"]]
    for store in stores:
        store.close()
    assert len(list(kept_images(path, None, 9))) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_refusing_another_programs_database_leaves_its_journal_mode(tmp_path):
    path = tmp_path / "state.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE notes(text)")
    connection.close()
    with pytest.raises(ValueError, match="'notes'"):
        Store(path, {})
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_state_that_another_process_reads_at_the_end_still_waits_for_locks(tmp_path):
    store = Store(tmp_path / "state.sqlite", {})
    reader = sqlite3.connect(tmp_path / "state.sqlite")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM meta").fetchall()
    store._own.settle()
    assert store._own.rows("PRAGMA busy_timeout") == [(60000,)]
    reader.close()
    store.close()


@pytest.mark.parametrize("text", ["[" * 70 + "]" * 70, "9" * 5000, 7, None])
def test_a_value_that_is_no_usable_json_is_damage(text):
    with pytest.raises(ValueError, match="state: .* is damaged"):
        Store(None, {})._own.value(text)
