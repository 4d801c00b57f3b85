"""Probing: LARS and labels by their definitions, training that learns, stops, resumes, and refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import xattn
from xattn.cli import main
from xattn.config import ProbeConfig
from xattn.eval.probing import ProbeJob, run_probes, write_results
from xattn.explaining.photos import explain
from xattn.heads import create_head, load_head
from xattn.heads.probed import probed
from xattn.packs.reader import load_pack
from xattn.photos.labels import read_labels
from xattn.training import probe as module
from xattn.training.features import cache_features
from xattn.training.labelled import chunks, split
from xattn.training.optimizers import LARS
from xattn.training.probe import ProbeScores, learning_rate, predict_logits, probe
from xattn.training.run_folder import save_checkpoint
from xattn.training.sample import Sample

TRAIN, VALIDATION = range(0, 16), range(16, 24)
QUICK = {"recipe": "small", "epochs": 4, "warmup": 1, "batch_size": 5, "lr": 0.01}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", None, ["head"], input_size=64)


@pytest.fixture(scope="module")
def features(backbone, tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    return cache_features(backbone, write_photos(root / "p"), root / "f", progress=False, views=2)


def write_photos(folder, count=24):
    """Red, green or blue noise in turn: photo i is of class i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 90, (10, 14, 3), dtype=np.uint8)
        noise[..., i % 3] += 120
        Image.fromarray(noise).resize((70, 50)).save(folder / f"{i:03d}.png")
    return folder


LABELS = torch.arange(24) % 3


def fresh(backbone, name="efficient_probe", seed=0, **options):
    torch.manual_seed(seed)
    if name == "efficient_probe":
        options = {"queries": 4, **options}
    return create_head(name, backbone, classes=3, **options)


def train(head, features, output=None, resume=False, labels=LABELS, **config):
    return probe(
        head,
        features,
        labels,
        ProbeConfig(**{**QUICK, **config}),
        train=TRAIN,
        validation=VALIDATION,
        output=output,
        resume=resume,
        progress=False,
    )


def assert_equal_heads(a, b):
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), key


# ---------------------------------------------------------------- LARS


def test_lars_takes_the_papers_steps():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    ours = [torch.nn.Parameter(t.clone()) for t in (w, bias)]
    optimizer = LARS(ours, lr=2.0, momentum=0.9, weight_decay=0.1, trust=0.01)
    v, u = torch.zeros_like(w), torch.zeros_like(bias)
    for _ in range(4):
        g = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        h = torch.randn(3, generator=generator, dtype=torch.float64)
        ours[0].grad, ours[1].grad = g.clone(), h.clone()
        optimizer.step()
        trust = 0.01 * w.norm() / (g.norm() + 0.1 * w.norm())
        v = 0.9 * v + 2.0 * trust * (g + 0.1 * w)
        u = 0.9 * u + 2.0 * h
        w, bias = w - v, bias - u
        torch.testing.assert_close(ours[0].data, w)
        torch.testing.assert_close(ours[1].data, bias)


def test_a_lars_step_does_not_depend_on_the_size_of_the_gradient():
    steps = []
    for scale in (1e-6, 1.0, 1e6):
        w = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        w.grad = scale * torch.arange(6, dtype=torch.float64).view(2, 3)
        LARS([w], lr=0.5).step()
        steps.append(1 - w.data)
    torch.testing.assert_close(steps[0], steps[1])
    torch.testing.assert_close(steps[0], steps[2])


def test_lars_moves_a_layer_that_is_zero_and_keeps_one_without_gradient():
    zero, still = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still], lr=0.1).step()
    assert torch.equal(zero.data, torch.full((2, 2), -0.1))
    assert torch.equal(still.data, torch.ones(2, 2))


# ---------------------------------------------------------------- labels


NAMES = ["d/cat/1.jpg", "d/cat/2.jpg", "d/dog/1.jpg", "d/dog/3.jpg", "d/ox/4.jpg"]


