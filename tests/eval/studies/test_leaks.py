"""Leaks put back into the studies, one by one: each is refused, and no study goes past its split."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from small_transformers import tiny

from xattn import load_backbone
from xattn.config import ProbeConfig, TrainConfig
from xattn.eval.evaluation.split import LeakError, Split
from xattn.eval.probing import runner
from xattn.eval.studies import run_files, swapped_attention
from xattn.eval.studies.__main__ import STUDIES
from xattn.eval.studies.action_proposals import ProposalStudyConfig
from xattn.eval.studies.attention_image import ImageStudyConfig
from xattn.eval.studies.attention_text import TextStudyConfig
from xattn.eval.studies.content_controls import network
from xattn.eval.studies.conversion_depths import DepthStudyConfig
from xattn.eval.studies.in_context_regression import InContextConfig
from xattn.eval.studies.larger_clips import ClipConfig
from xattn.eval.studies.length.network import LengthStudyConfig, Regression
from xattn.eval.studies.lesions import LesionConfig
from xattn.eval.studies.models.frozen_faces import IMAGE, LANDMARKS, WINDOWS, FaceMaps
from xattn.eval.studies.models.lesions import Samples
from xattn.eval.studies.part_utilization import PartStudyConfig
from xattn.eval.studies.passkey import PasskeyConfig
from xattn.eval.studies.pointers import PointStudyConfig
from xattn.eval.studies.position_transfer import PositionStudyConfig
from xattn.eval.studies.random_features import RandomFeatureConfig
from xattn.eval.studies.reliability_balancing import BalancingConfig
from xattn.eval.studies.rule_blocks import RulesConfig
from xattn.eval.studies.same_character import CharacterConfig
from xattn.eval.studies.single_heads import SingleHeadsConfig
from xattn.eval.studies.swap.measuring import SwapStudyConfig
from xattn.eval.studies.terminator import TerminatorStudyConfig
from xattn.eval.studies.words import WordStudyConfig
from xattn.models.agunet import AGUNet
from xattn.training import labelled as splits

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["tench", "goldfish", "great white shark"]


class Given(NamedTuple):
    """What the studies are run on: ``paths`` are 18 photos of noise, in folders of three classes."""

    folder: Path
    paths: list[Path]
    vit: object
    cnn: object
    output: Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(18):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        (folder / NAMES[i % 3]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / NAMES[i % 3] / f"{i}.png")
    (folder / "classes.json").write_text(
        "{" + ", ".join(f'"{name}": {{"group": "{name[0]}"}}' for name in NAMES) + "}"
    )
    torch.manual_seed(0)
    cnn = load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=3)
    vit = load_backbone(tiny(grid=(4, 4), num_classes=3).model, class_names=NAMES)
    return folder, sorted(folder.rglob("*.png")), vit, cnn


@pytest.fixture
def given(shared, tmp_path):
    return Given(*shared, tmp_path)


def nothing(*_, **__):
    """In place of a training."""
    return 0.0


def drawn(seed, count, kind=None):
    """Images with a lesion, a function of ``seed``."""
    images = torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Samples(images, (images > 0.9).float(), torch.full((count,), 3.0))


# ---------------------------------------------------------------- how each study is run


def class_folds(m, given):
    m.fit = m.sanity_rows = nothing
    config = TrainConfig(epochs=1, batch_size=4, workers=0)
    m.cross_validate(given.cnn, given.paths, config, given.output, folds=2, progress=False)


def rows(m, given):
    m.FoldRows.load = lambda self: given.cnn
    m.fit = nothing
    data = {"data": str(given.folder), "folds": 2, "output": given.output}
    list(m.study(m.FoldRows(**data, rows=("ttame",), metrics=("pixel-flipping",))))


def trials(m, given):
    m.OutcomeTrials.load = lambda self: given.cnn
    folders = {"output": given.output / "out", "tables": given.output / "tables"}
    data, trials = str(given.folder), ("distilled",)
    list(m.study(m.OutcomeTrials(data=data, folds=2, trials=trials, **folders)))


def coarse_groups(m, given):
    m.pooled_features = lambda encoder, paths: torch.rand(len(paths), 4)
    model = SimpleNamespace(reset_classifier=nothing)
    m.load_backbone = lambda *_: SimpleNamespace(model=model, preprocessing=None)
    config = TrainConfig("small", epochs=1)
    m.compare_on_groups(m.Groups(data=given.folder, output=given.output, train=config))


def positions(m, given):
    m._train = nothing
    config = PositionStudyConfig(encodings=("none",), size=16, sizes=(16,), epochs=1)
    list(m.study(given.vit, given.folder, output=given.output, config=config))


def depths(m, given):
    m.distill = nothing
    m.load_conversion = lambda *_: given.vit
    config = DepthStudyConfig(last=(1,), photos=6)
    list(m.study(given.vit, given.folder, "folders", given.output, config, progress=False))


def swap(m, given):
    m.distill = nothing
    m.load_conversion = lambda folder, dense, network: network
    config = SwapStudyConfig(
        sizes=(16,),
        photos=(4,),
        maps=(0,),
        fidelity=(0,),
        rounds=(0,),
        epochs=1,
        block=2,
        workers=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swapped_attention, "Networks", m.Networks)
        some = (swapped_attention.Swap("hedgehog"),)
        where = given.folder, "folders", given.output
        list(swapped_attention.study(given.vit, *where, config, some, progress=False))


def lesion_gates(m, given):
    torch.manual_seed(0)
    m.measure_gates(AGUNet(2, filters=(4, 8)).eval(), drawn(1, 4), drawn(2, 4), Split("lesions"))


def lesions(m, given):
    m.samples, m.train_slices, m.predict_slices = drawn, nothing, lambda net, images: images
    m.network = lambda *_: AGUNet(2, filters=(4, 8), gates=False)
    m.measure(given.output, LesionConfig(slices=4, tests=4), "slices", "unet", Split("lesions"), 0)


def faces(m, given):
    m.train = nothing
    m._reader = lambda: (
        lambda images: FaceMaps(
            [torch.zeros(len(images), c, s, s) for c, s in IMAGE],
            [torch.zeros(len(images), c, s, s) for c, s in zip(LANDMARKS, WINDOWS, strict=True)],
            torch.zeros(len(images), 5, 2),
            torch.ones(len(images), dtype=torch.bool),
        )
    )
    config = BalancingConfig(train=18, tests=18, ratio=1.0, false_labels=0.0, anchors=1)
    m.measure(m.ROWS["plain"], config, Split("faces"), 0)


def actions(m, given):
    m.train = lambda *_: (None, 0.0)
    list(m.study(given.output, ProposalStudyConfig().quick()))


def digits(m, given):
    pytest.importorskip("sklearn", reason="the extra xattn[demo] is not installed")
    net, split = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), Split("digits")
    m.train(net, m.Training(1), split)
    m.right(net, split)


def recall(m, given):
    m.recall_right(network("recall", "uniform", {}), Split("recall"), 1, 0)


def pointers(m, given):
    config = PointStudyConfig(samples=8, batch_size=4, tests=4, width=8)
    m.measure("hull-set", config, Split("hull-set"), 0)


def orders(m, given):
    m.cells_of = m.Pointer = nothing
    m._enough = lambda photos, best, classes: [1] * len(best)
    photos = m.Photos(given.paths, 3, SimpleNamespace(backbone=None), given.output)
    taught = SimpleNamespace(weights={"p": torch.rand(18, 9)}, classes=None)
    m._measured(photos, taught, m.OrderStudyConfig(cells=3, target="p"))


def random_features(m, given):
    features = SimpleNamespace(
        names=[str(path) for path in given.paths],
        taps=lambda index: SimpleNamespace(maps=[torch.rand(18, 4, 2, 2)], prefix=None),
    )
    folds = [list(range(9)), list(range(9, 18))]
    m._baselines(m.Photos(given.vit, features, torch.arange(18) % 3, NAMES, folds))


def scaling(m, given):
    config = RandomFeatureConfig(heads=2, examples=(8, 16), tests=12, width=4, tokens=3)
    list(m.scaling(config, 0))


def words(m, given):
    features = SimpleNamespace(names=[str(path) for path in given.paths])
    labels = SimpleNamespace(index=torch.arange(18) % 3, names=NAMES)
    found = SimpleNamespace(photos={"head": features}, labels=labels)
    m._new_head = m.read = nothing
    m.train = nothing
    config = WordStudyConfig(folds=2)
    m.measure(found, "head", "gap", config, given.output, Split("words"), 0)


def parts(m, given):
    m.AttentiveHead, m.create_head, m.probe = object, lambda *_, **__: object(), nothing
    count = len(given.paths)
    numbers = np.arange(4 * count).reshape(4, count)
    inputs = SimpleNamespace(rows=numbers, backbone=None, features=None, labels=None, masks=None)
    config, split = PartStudyConfig(folds=2, head="abmilp"), Split("parts", given.paths)
    m._train_and_measure(config, inputs, m.Scenario(1.0, 0.0), 0, split)


def image(m, given):
    m.AttentiveHead, m._attentive = object, lambda kind: SimpleNamespace(default_taps=nothing)
    m.load_backbone = lambda *_, **__: SimpleNamespace(
        is_vit=True, depth=1, with_taps=lambda taps: None
    )
    m.material = lambda *_: SimpleNamespace(clean=SimpleNamespace(grid=(2, 2)))
    m.seeded_head = lambda *_, **__: object()
    m.probe = lambda *_, **__: SimpleNamespace(best_epoch=0)
    run = m.Run("vit", "abmilp", "none", 0)
    list(m._runs([run], given.folder, None, given.folder, given.output, ImageStudyConfig()))


def sinks(m, given):
    m._sinks = lambda *_: iter(())
    m.search_heads = lambda *_, **__: {}
    list(m.study(given.vit, given.folder, "folders"))


def text(m, given):
    tree = "({} (2 it) (2 is))"
    for name, count in (("train.txt", 12), ("dev.txt", 3)):
        lines = [tree.format(4 * (i % 2)) for i in range(count)]
        (given.output / name).write_text("\n".join(lines))
    m.train = nothing
    m.study(TextStudyConfig(), given.output, given.output / "out")


def length(m, given):
    config, split = LengthStudyConfig().quick(), Split("length")
    config = type(config)(**{**vars(config), "steps": 40})
    split.fit(m.training_seeds(0, config))
    m.held_out(Regression(), "validation", 32, config, split)
    m.held_out(Regression(), "test", 32, config, split)


def icl(m, given):
    m._trained = lambda *_: m.InContext(3, (2, 1), torch.Generator().manual_seed(0))
    m._plot = nothing
    config = InContextConfig(width=3, examples=6, longer=9, steps=250, batch_size=8, tests=64)
    list(m.study(given.output, config, progress=False))


def passkey(m, given):
    m.minimize = nothing
    m.measure("recurrent", PasskeyConfig().quick(), Split("passkey"), 0)


def clips(m, given):
    m.minimize = nothing
    m.measure(ClipConfig().quick(), given.output, Split("clips"), 0)


def rules(m, given):
    m.before = lambda config, seed: m.RuleModel(config)
    m.train = nothing
    m.measure(RulesConfig().quick(), "off", 0.0, Split("rules"), 0)


def terminators(m, given):
    pytest.importorskip("sklearn", reason="the extra xattn[demo] is not installed")
    m.minimize = nothing
    m.measure("images", "resnet-8", TerminatorStudyConfig().quick(), Split("digits"), 0)


def sentiment(m, given):
    """``dev.txt`` has a sentence of ``train.txt`` and a phrase of all its sentences."""
    lines = [f"({4 * (i % 2)} (3 (2 it) (3 is)) (2 word{i}))" for i in range(12)]
    (given.output / "train.txt").write_text("\n".join(lines))
    (given.output / "dev.txt").write_text("\n".join([lines[0], "(3 (2 it) (3 is))"]))
    m.minimize = nothing
    config, corpus = SingleHeadsConfig().quick(), m.load_corpus(given.output)
    m.measure_transformer(config, corpus, Split("sentiment"), 0)


def characters(m, given):
    m.minimize = nothing
    m.measure("text only", m.ROWS["text only"], CharacterConfig().quick(), given.output,
              Split("characters"), 1)  # fmt: skip


class Leak(NamedTuple):
    """A study's code, what is written in place of a part of it, and how it is run."""

    module: str
    code: str
    leak: str
    run: Callable[[ModuleType, Given], object]


