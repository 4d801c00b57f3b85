"""The study of positions: what is trained, other sizes, resuming, refusals, and the command."""

import dataclasses
import json

import pytest
import torch
from small_transformers import tiny

from xattn import load_backbone
from xattn.backbone import resized
from xattn.eval.studies import position_transfer
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.position_transfer import (
    PositionStudyConfig,
    pixels_of,
    student_of,
    study,
    targets_of,
    train,
)

NAMES = ["tench", "goldfish", "great white shark"]
CONFIG = PositionStudyConfig(
    encodings=("absolute", "none", "axial:span=4", "comrope:form=ap,block=2,jitter=0.5"),
    size=16,
    sizes=(8, 16, 24),
    epochs=1,
    batch_size=2,
)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(tiny(grid=(4, 4), num_classes=3).model, class_names=NAMES)


@pytest.fixture(scope="module")
def done(photos, backbone, tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    return output, run(backbone, photos, output)


def run(backbone, photos, output, config=CONFIG):
    return list(study(backbone, photos, output=output, config=config, progress=False))


def test_a_report_of_every_encoding_at_every_size(done, backbone):
    output, lines = done
    assert "trained on 3 photos at 16 px for 1 epochs, tested on 3 others" in lines[0]
    for name in ("as trained", *CONFIG.encodings):
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == 2
    rows = (output / "figures.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 5 * 2
    assert (output / "positions.png").is_file() and (output / "report.md").is_file()
    same = [row for row in rows if row.startswith("16,as trained,same,")]
    assert same[0].split(",")[3] == "100"


def test_a_stopped_study_goes_on_and_gives_the_same_report(done, photos, backbone, monkeypatch):
    output, lines = done
    report = (output / "report.md").read_bytes()
    (output / "none" / "24px.json").unlink()
    folder = output / "comrope-form-ap-block-2-jitter-0.5"
    (folder / "model.safetensors").unlink()
    for file in folder.glob("*.json"):
        file.unlink()
    names = []
    monkeypatch.setattr(
        position_transfer, "train", lambda *args: (names.append(args[4]), train(*args))
    )
    torch.manual_seed(5)
    assert run(backbone, photos, output) == lines and (output / "report.md").read_bytes() == report
    assert names == ["comrope:form=ap,block=2,jitter=0.5"]
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="output: .*model.safetensors is damaged .* delete it"):
        run(backbone, photos, output)
    with pytest.raises(ValueError, match="output: .* has other settings or photos"):
        run(backbone, photos, output, dataclasses.replace(CONFIG, lr=0.1))
    more = dataclasses.replace(CONFIG, encodings=("none", "liere:block=4"), sizes=(16,))
    assert any("liere" in line for line in run(backbone, photos, output, more))
    assert names[1:] == ["liere:block=4"]


def test_the_place_of_a_patch_is_all_that_is_taken_out(backbone):
    plain, bare = student_of(backbone, "absolute"), student_of(backbone, "none")
    own, given = bare.model.pos_embed, backbone.model.pos_embed
    assert torch.equal(plain.model.pos_embed, given) and plain.model.pos_embed.requires_grad
    assert torch.equal(own[:, 0], given[:, 0]) and not own.requires_grad
    torch.testing.assert_close(own[:, 1:], given[:, 1:].mean(1, keepdim=True).expand(-1, 16, -1))
    kept = student_of(backbone, "axial", keep_absolute=True)
    assert torch.equal(kept.model.pos_embed, given)
    images = torch.rand(1, 3, 16, 16)
    moved = images.unflatten(-1, (4, 4)).flip(-2).flatten(-2)  # columns of patches change places
    for name, blind in (("none", True), ("comrope:block=4", False)):
        network = student_of(backbone, name).eval()
        a, b = network.logits(images), network.logits(moved)
        assert torch.allclose(a, b, atol=1e-5) == blind
    larger = resized(bare, 24).model.pos_embed[:, 1:]
    torch.testing.assert_close(larger, larger[:, :1].expand_as(larger))


def test_training_comes_closer_to_the_network_as_it_was_and_leaves_it_alone(backbone, photos):
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    paths = sorted(photos.rglob("*.png"))
    pixels = pixels_of(paths, backbone)
    targets = targets_of(backbone, pixels, 4)
    config = dataclasses.replace(CONFIG, epochs=20, batch_size=3, lr=3e-3)
    student = student_of(backbone, "comrope:block=4")
    with torch.no_grad():
        student.model.head.bias += torch.tensor([1.0, -1, 0])  # places alone matter little here
    start = student.model.blocks[0].attn.mechanism.rotate.raw.detach().clone()

    def distance():
        with torch.no_grad():
            found = student.logits(pixels / 255).log_softmax(1)
        return float((targets[0].softmax(1) * (targets[0].log_softmax(1) - found)).sum(1).mean())

    first = distance()
    train(student, pixels, targets, config, progress=False)
    assert distance() < first / 2
    assert not torch.equal(student.model.blocks[0].attn.mechanism.rotate.raw, start)
    assert all(torch.equal(x, before[name]) for name, x in backbone.model.state_dict().items())


def test_what_does_not_fit_is_refused(backbone, photos, tmp_path):
    for changes, words in (
        ({"encodings": ("comrop",)}, "rotate: unknown rotation 'comrop'; did you mean"),
        ({"encodings": ("comrope:block=3",)}, "block: got 3 for heads of 8"),
        ({"sizes": (9,)}, "sizes: got 9; give multiples of a patch, 4 pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            run(backbone, photos, tmp_path / "x", dataclasses.replace(CONFIG, **changes))
    assert not (tmp_path / "x").exists()
    bare = load_backbone(
        tiny(grid=(4, 4), num_classes=3, pos_embed="none").model, class_names=NAMES
    )
    with pytest.raises(ValueError, match="backbone: .* adds no trained positions"):
        run(bare, photos, tmp_path / "x")


def test_the_command_runs_quickly(photos, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("xattn.cli.model.BackboneArgs.load", lambda self: backbone)
    command = ["positions", str(photos), "--quick", "--size", "16"]
    command += ["--encodings", "none", "comrope:block=4", "--output", str(tmp_path / "out")]
    assert main(command) in (0, None)
    assert "| `comrope:block=4` |" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "record.json").read_text())
    assert kept["config"]["epochs"] == 1