def test_labels_come_from_folders_groups_or_files(tmp_path):
    assert read_labels(NAMES).names == ["cat", "dog", "ox"]
    assert read_labels(NAMES).index.tolist() == [0, 0, 1, 1, 2]
    groups = {"cat": {"group": "pet"}, "dog": {"group": "pet"}, "ox": {"group": "farm"}}
    (tmp_path / "g.json").write_text(json.dumps(groups))
    found = read_labels(NAMES, tmp_path / "g.json")
    assert found.names == ["farm", "pet"] and found.index.tolist() == [1, 1, 1, 1, 0]
    groups["dog"]["group"] = None
    (tmp_path / "g.json").write_text(json.dumps(groups))
    found = read_labels(NAMES, tmp_path / "g.json")
    assert found.index.tolist() == [1, 1, -1, -1, 0] and found.used == [0, 1, 4]
    table = {"cat/1.jpg": 10, "2.jpg": 9, "d/dog/1.jpg": 9, "3.jpg": None, "4.jpg": 10}
    (tmp_path / "f.json").write_text(json.dumps(table))
    found = read_labels(NAMES, tmp_path / "f.json")
    assert found.names == ["9", "10"] and found.index.tolist() == [1, 0, 0, -1, 1]
    rows = "\n".join(f"{k},{'' if v is None else v}" for k, v in table.items())
    for header in ("", "photo,label\n"):
        (tmp_path / "f.csv").write_text(header + rows + "\n")
        again = read_labels(NAMES, tmp_path / "f.csv")
        assert again.index.tolist() == [1, 0, 0, -1, 1]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("f.json", "{", "damaged"),
        ("f.json", "[]", "no table"),
        ("f.json", '{"1.jpg": "a"}', "1.jpg' of .* stands for"),
        ("f.json", '{"cat/1.jpg": "a"}', "no label of 4 of 5 photos, such as d/cat/2.jpg"),
        ("f.json", '{"cat": {"group": "a"}}', "no label of 3 of 5"),
        ("f.csv", "1.jpg\n", "1 cells"),
        (
            "f.json",
            json.dumps({n: [1] for n in NAMES}),
            "write a name or number",
        ),
        ("f.json", json.dumps({n: "a" for n in NAMES}), "only the class 'a'"),
        ("f.json", json.dumps({n: None for n in NAMES}), "name no class"),
    ],
)
def test_bad_labels_are_refused(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(NAMES, tmp_path / file)


def test_a_photo_with_two_labels_is_refused_and_one_named_twice_is_not(tmp_path):
    rows = ["photo,label", *(f"{n},{n[2:5]}" for n in NAMES), ""]
    (tmp_path / "f.csv").write_text("\n".join([*rows, "d/cat/2.jpg, cat"]))
    assert read_labels(NAMES, tmp_path / "f.csv").index.tolist() == [0, 0, 1, 1, 2]
    for label, shown in (("dog", "'dog'"), ("", "None")):
        (tmp_path / "f.csv").write_text("\n".join([*rows, f"d/cat/2.jpg,{label}"]))
        words = f"lines 3 and 8 give 'd/cat/2.jpg' the labels 'cat' and {shown}"
        with pytest.raises(ValueError, match=words):
            read_labels(NAMES, tmp_path / "f.csv")
    pairs = [*((n, n[2:5]) for n in NAMES), (NAMES[1], "dog")]
    text = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
    (tmp_path / "f.json").write_text(f"{{{text}}}")
    with pytest.raises(ValueError, match=r"gives 'd/cat/2.jpg' twice, as 'cat' and 'dog'"):
        read_labels(NAMES, tmp_path / "f.json")


def test_photos_without_a_folder_need_a_file(tmp_path):
    for name in ("row-3", "shard.tar#4", "7.jpg"):
        with pytest.raises(ValueError, match="give a file"):
            read_labels([name])
    with pytest.raises(FileNotFoundError, match="labels: no file"):
        read_labels(NAMES, tmp_path / "none.json")
    (tmp_path / "r.json").write_text('{"row-0": "a", "row-1": "b"}')
    assert read_labels(["row-0", "row-1"], tmp_path / "r.json").index.tolist() == [0, 1]


def test_a_split_has_every_class_in_every_part_and_every_photo_once():
    labels = read_labels([f"{'abc'[i % 3]}/{i}.jpg" for i in range(47)])
    parts = [split(labels, seed=1, fold=k) for k in range(5)]
    assert sorted(i for p in parts for i in p.test) == list(range(47))
    for part in parts:
        assert sorted([*part.train, *part.validation, *part.test]) == list(range(47))
        for photos in part:
            assert set(labels.index[photos].tolist()) == {0, 1, 2}
    assert parts[0] == split(labels, seed=1) != split(labels, seed=2)
    with pytest.raises(ValueError, match="fewer than 3 photos"):
        split(read_labels(NAMES))
    with pytest.raises(ValueError, match="fold"):
        split(labels, fold=5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, "photo 2 of train has 3, but the head has the classes 0..2"),
        (torch.where(LABELS == 1, -1, LABELS), "photo 1 of train has -1"),
        (LABELS * 0, "all training photos have the class 0"),
        (LABELS.float(), "float32"),
        (LABELS[:20], "there are only 20 labels"),
    ],
)
def test_labels_out_of_range_or_missing_are_refused(backbone, features, labels, message):
    with pytest.raises(ValueError, match=message):
        train(fresh(backbone), features, labels=labels)