NOT_HELD_OUT = "sorted(set(paths) - set(held_out))"
LEAKS = [
    Leak("class_folds", NOT_HELD_OUT, "sorted(paths)", class_folds),
    Leak("class_folds", "split.fit(train)", "split.fit([*train, *held_out])", class_folds),
    Leak("fold_rows", NOT_HELD_OUT, "sorted(paths)", rows),
    Leak("outcome_trials", "sorted(set(paths) - set(folds[fold]))", "sorted(paths)", trials),
    Leak("coarse_groups", " - set(held_out)", "", coarse_groups),
    Leak("position_transfer", "photos[::2], photos[1::2]", "photos[::2], photos", positions),
    Leak("position_transfer", "split.fit(learned)", "split.fit(photos)", positions),
    Leak("conversion_depths", "if i % config.folds != fold", "", depths),
    Leak("swap.measuring", "if i % 2 != fold", "", swap),
    Leak("lesions", "_with_lesion(split.choose(chosen))", "_with_lesion(split.choose(tests))", lesion_gates),
    Leak("lesions", "chosen = split.choose(chosen)", "chosen = split.choose(tests)", lesions),
    Leak("lesions", "split.fit(seen)", "split.fit(tests)", lesions),
    Leak("lesions", "samples(which, count, kind)", "samples(0, count, kind)", lesions),
    Leak("reliability_balancing", "(config.data_seed + seed) + 1", "(config.data_seed + seed)", faces),
    Leak("action_proposals", "+ seed) + part", "+ seed)", actions),
    Leak("rule_blocks", "split.score([FIRST_TEST + seed])", "split.score([seeds[0]])", rules),
    Leak("terminator", "split.score(held_out)", "split.score(seen)", terminators),
    Leak("single_heads", "if _lower(s.words) not in tests", "", sentiment),
    Leak("single_heads", "text not in tests and ", "", sentiment),
    Leak("digits", "split.score(load_digits()[1])", "split.score(load_digits()[0])", digits),
    Leak("content_controls", "seed + 1000", "seed", recall),
    Leak("pointers", "(TEST_SEED, points)", "(0, 1)", pointers),
    Leak("cell_orders", "split.fit(slice(t, None))", "split.fit(slice(None))", orders),
    Leak("random_features", " - set(fold)", "", random_features),
    Leak("random_features", "slice(most, None)", "slice(None)", scaling),
    Leak("words", " - set(fold)", "", words),
    Leak("part_utilization", "np.setdiff1d(order, test)", "order", parts),
    Leak("attention_image", "own.fit(parts.train)", "own.fit(parts.test)", image),
    Leak("attention_image", "own.choose(parts.validation)", "own.choose(parts.test)", image),
    Leak("attention_sinks", "slice(1, None, 2)", "slice(None)", sinks),
    Leak("attention_text", "sst.read(folder / DEV)", "sst.read(folder / TRAIN)", text),
    Leak("length.network", '"test": 2', '"test": 0', length),
    Leak("length.network", '"test": 2', '"test": 1', length),
    Leak("in_context_regression", "-1 - config.seed", "1_000_010 - config.seed", icl),
    Leak("passkey", "TEST_SEED * (1 + seed) + length", "seed", passkey),
    Leak("larger_clips", "split.score([TEST_SEED + seed])", "split.score([seed])", clips),
    Leak("same_character", "TESTS + seed * config.tests", "0", characters),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LEAKS, ids=lambda leak: f"{leak.module}: {leak.leak or leak.code}")
