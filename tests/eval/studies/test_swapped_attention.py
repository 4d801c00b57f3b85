"""The swap study: photo by photo beside the trained network, resumed, refused, and reported; controls."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.collections import PathCollection
from photo_vit import NAME, SIDE
from small_transformers import tiny

from xattn import load_backbone
from xattn.attention import (
    Inputs,
    Mechanism,
    SoftmaxOperator,
    converted_copy,
    list_attention,
    mechanism_class,
)
from xattn.attention.base import Entry
from xattn.backbone import converted, resized
from xattn.backbone.conversion import WEIGHTS_FILE
from xattn.cli.commands.listing import measured_rows, read_accuracy
from xattn.config import DistillConfig
from xattn.correlation import spearman
from xattn.eval.bootstrap import Interval
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.swap import measuring, report
from xattn.eval.studies.swap.measuring import Networks, Photo, SwapStudyConfig
from xattn.eval.studies.swap.rows import AS_TRAINED, all_swaps, with_trained
from xattn.eval.studies.swapped_attention import (
    CONTROLS,
    ExactTopK,
    RandomBlocks,
    Swap,
    Uniform,
    labelled_photos,
    study,
)
from xattn.explainers import create_explainer
from xattn.photos.images import load_image
from xattn.photos.view import prepare

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
NAMES = ["tench", "goldfish", "great white shark"]
CONFIG = SwapStudyConfig(
    sizes=(16, 24),
    photos=(5, 3),
    maps=(2, 0),
    fidelity=(1, 0),
    rounds=(1, 0),
    explainer="rollout",
    steps=4,
    epochs=1,
    finetune_epochs=1,
    block=2,
    workers=0,
)
TWO = (Swap("gna", {"kernel": 3}, 0.5), Swap("hedgehog"))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny(grid=(4, 4), num_classes=3).model, class_names=NAMES)


@pytest.fixture(scope="module")
def done(photos, backbone, tmp_path_factory):
    """A finished study and its lines."""
    output = tmp_path_factory.mktemp("study")
    return output, run(backbone, photos, output)


def run(backbone, photos, output, config=CONFIG, swaps=TWO, **options):
    lines = study(backbone, photos, "folders", output, config, swaps, progress=False, **options)
    return "\n".join(lines)


def cells(text, size, attention):
    rows = [
        line.split(" | ")
        for line in text.splitlines()
        if line.startswith(f"| {size} | {attention} |")
    ]
    return rows[0] if rows else None


def test_every_row_is_there_at_every_size(done):
    output, text = done
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| 16 |")]
    assert rows == [
        "as trained", "gna kernel=3", "hedgehog", "hedgehog, trained",
        "random blocks (control)", "exact top-k (control)", "uniform (control)",
    ]  # fmt: skip
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| 24 |")] == rows
    header, first = (line.count("|") for line in text.splitlines()[2:5:2])
    assert header == first
    assert (output / "report.md").read_text() in text + "\n"
    for name in ("accuracy.png", "faithfulness.png"):
        assert (output / name).stat().st_size > 5000


def test_the_report_has_time_and_memory_where_they_were_measured():
    rows = {swap.key(3): swap for swap in TWO}
    timed, untimed = rows
    cost = {"seconds": [3.0, 2.0, 9.0], "dense seconds": [2.0, 2.0, 3.0], "peak bytes": 5e6}
    table = measuring.Table({key: {"same": np.ones(2)} for key in rows}, {timed: cost})
    text = "\n".join(report.table_lines({16: table}, rows, 3))
    assert cells(text, 16, rows[timed].label)[-2:] == ["1.50x", "5 |"]
    assert cells(text, 16, rows[untimed].label)[-2:] == ["", " |"]


def test_a_plot_has_a_point_for_each_row_and_a_legend_of_their_kinds(tmp_path, monkeypatch):
    rows = {"as-trained": AS_TRAINED, "gna": TWO[0], "hedgehog": TWO[1]}
    values = [0.9, 0.7, 0.8]
    points = [
        (key, time, Interval(value, value - 0.1, value + 0.1, 9))
        for key, time, value in zip(rows, (1.0, 0.5, 2.0), values, strict=True)
    ]
    drawn = []
    monkeypatch.setattr(report, "_points", lambda *_: iter(points))
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    assert report.plot({16: None}, rows, "right", "accuracy", tmp_path / "plot.png")
    panel, listed = drawn[0].axes
    found = [c.get_offsets()[0] for c in panel.collections if isinstance(c, PathCollection)]
    np.testing.assert_allclose(found, [(time, value.mean) for _, time, value in points])
    kinds = [text.get_text() for text in listed.get_legend().get_texts()]
    assert kinds == list(dict.fromkeys(row.kind for row in rows.values()))
    assert (tmp_path / "plot.png").exists()


def test_values_are_those_of_each_network_alone(done, photos, backbone):
    output, _ = done
    listed = labelled_photos(backbone, photos, "folders")[:5]
    images = torch.stack([prepare(load_image(p.path), backbone.preprocessing)[0] for p in listed])
    network = converted_copy(backbone, "gna", range(2), {"kernel": 3})
    truth = torch.tensor([NAMES.index(p.path.parent.name) for p in listed])
    with torch.no_grad():
        ours, theirs = network.logits(images).argmax(1), backbone.logits(images).argmax(1)
        tokens = [net.model.forward_features(net.normalize(images)) for net in (network, backbone)]
    near = torch.nn.functional.cosine_similarity(*tokens, dim=-1)
    found = joined(output, "gna-kernel=3-2-of-3", "quality")
    assert found["right"] == (ours == truth).double().tolist()
    assert found["same"] == (ours == theirs).double().tolist()
    assert found["patch cosine"] == pytest.approx(near[:, 1:].mean(1).tolist(), abs=1e-6)
    assert found["class cosine"] == pytest.approx(near[:, 0].tolist(), abs=1e-6)
    maps = [
        create_explainer("rollout", net).attribute(images[:2], theirs[:2])
        for net in (network, backbone)
    ]
    agreement = joined(output, "gna-kernel=3-2-of-3", "maps")["map agreement"]
    assert agreement == pytest.approx(spearman(*maps).tolist(), abs=1e-6)
    assert joined(output, "as-trained", "maps")["map agreement"] == pytest.approx([1.0] * 2)
    assert not any(hasattr(m, "mechanism") for m in backbone.modules())


def joined(output, key, part):
    values = {}
    for file in sorted((output / "16px" / key).glob(f"{part}-*.json")):
        for name, column in json.loads(file.read_text())["values"].items():
            values.setdefault(name, []).extend(column)
    return values


def test_fidelity_is_that_of_the_evaluation(done, photos, backbone):
    from xattn.eval import Protocol, evaluate
    from xattn.eval.metrics import create_metric
    from xattn.eval.metrics.base import Column

    output, _ = done
    listed = labelled_photos(backbone, photos, "folders")[:1]
    images = torch.stack([prepare(load_image(p.path), backbone.preprocessing)[0] for p in listed])
    results = evaluate(
        backbone, {"rollout": create_explainer("rollout", backbone)}, images,
        metrics=["masking", create_metric("insertion-deletion", steps=4), "road"],
        protocol=Protocol(levels=(0.5,)), progress=False,
    )  # fmt: skip
    values, found = results.methods["rollout"].values, joined(output, "as-trained", "fidelity")
    for name, level in (
        ("AD", 0.5),
        ("ADD", 0.5),
        ("insertion", None),
        ("deletion", None),
        ("ROAD", None),
    ):
        assert found[name] == pytest.approx(values[Column(name, level)].tolist(), abs=1e-5)


def test_uniform_attention_has_no_map(done):
    row = cells(done[1], 16, "uniform (control)")
    assert row[8:16] == ["-"] * 7 + [""]


def test_a_finished_study_computes_nothing_again(done, photos, backbone, monkeypatch):
    output, text = done
    monkeypatch.setattr(Networks, "of", None)
    monkeypatch.setattr(measuring, "latencies", None)
    assert run(backbone, photos, output) == text


def test_a_study_in_pieces_equals_one_in_whole(done, photos, backbone, tmp_path):
    config = dataclasses.replace(CONFIG, fidelity=(0, 0), rounds=(0, 0))
    first = run(backbone, photos, tmp_path, config, only=["gna"], only_sizes=[24])
    assert cells(first, 16, "as trained") is None and cells(first, 24, "hedgehog") is None
    assert cells(first, 24, "gna kernel=3")[:9] == cells(done[1], 24, "gna kernel=3")[:9]
    again = run(backbone, photos, tmp_path, config, only=["random blocks"])
    for row in ("as trained", "random blocks (control)"):
        assert cells(again, 16, row)[:9] == cells(done[1], 16, row)[:9]
    assert cells(again, 16, "gna kernel=3") is None and cells(again, 24, "gna kernel=3") is not None


@pytest.mark.parametrize(
    "changes",
    [{"explainer": "raw_attention"}, {"steps": 5}, {"seed": 1}, {"rounds": (2, 0)}, {"epochs": 2}],
)
def test_results_of_other_settings_are_refused(done, photos, backbone, changes):
    with pytest.raises(
        ValueError, match=r"output: .* has other settings or photos; choose a new folder"
    ):
        run(backbone, photos, done[0], dataclasses.replace(CONFIG, **changes))


def test_a_trained_row_is_measured_on_photos_that_it_was_not_trained_on(done, photos, backbone):
    output, _ = done
    listed = labelled_photos(backbone, photos, "folders")[:5]
    for fold in (0, 1):
        folder = output / "trained" / "hedgehog-trained-3-of-3" / f"fold-{fold}"
        trained = set(json.loads((folder / "record.json").read_text())["photos"])
        assert trained == {p.name for i, p in enumerate(listed) if i % 2 != fold}
        image = prepare(load_image(listed[fold].path), backbone.preprocessing)[0][None]
        from xattn import load_conversion

        network = load_conversion(folder / "run" / "conversion", backbone)
        with torch.no_grad():
            right = float(network.logits(image).argmax() == listed[fold].label)
        assert joined(output, "hedgehog-trained-3-of-3", "quality")["right"][fold] == right


def test_the_record_of_networks_names_the_photos_or_the_weights_that_they_come_from(
    photos, backbone, tmp_path
):
    listed = labelled_photos(backbone, photos, "folders")
    networks = Networks(backbone, 16, listed, DistillConfig(), tmp_path)
    untrained = Swap("hedgehog")
    assert all("trained" not in networks.record(row, 24) for row in (AS_TRAINED, untrained))
    halves = networks.record(dataclasses.replace(untrained, trained=True), 24)["trained"]
    names = [photo.name for photo in listed]
    assert [list(half["photos"]) for half in halves] == [names[1::2], names[::2]]
    assert {half["size"] for half in halves} == {16}
    (tmp_path / WEIGHTS_FILE).write_bytes(b"weights")
    found = networks.record(dataclasses.replace(untrained, trained=tmp_path), 24)["trained"]
    assert found == hashlib.sha256(b"weights").hexdigest()


def test_a_distilled_folder_takes_the_place_of_training(done, photos, backbone, tmp_path):
    folder = done[0] / "trained" / "hedgehog-trained-3-of-3" / "fold-0" / "run" / "conversion"
    rows = list(with_trained(TWO, [folder]))
    assert [row.trained for row in rows] == [False, False, folder]
    config = dataclasses.replace(CONFIG, photos=(3, 3), maps=(0, 0), fidelity=(0, 0), rounds=(0, 0))
    text = run(backbone, photos, tmp_path, config, (), distilled=[folder], only=["hedgehog"])
    assert (
        cells(text, 16, "hedgehog, trained")[2]
        == cells(text, 24, "hedgehog, trained")[2]
        == "3 of 3"
    )
    assert not (tmp_path / "trained").exists()
    other = load_backbone(tiny(grid=(4, 4), num_classes=3, seed=1).model, class_names=NAMES)
    with pytest.raises(ValueError, match="was trained on"):
        run(other, photos, tmp_path / "other", config, (), distilled=[folder])


class Refuses(Mechanism):
    entry = Entry("refuses", "a test", "N", grid=(2,))

    def operator(self, inputs):
        if inputs.grid == (6, 6):
            raise ValueError("grid: got 6 x 6; this is a test")
        return SoftmaxOperator(inputs.q, inputs.k, inputs.scale)


def test_a_row_that_cannot_run_at_a_size_is_named_and_the_others_go_on(photos, backbone, tmp_path):
    config = dataclasses.replace(CONFIG, maps=(0, 0), fidelity=(0, 0), rounds=(1, 1))
    text = run(backbone, photos, tmp_path, config, (Swap(Refuses),), only=["refuses"])
    assert cells(text, 16, "refuses (control)") and not cells(text, 24, "refuses (control)")
    assert "24 px, refuses: not measured (grid: got 6 x 6; this is a test)" in text


def test_positions_may_be_tiled(photos, backbone, tmp_path):
    config = dataclasses.replace(CONFIG, maps=(0, 0), fidelity=(0, 0), rounds=(0, 0))
    run(backbone, photos, tmp_path, config, (Swap("softmax", positions="tile"),), only=["softmax"])
    listed = labelled_photos(backbone, photos, "folders")[:2]
    network = resized(backbone, 24, "tile")
    images = torch.stack([prepare(load_image(p.path), network.preprocessing)[0] for p in listed])
    with torch.no_grad():
        classes = network.logits(images).argmax(1)
    key = "softmax-positions-tiled-3-of-3"
    file = json.loads((tmp_path / "24px" / key / "quality-000.json").read_text())
    assert file["values"]["right"] == [
        float(c == p.label) for c, p in zip(classes, listed, strict=True)
    ]
    assert joined(tmp_path, key, "quality")["patch cosine"] == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"only": ["gan"]},
            "only: got 'gan'; choose a label or one of as trained, gna, hedgehog, random",
        ),
        ({"only_sizes": [17]}, r"only_sizes: got 17; choose among \(16, 24\)"),
    ],
)
def test_unknown_rows_and_sizes_are_named(photos, backbone, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(backbone, photos, tmp_path, **options)


def test_photos_without_a_class_are_named(photos):
    other = load_backbone(tiny(num_classes=3).model, class_names=["a", "b", "c"])
    with (
        pytest.warns(UserWarning, match="no photo has a class"),
        pytest.raises(ValueError, match="none of 6 photos has a class of"),
    ):
        labelled_photos(other, photos, "folders")


def test_the_command_measures_the_rows_that_it_is_told(photos, tmp_path, capsys):
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    torch.save({k: v + 0.1 * torch.randn_like(v) for k, v in state.items()}, tmp_path / "w.pth")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    command = ["swap", str(photos), "-b", "test_vit", "--device", "cpu"]
    command += ["--weights", str(tmp_path / "w.pth"), "--class-names", str(tmp_path / "names.txt")]
    command += "--sizes 160 --photos 2 --maps 0 --fidelity 0 --rounds 0 --only gna uniform".split()
    assert main([*command, "--output", str(tmp_path / "study")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 160 |")]
    gna = [s.label for s in all_swaps() if s.name == "gna"]
    assert [line.split(" | ")[1] for line in rows] == ["as trained", *gna, "uniform (control)"]
    accuracy = read_accuracy(tmp_path / "study" / "accuracy.json")
    (at,) = accuracy["sizes"]
    assert [row["mechanism"] for row in at["rows"]] == ["gna"] * len(gna)
    assert at["photos"] == 2 and at["size"] == 160


def test_every_swap_converts_a_network(tmp_path):
    photo = Photo("a", tmp_path / "a.png", 0, "")
    networks = Networks(tiny(grid=(14, 14)), 56, [photo] * 2, DistillConfig(), tmp_path, False)
    for swap in all_swaps():
        made = networks.of(swap, 56).conversion
        assert [(one.name, one.options) for one in made] == [(swap.name, dict(swap.options))]


# ---------------------------------------------------------------- controls


def inputs(grid=(5, 6), prefix=1):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, prefix + grid[0] * grid[1], 8, generator=generator).double()
    return Inputs(q, k, v, None, grid, prefix)


def matrix(control, asked):
    return control.operator(asked).rows(torch.arange(asked.q.shape[2]))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_controls_with_all_keys_are_dense(prefix):
    asked = inputs(prefix=prefix)
    dense = SoftmaxOperator(asked.q, asked.k, asked.scale).rows(torch.arange(prefix + 30))
    assert torch.allclose(matrix(RandomBlocks(16, 2, selected=9), asked), dense)
    assert torch.allclose(matrix(ExactTopK(16, 2, keys=40), asked), dense)
    assert torch.allclose(matrix(Uniform(16, 2), asked), torch.full_like(dense, 1 / (prefix + 30)))


def test_exact_top_k_keeps_the_largest_weights_of_patches():
    asked = inputs()
    dense = SoftmaxOperator(asked.q, asked.k, asked.scale).rows(torch.arange(31))
    kept = matrix(ExactTopK(16, 2, keys=7), asked)
    assert torch.allclose(kept[:, :, 0], dense[:, :, 0])
    best = dense[:, :, 1:, 1:].topk(7, -1).indices
    seen = torch.zeros(2, 2, 30, 30, dtype=torch.bool).scatter_(-1, best, True)
    assert torch.equal(kept[:, :, 1:, 1:] > 0, seen)


def test_random_blocks_hold_the_own_tile_and_differ_by_head_and_layer_not_by_photo():
    asked = inputs((8, 8))
    torch.manual_seed(0)
    first, second = RandomBlocks(16, 2, selected=2), RandomBlocks(16, 2, selected=2)
    seen = matrix(first, asked)[:, :, 1:, 1:] > 0
    assert (seen.sum(-1) == 32).all() and seen.diagonal(dim1=2, dim2=3).all()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[:, 0], seen[:, 1])
    assert not torch.equal(seen, matrix(second, asked)[:, :, 1:, 1:] > 0)
    assert torch.equal(seen, matrix(first, asked)[:, :, 1:, 1:] > 0)


def test_controls_are_no_mechanisms_to_use():
    assert not {"random blocks", "exact top-k"} & set(list_attention())
    assert {Swap(control).kind for control in CONTROLS} == {"control"}
    assert mechanism_class("uniform") is Uniform and Uniform.entry.control


# ---------------------------------------------------------------- what the project says


def test_rows_after_training_are_those_of_mechanisms_that_learn():
    rows = [AS_TRAINED, *with_trained(all_swaps())]
    assert len({row.key(12) for row in rows}) == len(rows)
    for row in rows:
        free = row == AS_TRAINED or mechanism_class(row.name).entry.training_free
        assert not (row.trained and free)
    trained = {row.name for row in rows if row.trained}
    assert {"hedgehog", "nsa", "moh", "dma", "agent"} <= trained


def test_the_table_of_mechanisms_has_the_figures_that_were_measured():
    """A mechanism that the file does not have yet needs a figure of its own."""
    accuracy = read_accuracy()
    text = (ROOT / "docs" / "attention" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text, re.M))
    kept = {row["mechanism"] for at in accuracy["sizes"] for row in at["rows"]}
    assert kept <= set(list_attention())
    dense = {at["dense"] for at in accuracy["sizes"]}
    assert {swap.name for swap in all_swaps()} <= set(list_attention())
    for name in list_attention():
        entry = mechanism_class(name).entry
        free, kind = entry.training_free, "a control" if entry.control else "needs training"
        assert rows[name].startswith("training-free" if free else kind)
        said = {float(number) for number in re.findall(r"(\d+(?:\.\d+)?) %", rows[name])}
        figures = {row["right"] for _, row in measured_rows(accuracy, name)}
        assert said and (not figures or said <= figures | dense), (name, said, figures)
        assert not free or any(swap.name == name for swap in all_swaps())


@pytest.mark.slow
def test_what_is_called_training_free_keeps_most_of_the_accuracy_on_photos_of_packages(photo_vit):
    weights, folder = photo_vit
    backbone = resized(load_backbone(NAME, weights, input_size=SIDE), 196)  # 14 x 14 patches
    photos = [(int(p.parent.name), p) for p in sorted(folder.glob("*/*.png"))][::3]
    images = torch.stack([prepare(load_image(p), backbone.preprocessing)[0] for _, p in photos])
    labels = torch.tensor([label for label, _ in photos])

    def right(network):
        return (network.logits(images).argmax(1) == labels).float().mean().item()

    free = [s for s in all_swaps() if mechanism_class(s.name).entry.training_free and s.share == 1]
    assert len({swap.name for swap in free}) > 5
    whole = right(backbone)
    assert whole > 0.9
    for swap in free:
        kept = right(converted(backbone, swap.name, options=dict(swap.options)))
        assert kept > 0.6 * whole, (swap.label, kept)  # least: gna, 0.67 of 0.98
    assert right(converted(backbone, "uniform", options={})) < 0.3


@pytest.mark.slow
def test_what_is_called_training_free_keeps_most_of_the_accuracy_of_a_trained_vit(tmp_path):
    file = SHARED / "vit-tiny" / "vit_tiny_patch16_224.safetensors"
    if not file.is_file():
        pytest.skip("needs ../shared/data/vit-tiny")
    backbone = load_backbone("vit_tiny_patch16_224", file)
    sample = SHARED / "imagenet-sample"
    config = SwapStudyConfig((224,), (100,), (0,), (0,), (0,))
    free = [s for s in all_swaps() if mechanism_class(s.name).entry.training_free and s.share == 1]
    list(study(
        backbone, sample, sample / "classes.json", tmp_path, config, free,
        only=[swap.label for swap in free], progress=False,
    ))  # fmt: skip
    accuracy = read_accuracy(tmp_path / "accuracy.json")
    for name in {swap.name for swap in free}:
        at, row = measured_rows(accuracy, name)[0]  # with the settings that the claim is made for
        assert row["right"] > 0.8 * at["dense"], row