# ---------------------------------------------------------------- the loop


def test_chunks_hold_every_photo_once_and_never_a_single_one():
    for count, size, ranks in [(2, 32, 1), (3, 2, 1), (16, 5, 1), (17, 4, 2), (7, 1, 3)]:
        parts = chunks(count, 3, size, ranks, seed=4, epoch=2)
        assert sorted(i for p, _ in parts for i in p) == list(range(count))
        sizes = [len(p) for p, _ in parts]
        assert min(sizes) >= max(2, ranks) and max(sizes) - min(sizes) <= 1
        assert {v for _, views in parts for v in views} <= {0, 1, 2}
        assert parts == chunks(count, 3, size, ranks, 4, 2) != chunks(count, 3, size, ranks, 4, 3)
    with pytest.raises(ValueError, match="train: got 1 photos"):
        chunks(1, 1, 8, 1, 0, 0)


def test_the_learning_rate_rises_and_falls_as_a_cosine():
    config = ProbeConfig(epochs=10, warmup=2, lr=0.1)
    rates = [learning_rate(s, 3, config, photos=512) for s in range(30)]
    assert rates[:6] == pytest.approx([0.2 * (i + 1) / 6 for i in range(6)])
    assert rates[6] == pytest.approx(0.2) and rates[18] == pytest.approx(0.1)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[6:]))
    adamw = ProbeConfig(epochs=10, warmup=0, lr=0.1, optimizer="adamw")
    assert learning_rate(0, 3, adamw, photos=512) == 0.1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"attention": "iat_released"},
        {"attention": "vat", "precision": "bf16"},
    ],
    ids=str,
)
def test_a_head_learns_colours(backbone, features, config):
    result = train(fresh(backbone), features, epochs=12, **config)
    assert result.accuracy == 1.0 and 0 <= result.ece <= 1
    assert not result.head.training and len(result.history) == 12
    assert result.history[-1]["train"] < result.history[0]["train"]
    losses = [record["loss"] for record in result.history]
    assert result.best_epoch == losses.index(min(losses))
    assert result.validation.loss == pytest.approx(min(losses), rel=1e-6)


def test_lars_learns_colours_too(backbone, features):
    assert train(fresh(backbone), features, epochs=40, optimizer="lars", lr=50.0).accuracy == 1.0


@pytest.mark.parametrize("attention", ["none", "at"])
def test_anchors_learn_beside_the_head(backbone, features, attention):
    head = fresh(backbone, reliability={"anchors": 2})
    before = head.balancing.anchors.detach().clone()
    result = train(head, features, epochs=12, attention=attention)
    assert result.accuracy == 1.0 and head.trust == 1.0
    assert not torch.equal(head.balancing.anchors, before)
    tokens = head.tokens(features.taps(range(24)))
    with torch.no_grad():
        found = head.balance(head.attend(tokens))
    assert (found.geometric.argmax(1) == LABELS).double().mean() > 0.9
    seen = predict_logits(head, features, range(24)).softmax(1)
    torch.testing.assert_close(seen, found.probabilities)