def test_a_leak_is_refused(case, given):
    original = importlib.import_module(f"xattn.eval.studies.{case.module}")
    source = Path(original.__file__).read_text(encoding="utf-8")
    assert source.count(case.code) == 1, "the study was changed; put the leak elsewhere"
    mutant = ModuleType(original.__name__)
    mutant.__file__ = original.__file__
    exec(compile(source.replace(case.code, case.leak), original.__file__, "exec"), vars(mutant))
    with pytest.raises(LeakError, match="^split: .* scores .* of the items that it was"):
        case.run(mutant, given)


def test_a_probe_is_not_tested_on_what_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "probe", lambda head, *_, **__: SimpleNamespace(head=head))
    job = SimpleNamespace(folder=lambda *_: tmp_path, config=ProbeConfig(recipe="small"))
    labels = SimpleNamespace(index=torch.zeros(4, dtype=torch.long))
    training = runner._Training(job, tmp_path, labels, None, {}, False, False)
    features = SimpleNamespace(names=list("abcd"))
    for test, used in (([1, 3], "fitted on"), ([2, 3], "chosen by")):
        part = splits.Split([0, 1], [2], test)
        with pytest.raises(LeakError, match=f"^split: probe, gap scores 1 .* {used}"):
            training.train(None, "gap", None, features, 0, part, 0, None)


