"""Training heads on tables of outcomes: what is learned, from which photos, and runs that are killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image
from torch import nn
from training_runs import write_photos, write_weights

import xattn
from xattn.cli import main
from xattn.config import TrainConfig
from xattn.heads import create_head, head_class, head_entry, list_heads, load_head
from xattn.heads.probed import probed
from xattn.photos.sources import open_photos
from xattn.training import fit, outcome_fitting
from xattn.training.objectives.outcomes import outcome_terms, reacts_to_masks
from xattn.training.outcome_fitting import (
    NO_REACTION,
    TapStore,
    drawn_classes,
    stack_taps,
    tap_tensors,
)
from xattn.training.outcome_rows import RowMaker
from xattn.training.outcomes import OutcomeBatch, cache_outcomes

COUNT, MASKS, CLASSES = 21, 8, 5
HEADS = [n for n in list_heads() if not (head_class(n).is_classifier or head_entry(n).taps)]
QUICK = {"epochs": 2, "batch_size": 4, "workers": 0, "masks": MASKS, "lr": 0.01}


def quick(**options):
    return TrainConfig("outcomes", **{**QUICK, **options})


def evidence(backbone, **options):
    torch.manual_seed(0)
    return create_head("evidence", backbone, **{"components": 4, "hidden": 5, **options})


def fitted(head, backbone, data, config=None, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a head needs 20 or more")
        return fit(head, backbone, data, config or quick(), progress=False, **options)


def network(name="test_resnet", **options):
    torch.manual_seed(0)
    return xattn.load_backbone(name, None, **{"input_size": 64, "num_classes": CLASSES, **options})


@pytest.fixture(scope="module")
def cnn():
    return network()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), COUNT)


@pytest.fixture(scope="module")
def table(cnn, photos, tmp_path_factory):
    """Of all photos."""
    folder = tmp_path_factory.mktemp("table") / "t"
    return cache_outcomes(cnn, photos, folder, masks=MASKS, progress=False)


def assert_equal_heads(a, b):
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), key


# ---------------------------------------------------------------- which tables are of use


def test_a_finished_table_of_the_game_of_an_objective_is_accepted(cnn, photos, tmp_path):
    few = sorted(photos.iterdir())[:4]
    options = {"fills": ["black"], "players": 2, "sizes": "shapley", "masks": 4, "progress": False}
    with pytest.warns(UserWarning, match="table: only 4 photos could be read"):
        whole = cache_outcomes(cnn, few, tmp_path / "a", empty=True, **options)
        without = cache_outcomes(cnn, few, tmp_path / "b", **options)
    config = TrainConfig("outcomes", "shapley", workers=0, epochs=1)
    assert fitted(evidence(cnn), cnn, few, config, table=whole).steps == 1
    with pytest.raises(ValueError, match="shapley needs masks .* and the empty photo"):
        fitted(evidence(cnn), cnn, few, config, table=without)


# ---------------------------------------------------------------- what is learned


class Additive(nn.Module):
    """Two labels, whose logits are sums over cells of colours times weights."""

    def __init__(self):
        super().__init__()
        self.classifier_weight = torch.tensor([[4.0, -3.0, 1.0], [-2.0, 1.0, 3.0]])
        self.classifier_bias = torch.tensor([-0.3, -0.5])
        self.preprocessing = xattn.Preprocessing((56, 56), mean=(0.0,) * 3, std=(1.0,) * 3)

    def forward_taps(self, x):
        colours = nn.functional.avg_pool2d(x, 2)
        logits = colours.mean((2, 3)) @ self.classifier_weight.t() + self.classifier_bias
        return logits, (colours,)


def lowest_correlation(head, backbone):
    """Of the head's maps of both labels with each cell's effect, on photos that it never saw."""
    coarse = torch.rand(4, 3, 7, 7, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        taps = backbone(nn.functional.interpolate(coarse, (56, 56), mode="bilinear"))
        found = head(taps).flatten(0, 1).flatten(1)
    expected = torch.einsum("kc,bchw->bkhw", backbone.classifier_weight, taps.maps[0])
    rows = zip(found, expected.flatten(0, 1).flatten(1), strict=True)
    return min(torch.corrcoef(torch.stack(both))[0, 1].item() for both in rows)


def test_a_linear_network_is_recovered(photos, tmp_path):
    """A head whose other parts are wrong at first unlearns them."""
    backbone = xattn.load_backbone(Additive(), task="multilabel")
    table = cache_outcomes(
        backbone, photos, tmp_path / "t", masks=32, fills=["black"], progress=False
    )
    head = evidence(backbone)
    with torch.no_grad():
        head.contrast.fill_(0.5)
        head.features.fill_(0.3)
        head.network[-1].bias.fill_(0.1)
        head.network[-1].weight.normal_(std=0.1)
    assert lowest_correlation(head, backbone) < 0.97
    config = quick(epochs=60, lr=0.02, others=1, batch_size=7)
    result = fitted(head, backbone, photos, config, table=table)
    assert result.losses["log_odds"] > 0.999
    assert lowest_correlation(head, backbone) > 0.999


@pytest.mark.parametrize("name", HEADS)
def test_every_explanation_head_learns_from_outcomes(cnn, photos, table, name):
    torch.manual_seed(0)
    head = create_head(name, cnn)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    result = fitted(head, cnn, photos, quick(epochs=1), table=table)
    assert result.steps == 6 and set(result.losses) == {"loss", "probability", "log_odds", "others"}
    assert any(not torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert head.summary["config"]["objective"] == "outcomes"
    assert head.summary["table"]["masks"] == MASKS and "squares32" in head.summary["table"]["kinds"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loss_falls(cnn, photos, table, precision, tmp_path):
    config = quick(epochs=15, batch_size=21, others=0, lr=0.03, precision=precision)
    fitted(evidence(cnn), cnn, photos, config, table=table, output=tmp_path / "run")
    losses = [json.loads(s)["loss"] for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize(
    "kind", ["multilabel", "binary", "vit", "own classes", "two crops", "wide"]
)
def test_other_networks_and_tables(kind, photos, tmp_path):
    options = {
        "vit": {"name": "test_vit", "taps": ["norm1.4", "norm1.5"]},
        "binary": {"num_classes": 1},
    }
    backbone = network(
        **options.get(kind, {}), **({"task": kind} if kind in ("multilabel", "binary") else {})
    )
    if kind == "own classes":
        plain = backbone.with_taps(["head"])
        own = create_head("abmilp", plain, classes=3)
        nn.init.normal_(own.classifier.weight)
        backbone = probed(plain, own)
    if kind == "wide":
        backbone = backbone.to(torch.float64)
    head = evidence(backbone)
    head = head.double() if kind == "wide" else head
    few, crops = sorted(photos.iterdir())[:5], 2 if kind == "two crops" else 1
    result = fitted(head, backbone, few, quick(crops=crops), output=tmp_path / "run")
    assert result.steps == 2 * -(-5 * crops // 4) and result.losses["loss"] < 2
    loaded = load_head(tmp_path / "run/head", backbone)
    assert loaded.summary["config"]["crops"] == crops
    assert (tmp_path / "run-outcomes/key.json").is_file()


def batch_of(logits, masks, task="multiclass"):
    names = tuple(map(str, range(len(logits))))
    return OutcomeBatch(masks, logits, None, None, task, logits.shape[2], names)


def test_the_own_class_comes_first_then_others_of_the_most_probable():
    logits = torch.arange(20.0).flip(0).expand(2, 5, 20)
    batch = batch_of(logits, torch.rand(2, 4, 28, 28))
    draws = [drawn_classes(batch, [f"{s}", "x"], 2) for s in range(40)]
    assert all(d[:, 0].tolist() == [0, 0] for d in draws)
    assert {k for d in draws for k in d[0, 1:].tolist()} == set(range(1, 12))
    assert all(torch.equal(d[1], draws[0][1]) for d in draws)
    assert drawn_classes(batch_of(logits[..., :2], batch.masks), "ab", 5).shape == (2, 2)
    labels = batch_of(logits - 17.5, batch.masks, "multilabel")  # two are positive
    assert {int(drawn_classes(labels, [f"{s}", "x"], 2)[0, 0]) for s in range(40)} == {0, 1}


def test_outcomes_without_reaction_count_for_nothing():
    masks = torch.rand(1, 8, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = torch.rand(1, 9, 3, generator=torch.Generator().manual_seed(1))
    batch = batch_of(logits, masks, "multilabel")
    scores = torch.rand(1, 2, 28, 28, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([[0, 2]])
    moved = outcome_terms(scores, batch, index)
    logits[..., 2] = 1.0
    still = outcome_terms(scores, batch, index)
    own = (still["probability"] + still["log_odds"]) / 2
    torch.testing.assert_close(still["loss"], 1 - own)
    torch.testing.assert_close(1 - moved["loss"], (2 * own + moved["others"]) / 3)
    assert still["others"] == 0


# ---------------------------------------------------------------- which photos


def test_a_photo_whose_class_does_not_react_is_left_out_counted_and_named(cnn, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "p")
    Image.new("RGB", (70, 50)).save(folder / "zblack.png")
    (folder / "zbroken.png").write_bytes(b"no picture")
    result = fitted(evidence(cnn), cnn, folder, output=tmp_path / "run")
    assert [(n.rpartition("/")[2], r) for n, r in result.skipped][1] == ("zblack.png", NO_REACTION)
    assert result.skipped[0][0].endswith("zbroken.png") and len(result.skipped) == 2
    assert result.head.summary["images"] == COUNT and result.head.summary["skipped"] == 2
    assert len(json.loads((tmp_path / "run/skipped.json").read_text())) == 2
    for name in ("a", "b"):
        Image.new("RGB", (70, 50)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="do not react to masks in any of the 2 photos"):
        fitted(evidence(cnn), cnn, [tmp_path / "a.png", tmp_path / "b.png"])


def test_a_photo_is_left_out_if_its_class_does_not_react_in_one_of_its_crops(
    cnn, photos, monkeypatch
):
    crops = iter([{}, {2}])  # photos that do not react

    def reacting(masks, outcomes):
        still = next(crops, None)
        if still is None:  # while it learns
            return reacts_to_masks(masks, outcomes)
        return torch.tensor([[i not in still] for i in range(len(masks))])

    monkeypatch.setattr(outcome_fitting, "reacts_to_masks", reacting)
    config = quick(crops=2, epochs=1, batch_size=COUNT)
    result = fitted(evidence(cnn), cnn, photos, config)
    assert result.skipped == [(str(sorted(photos.iterdir())[2]), NO_REACTION)]


def test_a_table_may_have_more_photos_than_the_data(cnn, photos, table, tmp_path):
    few = [sorted(photos.iterdir())[i] for i in (7, 2, 11)]
    given, own = evidence(cnn), evidence(cnn)
    with pytest.warns(UserWarning, match="table: only 3 photos .*, but a head needs 20 or more"):
        fit(given, cnn, few, quick(), table=table, progress=False)
    assert given.summary["images"] == 3
    part = table.subset(few)
    fitted(own, cnn, open_photos(few), table=part)
    assert_equal_heads(given, own)
    assert table.find([few[1], str(few[0])]) == [2, 7]


def test_fewer_than_20_photos_are_warned_of(cnn, photos):
    with pytest.warns(
        UserWarning, match="table: only 5 photos could be read, but a head needs 20 or more"
    ):
        fit(evidence(cnn), cnn, sorted(photos.iterdir())[:5], quick(epochs=1), progress=False)


@pytest.mark.parametrize("limit", [0, 40_000, 1 << 30])
def test_kept_taps_are_those_of_a_pass(photos, limit):
    vit = network("test_vit", taps=["norm1.4", "stage.5"])
    store = TapStore(vit, open_photos(photos), quick(), range(20), crops=2, limit=limit)
    found = store.taps([(1, 3), (0, 17), (0, 3)])
    again = TapStore(vit, open_photos(photos), quick(), range(20), crops=2)
    for a, b in zip(
        tap_tensors(found), tap_tensors(again.taps([(1, 3), (0, 17), (0, 3)])), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert found.prefixes[1] is None and found.prefix is not None
    assert not torch.equal(found.logits[0], found.logits[2])
    rows = [found.each(lambda t, i=i: t[i]) for i in range(3)]
    assert all(
        torch.equal(a, b)
        for a, b in zip(tap_tensors(stack_taps(rows)), tap_tensors(found), strict=True)
    )
    assert sum(len(taps.logits) for taps in store.all()) == 40


# ---------------------------------------------------------------- refusals


def test_a_classifier_is_refused_by_name(cnn, photos, table):
    head = create_head("abmilp", cnn.with_taps(["head"]))
    with pytest.raises(ValueError, match="head: 'abmilp' is a classifier.*xattn probe"):
        fitted(head, cnn, photos, table=table)


def test_tables_of_other_networks_settings_and_photos_are_refused(cnn, photos, table, tmp_path):
    few = sorted(photos.iterdir())[:4]
    other = network("test_efficientnet")
    with pytest.raises(
        ValueError, match=f"{cnn.fingerprint}, but the backbone has {other.fingerprint}"
    ):
        fitted(evidence(other), other, few, table=table)
    larger = network(input_size=96)
    with pytest.raises(ValueError, match="table: .*preprocessing.*64.*the backbone has.*96"):
        fitted(evidence(larger), larger, few, table=table)
    stranger = tmp_path / "x.png"
    shutil.copy(few[0], stranger)
    with pytest.raises(ValueError, match="x.png is not in the table"):
        fitted(evidence(cnn), cnn, [*few, stranger], table=table)
    fitted(evidence(cnn), cnn, few, table=tmp_path / "t")
    for data, config in ((few, quick(masks=6)), (few[:3], quick()), (few, quick(seed=3))):
        with pytest.raises(ValueError, match=r"table: .*[0-9a-f]{8}.*[0-9a-f]{8}"):
            fitted(evidence(cnn), cnn, data, config, table=tmp_path / "t")


def test_what_cannot_end_well_is_refused_before_a_table_is_computed(cnn, photos, tmp_path):
    with pytest.raises(
        ValueError, match="table: got a table, but objective='mask' does not read one"
    ):
        fitted(evidence(cnn), cnn, photos, TrainConfig("small", workers=0), table=tmp_path / "t")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="output: .* is not empty and holds no run"):
        fitted(evidence(cnn), cnn, photos, output=taken)
    with pytest.raises(ValueError, match="resume: .* holds no run"):
        fitted(evidence(cnn), cnn, photos, output=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="table: .* is in output"):
        fitted(evidence(cnn), cnn, photos, output=tmp_path / "run", table=tmp_path / "run/t")
    assert not list(tmp_path.glob("*-outcomes")) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["masks", "others"])
def test_bad_settings_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}: got -1"):
        TrainConfig("outcomes", **{option: -1})


# ---------------------------------------------------------------- resuming


def killed_at(step, train, folder):
    def stop(now, _):
        if now == step:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(folder, on_checkpoint=stop)


@pytest.mark.parametrize("step", [0, 6])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(cnn, photos, table, tmp_path, step):
    def train(folder, **options):
        config = quick(checkpoint_every=2)
        return fitted(
            evidence(cnn), cnn, photos, config, output=folder, table=table, **options
        ).head

    whole = train(tmp_path / "whole")
    killed_at(step, train, tmp_path / "run")
    assert_equal_heads(train(tmp_path / "run", resume=True), whole)


def test_a_run_that_was_killed_before_its_first_checkpoint_takes_statistics(
    cnn, photos, table, tmp_path
):
    def train(folder, **options):
        return fitted(evidence(cnn), cnn, photos, output=folder, table=table, **options).head

    whole = train(tmp_path / "whole")
    killed_at(0, train, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert_equal_heads(train(tmp_path / "run", resume=True), whole)


def test_another_table_is_another_run(cnn, photos, table, tmp_path):
    def train(data, **options):
        fitted(evidence(cnn), cnn, data, output=tmp_path / "run", table=table, **options)

    train(sorted(photos.iterdir())[:6])
    with pytest.raises(ValueError, match="was started with other settings .*table"):
        train(sorted(photos.iterdir())[:7], resume=True)


def test_heads_that_read_statistics_train_by_masking_beside_unreadable_photos(
    cnn, photos, tmp_path
):
    folder = tmp_path / "p"
    folder.mkdir()
    for path in sorted(photos.iterdir())[:3]:
        shutil.copy(path, folder)
    (folder / "000.png").write_bytes(b"no picture")
    head = evidence(cnn)
    result = fitted(head, cnn, folder, TrainConfig("small", epochs=1, workers=0, batch_size=2))
    assert len(result.skipped) == 1 and (head.components[0].mean != 0).any()


@pytest.fixture
def command(cnn, photos, tmp_path):
    """``xattn train`` on a table, with the run folder still to come."""
    weights = write_weights(tmp_path / "cnn.safetensors", cnn)
    return [
        "train", str(photos), "--backbone", "test_resnet", "--weights", str(weights),
        "--input-size", "64", "--recipe", "outcomes", "--masks", str(MASKS), "--workers", "0",
        "--table", str(tmp_path / "table"), "--device", "cpu",
    ]  # fmt: skip


def test_the_command_says_what_a_table_costs_and_shares_it(command, tmp_path, capsys):
    said = []
    for name in ("evidence", "ttame"):
        output = ["--head", name, "--output", str(tmp_path / name), "--epochs", "1"]
        assert main([*command, *output]) == 0
        said.append(capsys.readouterr().out)
        assert "head: " in said[-1] and (tmp_path / name / "head/config.json").is_file()
    assert f"{COUNT} photos" in said[0].splitlines()[0] and "MB" in said[0].splitlines()[0]
    assert "MB" not in said[1]


LOADED = """
import sys
from xattn.cli import main
code = main(sys.argv[1:])
print(*(name for name in sys.modules if f"{name}.".startswith("xattn.")), sep="\\n")
sys.exit(code)
"""


def test_training_loads_only_what_it_needs(command, tmp_path):
    """No other heads, mechanisms, explainers or metrics: at most 160 modules of xattn."""
    line = [
        sys.executable,
        "-c",
        LOADED,
        *command,
        "--epochs",
        "1",
        "--output",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [name for name in done.stdout.splitlines() if f"{name}.".startswith("xattn.")]
    assert "xattn.training.outcome_fitting" in loaded and len(loaded) <= 160, (len(loaded), loaded)


def test_an_interrupted_table_goes_on_by_the_same_command(command, tmp_path, capsys, monkeypatch):
    real, seen = RowMaker.__call__, []

    def interrupted(self, image, seed, name):
        seen.append(name)
        if name.endswith("018.png") and seen.count(name) == 1:
            raise KeyboardInterrupt
        return real(self, image, seed, name)

    monkeypatch.setattr(RowMaker, "__call__", interrupted)
    line = [*command, "--output", str(tmp_path / "run"), "--epochs", "1"]
    assert main(line) == 130
    assert "; run the same command to continue" in capsys.readouterr().err
    assert main(line) == 0
    assert f"{COUNT - 16} of {COUNT} rows to compute" in capsys.readouterr().out