@pytest.mark.parametrize("name", ["gap", "abmilp"])
def test_the_backbone_is_left_as_it_was(backbone, features, name):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    state = torch.get_rng_state()
    head = fresh(backbone, name)
    torch.set_rng_state(state)
    train(head, features)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_training_stops_early_and_keeps_the_best_weights(backbone, features):
    kept = []
    head = fresh(backbone)
    real = module.predict_logits

    def worse(head, *args):
        logits = real(head, *args)
        kept.append(copy.deepcopy(head.state_dict()))
        return logits if len(kept) == 3 else -logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "predict_logits", worse)
        result = train(head, features, epochs=30, patience=4, monitor="accuracy")
    assert result.best_epoch == 2 and len(result.history) == 7
    for key, value in result.head.state_dict().items():
        assert torch.equal(value, kept[2][key]), key


def test_scores_are_their_definitions():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(200, 4, generator=generator)
    labels = torch.randint(4, (200,), generator=generator)
    scores = ProbeScores(logits, labels)
    probabilities = logits.softmax(1)
    confidence, answer = probabilities.max(1)
    assert scores.accuracy == pytest.approx(float((answer == labels).double().mean()))
    assert scores.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    ece = 0.0
    for low in torch.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = (answer == labels)[inside].double().mean() - confidence[inside].double().mean()
            ece += float(gap.abs()) * float(inside.double().mean())
    assert scores.ece == pytest.approx(ece, abs=1e-6)
    sure = ProbeScores(1e3 * F.one_hot(labels, 4).float(), labels)
    assert sure.ece == pytest.approx(0, abs=1e-6) and sure.accuracy == 1


def interrupt_at(patch, step, number=signal.SIGINT):
    real, calls = module._step, []

    def stepping(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args)

    patch.setattr(module, "_step", stepping)