def test_a_row_that_scores_nothing_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"^row: nothing was scored by its split"):
        run_files.measure_rows(tmp_path, {}, {"row": lambda split, seed: {"right": 1.0}}, 1)
    found = run_files.measure_rows(tmp_path, {}, {"row": scored}, 1)
    assert found["row"][0]["split"]["scored"]["count"] == 2


def scored(split, seed):
    return {"right": float(len(split.score([1, 2])))}


# ---------------------------------------------------------------- no study goes past its split

TREES = {
    str(path.relative_to(ROOT / "eval")): ast.parse(path.read_text(encoding="utf-8"))
    for path in [
        *sorted((ROOT / "eval" / "studies").rglob("*.py")),
        *sorted((ROOT / "eval" / "probing").glob("*.py")),
    ]
}
READERS = {
    *("list_images", "named_photos", "open_photos", "labelled_photos", "load_digits", "samples"),
    *("draw_faces", "draw_sequences"),
}
TRAINERS = {"xattn.training": "fit", "xattn.training.probe": "probe"}
TRAINERS |= {"xattn.training.distilling": "distill"}
BEHIND = {
    "studies/swapped_attention.py": "swap.measuring takes them by its splits",
    "studies/study_photos.py": "it lists the photos that studies take by their splits",
    "studies/outcome_trials.py": "it reads photos that a trial has from TrialRun.split",
}
"""Modules that read data without a split of their own."""
OWN = {
    "studies/attention_text_report.py": "it tells what attention_text has scored",
    "studies/explainer_families.py": "it scores nothing",
    "studies/context_length.py": "length.network.held_out scores",
    "studies/random_labels.py": "it trains alone",
    "studies/swapped_attention.py": "swap.measuring scores",
    "studies/outcome_trials.py": "fold_rows.score_explainer scores",
}
"""Modules of commands that score nothing by a split of theirs, nor by ``measure_rows``, which sees to it."""


def called(tree, names):
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names
    ]


def roles(tree):
    """The methods of splits that are called."""
    return {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("fit", "choose", "score")
        and ast.unparse(node.func.value).split("(")[0].split(".")[-1] in ("split", "own", "Split")
    }  # fmt: skip


def commands():
    """The modules that a command runs."""
    return {
        f"studies/{module}.py"
        for module, _ in STUDIES.values()
        if not module.startswith("benches.")
    }


def test_every_command_scores_by_a_split():
    listed = commands()
    assert len(listed) >= 25
    guarded = {
        name
        for name in listed
        if "score" in roles(TREES[name]) or called(TREES[name], {"measure_rows"})
    }
    assert listed - guarded == set(OWN)


def test_what_reads_data_takes_it_by_a_split():
    reading = {name for name, tree in TREES.items() if called(tree, READERS)}
    assert {name for name in reading if not roles(TREES[name])} == set(BEHIND)


def test_what_trains_on_photos_takes_them_by_a_split():
    trained = set()
    for name, tree in TREES.items():
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if TRAINERS.get(node.module) == alias.name
        }
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            if called(function, imported):
                trained.add(name)
                assert "fit" in roles(function), f"{name}: {function.name}"
    assert {"studies/class_folds.py", "studies/swap/measuring.py", "probing/runner.py"} <= trained