@pytest.mark.parametrize("stop", [5, 16])
def test_a_stopped_run_resumes_bit_for_bit(backbone, features, tmp_path, stop):
    config = {"attention": "vat", "epochs": 4, "checkpoint_every": 2, "batch_size": 4}
    whole = train(fresh(backbone), features, tmp_path / "a", **config)
    assert whole.steps == 16
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(fresh(backbone), features, tmp_path / "b", **config)
    resumed = train(fresh(backbone, seed=9), features, tmp_path / "b", resume=True, **config)
    assert_equal_heads(whole.head, resumed.head)
    assert whole.history == resumed.history and resumed.best_epoch == whole.best_epoch
    steps = [json.loads(x)["step"] for x in (tmp_path / "b/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
    loaded = load_head(tmp_path / "b/head", backbone)
    assert_equal_heads(loaded, whole.head)
    again = train(fresh(backbone), features, tmp_path / "b", resume=True, **config)
    assert_equal_heads(again.head, whole.head)


def test_a_checkpoint_of_another_way_to_step_goes_on_in_this_runs_way(backbone, features, tmp_path):
    config = {"epochs": 4, "checkpoint_every": 2, "batch_size": 4}
    whole = train(fresh(backbone), features, **config)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(fresh(backbone), features, tmp_path / "b", **config)
    for path in (tmp_path / "b/checkpoints").glob("step-*/state.pt"):
        state = torch.load(path, weights_only=True)
        for group in state["optimizer"]["param_groups"]:
            assert group["fused"]
            group["fused"] = None
        save_checkpoint(path.parents[1], state["step"], state)
    made, real = [], module.create_optimizer

    def creating(*args):
        made.append(real(*args))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "create_optimizer", creating)
        resumed = train(fresh(backbone, seed=9), features, tmp_path / "b", resume=True, **config)
    assert_equal_heads(whole.head, resumed.head)
    assert all(group["fused"] for group in made[0].param_groups)


# ---------------------------------------------------------------- what is refused


def test_a_loss_that_is_not_finite_is_a_clear_error(backbone, features, tmp_path):
    with pytest.raises(ValueError, match=r"lr: the loss is not finite at step \d+"):
        train(fresh(backbone, norm=False), features, tmp_path / "a", lr=1e38, epochs=20)


def test_what_does_not_fit_is_refused(backbone, features, tmp_path):
    with pytest.raises(ValueError, match="attention training: unknown 'atvat'"):
        train(fresh(backbone), features, attention="atvat")
    with pytest.raises(ValueError, match="attention: the scores of 'gap' are fixed"):
        train(fresh(backbone, "gap"), features, attention="at")
    with pytest.raises(ValueError, match="is not a classifier"):
        train(create_head("ttame", backbone), features)
    torch.manual_seed(1)
    other = xattn.load_backbone("test_vit", None, ["head"], input_size=64)
    with pytest.raises(ValueError, match="features: ") as error:
        train(fresh(other), features)
    assert features.digest in str(error.value) and other.fingerprint in str(error.value)
    with pytest.raises(ValueError, match="taps"):
        train(fresh(backbone.with_taps(["block.1", "head"])), features)
    with pytest.raises(ValueError, match="2 photos are also in train, such as"):
        probe(fresh(backbone), features, LABELS, train=range(10), validation=range(8, 12))
    with pytest.raises(ValueError, match="validation: got no photo"):
        probe(fresh(backbone), features, LABELS, train=range(10), validation=[])
    train(fresh(backbone), features, tmp_path / "a", epochs=1)
    with pytest.raises(ValueError, match="holds a run already; .* --resume .* another --output"):
        train(fresh(backbone), features, tmp_path / "a", epochs=1)
    with pytest.raises(ValueError, match="other settings"):
        train(fresh(backbone), features, tmp_path / "a", resume=True, epochs=2)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epsilon", 0.0), ("epochs", 0), ("lr", float("nan")), ("optimizer", "adam"),
        ("warmup", 99), ("patience", -1), ("recipe", "large"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        ProbeConfig(**{"attention": "at", setting: value})


def test_the_warm_up_of_a_recipe_fits_fewer_epochs():
    assert [ProbeConfig("small", epochs=n).warmup for n in (1, 4, 9, 10, 60)] == [0, 2, 4, 5, 5]
    with pytest.raises(ValueError, match="warmup: got 5 of 3 epochs"):
        ProbeConfig("small", epochs=3, warmup=5)


def test_a_sample_shows_each_heads_own_classes_and_training_does_not_notice(backbone, tmp_path):
    photos = write_photos(tmp_path / "p")
    table = {f"{i:03d}.png": f"c{i % 3}" for i in range(24)}
    (tmp_path / "labels.json").write_text(json.dumps(table))
    plain = ProbeJob(
        backbone=backbone, data=photos, labels=tmp_path / "labels.json",
        heads=("abmilp", "efficient_probe"), features=tmp_path / "f",
        config=ProbeConfig(**{**QUICK, "epochs": 2, "warmup": 0, "checkpoint_every": 1}),
    )  # fmt: skip
    silent = {"progress": False, "say": lambda _: None}
    run_probes(plain, tmp_path / "plain", **silent)
    rows, *_ = run_probes(dataclasses.replace(plain, sample=3), tmp_path / "shown", **silent)
    assert not (tmp_path / "plain/abmilp/sample").exists() and len(rows) == 2
    for name in plain.heads:
        heads = [load_head(tmp_path / o / name / "head", backbone) for o in ("plain", "shown")]
        weights = [h.state_dict() for h in heads]
        assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
        found = load_pack(tmp_path / "shown" / name / "sample")
        steps = {e.protocol["step"] for e in found}
        assert len(steps) == 2 and 0 in steps and len(found) == 6
        own = {f"{i:03d}.png": f"c{i % 3}" for i in range(24)}  # before training, too
        assert all(e.target_name == own[e.file_name] for e in found)


def test_the_maps_of_a_sample_are_those_of_the_head_at_that_step(backbone, tmp_path):
    head = fresh(backbone).train()
    photos = sorted(write_photos(tmp_path / "p").iterdir())
    classes = {path: i % 3 for i, path in enumerate(photos)}
    sample = Sample(backbone, photos, tmp_path / "s", 2, classes=classes)
    sample(7, head)
    assert head.training and all(p.requires_grad for p in head.parameters())
    both = probed(backbone, copy.deepcopy(head))
    shown = load_pack(tmp_path / "s")
    assert len(shown) == 2
    for path, b in zip(sample.photos.paths, shown, strict=True):
        (a,) = explain(path, both, both.probe, classes=classes[path])
        np.testing.assert_array_equal(a.map, b.map)
        assert (b.method, b.target, b.file_name) == ("step 7", classes[path], path.name)


@pytest.mark.parametrize(
    ("file", "text"),
    [("results.json", '{"format": "xattn-results"}'), ("results.csv", "a,b")],
)  # fmt: skip
def test_results_of_another_job_are_not_overwritten(backbone, tmp_path, file, text, capsys):
    (tmp_path / file).write_text(text)
    job = ProbeJob(backbone=backbone, data=[], labels=None, heads=())
    with pytest.raises(ValueError, match=r"output: .* not from xattn probe; give another --output"):
        write_results([], read_labels(NAMES), job, tmp_path)
    before = ["probe", "hfds/nowhere", "-b", "no_such_model", "--output", str(tmp_path)]
    assert main(before) == 2
    assert "not from xattn probe" in capsys.readouterr().err  # before the backbone is asked for
    assert (tmp_path / file).read_text() == text and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- many processes


TWO = """
import sys, torch, xattn
from xattn.config import ProbeConfig
from xattn.heads import create_head, save_head
from xattn.training.features import cache_features
from xattn.training.probe import predict_logits, probe

weights, data, out = sys.argv[1:]
backbone = xattn.load_backbone("test_vit", weights, ["head"], input_size=64)
features = cache_features(backbone, data, f"{out}/f", batch_size=5, progress=False)
labels = torch.arange(24) % 3

def run(name, attention, size):
    torch.manual_seed(torch.distributed.get_rank())  # the first process's head counts
    head = create_head("efficient_probe", backbone, classes=3, queries=4)
    config = ProbeConfig(optimizer="lars", lr=100.0, epochs=3, warmup=1, batch_size=size,
                         attention=attention)
    return probe(head, features, labels, config, train=range(16), validation=range(16, 24),
                 output=f"{out}/{name}", progress=False)

result = run("at", "at", 3)
assert torch.distributed.get_world_size() == 2 and result.steps == 9
logits = predict_logits(result.head, features, range(16, 23))
both = [torch.zeros_like(logits) for _ in range(2)]
torch.distributed.all_gather(both, logits)
assert torch.equal(*both) and len(logits) == 7
assert torch.allclose(logits, result.validation.logits[:7], atol=1e-6)
try:
    run("at", "at", 3)
except ValueError as error:
    assert "holds a run already" in str(error)
try:
    cache_features(backbone, data, f"{out}/f", dtype="float16", progress=False)
except ValueError as error:
    assert "another folder" in str(error)
    print("agreed")
from xattn.runtime.distributed import leave_group
leave_group()
"""


def test_two_processes_cache_and_train_as_one(tmp_path, backbone):
    from safetensors.torch import save_file

    save_file(backbone.model.state_dict(), str(tmp_path / "w.safetensors"))
    data = write_photos(tmp_path / "p")
    (tmp_path / "job.py").write_text(TWO)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(tmp_path / "job.py"), str(tmp_path / "w.safetensors"), str(data), str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.stdout.count("agreed") == 2, run.stdout + run.stderr
    own = xattn.load_backbone("test_vit", tmp_path / "w.safetensors", ["head"], input_size=64)
    features = cache_features(own, data, tmp_path / "one", batch_size=5, progress=False)
    together = cache_features(own, data, tmp_path / "f", batch_size=5, progress=False)
    index = list(range(24))
    assert torch.equal(features.batch(index).patches[0], together.batch(index).patches[0])
    one = train(
        fresh(own),
        features,
        epochs=3,
        batch_size=6,
        attention="at",
        recipe="published",
        optimizer="lars",
        lr=100.0,
    ).head
    two = load_head(tmp_path / "at/head", own).state_dict()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(
            two[key], value, atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert torch.allclose(predict_logits(one, features, index).softmax(1).sum(1), torch.ones(24))
