"""``xattn prune``: heads that matter stay, what is left learns, runs resume, and every command reads the folder."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from photo_vit import NAME, NETWORK, SIDE
from PIL import Image
from safetensors.torch import save_file

import xattn
from xattn.backbone import sha256
from xattn.backbone.pruning import Pruning, pruned
from xattn.cli import main
from xattn.config import PruneConfig
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.training import pruning_run
from xattn.training.pruning_run import (
    PrunedStudent,
    check_tail,
    choose_heads,
    read_photos,
    split,
    tail_inputs,
)

HEADS = PruneConfig(batch_size=4, epochs=3, scored=8, checkpoint_every=2)
SHRP = replace(HEADS, method="shrp", lr=1e-3, epochs=6)


def network(classes=5):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=classes, img_size=64)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def vit():
    return xattn.load_backbone(network(), input_size=64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(15):
        noise = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(noise).resize((70, 66)).save(folder / str(i % 3) / f"{i:02d}.png")
    return folder


def cut(vit, photos, layers=None, config=HEADS, **more):
    return xattn.prune(vit, layers, data=photos, config=config, progress=False, **more)


# ---------------------------------------------------------------- what is chosen and learned


def test_the_whole_network_stays_and_the_pruned_one_gives_the_recorded_answers(vit, photos):
    before, x = sha256(vit.model), torch.rand(2, 3, 64, 64)
    logits = vit.logits(x)
    result = cut(vit, photos, "4-5")
    assert sha256(vit.model) == before and torch.equal(vit.logits(x), logits)
    assert result.pruning.layers == [4, 5] and all(
        len(h) == 1 for h in result.pruning.kept.values()
    )
    assert list(result.answers) == ["whole", "cut", "trained"] and result.learned == 12
    assert [name[-6:] for name in result.photos] == ["00.png", "01.png", "02.png"]
    _, held = split(photos)
    images = torch.stack(
        [pruning_run.TrainImages(held, vit.preprocessing, 0, False)[0, i][1] for i in range(3)]
    )
    for stage, found in (("whole", vit), ("trained", result.backbone)):
        assert torch.equal(found.logits(images).argmax(1), result.answers[stage].classes)
    for i, block in enumerate(result.backbone.model.blocks):
        own = vit.model.blocks[i]
        assert (block.mlp.fc1.weight is own.mlp.fc1.weight) == (i < 4), "only pruned blocks learn"
    untrained = cut(vit, photos, "4-5", replace(HEADS, epochs=0))
    assert untrained.pruning == result.pruning and list(untrained.answers) == ["whole", "cut"]
    assert torch.equal(untrained.backbone.model(x), pruned(vit.model, result.pruning)(x))


def test_training_brings_the_tokens_closer(vit, photos):
    for config in (replace(HEADS, lr=1e-3, epochs=8), replace(SHRP, epochs=12)):
        result = cut(vit, photos, "5", config)
        stages = result.answers
        first = stages["cut"] if config.method == "heads" else stages["routed"]
        assert stages["trained"].cosine.mean() > first.cosine.mean()


def test_the_head_without_which_least_changes_leaves(vit, photos):
    model = xattn.load_backbone(network(), input_size=64)
    attention = model.model.blocks[5].attn
    attention.proj.weight.data[:, : attention.head_dim] = 0  # head 0 adds nothing
    [seen], tail, _, _ = read_photos(model, 4, split(photos)[0], HEADS, False)
    choice = choose_heads(model, tail, seen, 5, 1, 8)
    assert choice.kept == (1,) and choice.changes[0] < 1e-6 < choice.changes[1]
    assert choose_heads(model, tail, seen, 5, 2, 8).kept == (0, 1)


def test_shrp_keeps_the_most_used_head_and_tells_usage(vit, photos):
    result = cut(vit, photos, "3,5", SHRP)
    assert list(result.answers) == ["whole", "routed", "cut", "trained"]
    assert result.pruning.method == "shrp" and result.pruning.hidden == 2 * 64
    for i in (3, 5):
        assert sum(result.usage[i]) == pytest.approx(1, abs=1e-5)
        assert result.pruning.kept[i] == (int(np.argmax(result.usage[i])),)
    assert cut(vit, photos, "5", replace(SHRP, hidden=7)).pruning.hidden == 7


def test_a_network_without_classes_learns_its_tokens(photos):
    encoder = xattn.load_backbone(network(0), input_size=64)
    for config in (HEADS, replace(SHRP, mirrored=True)):
        result = cut(encoder, photos, config=config)
        assert result.losses["logits"] == 0 < result.losses["tokens"]


# ---------------------------------------------------------------- runs


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(vit, photos, tmp_path):
    for config, stops in ((HEADS, (4,)), (SHRP, (3, 11))):
        whole = cut(vit, photos, config=config, output=tmp_path / config.method)
        for stop in stops:
            losses, left = PrunedStudent.losses, {"steps": stop}

            def failing(self, *given, losses=losses, left=left):
                left["steps"] -= 1
                if left["steps"] < 0:
                    raise RuntimeError("killed")
                return losses(self, *given)

            folder = tmp_path / f"{config.method}-{stop}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PrunedStudent, "losses", failing)
                with pytest.raises(RuntimeError, match="killed"):
                    cut(vit, photos, config=config, output=folder)
            again = cut(vit, photos, config=config, output=folder, resume=True)
            assert again.backbone.fingerprint == whole.backbone.fingerprint
            assert again.usage == whole.usage and again.losses == whole.losses
            for stage, found in whole.answers.items():
                assert torch.equal(found.cosine, again.answers[stage].cosine)
    with pytest.raises(ValueError, match="resume: .*other settings .lr: 0.001 then, 0.002 now"):
        cut(vit, photos, config=replace(SHRP, lr=2e-3), output=tmp_path / "shrp", resume=True)
    with pytest.raises(ValueError, match="output: .* holds a run already"):
        cut(vit, photos, output=tmp_path / "shrp")


def test_unreadable_photos_are_left_out_and_told(vit, photos, tmp_path):
    (tmp_path / "bad.png").write_text("words")
    paths = [tmp_path / "bad.png", *sorted(photos.rglob("*.png"))[:9]]
    result = cut(vit, [paths[1], *paths], config=replace(HEADS, epochs=1))
    assert [name for name, _ in result.skipped] == [str(tmp_path / "bad.png")]
    assert result.learned == 7 and len(result.photos) == 3


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": 0}, "keep: got 0; give an int of at least 1"),
        ({"method": "tails"}, "method: got 'tails'; give 'heads' or 'shrp'"),
        ({"method": "shrp", "keep": 2}, "keep: got 2; shrp keeps a single head, give 1"),
        ({"method": "shrp", "epochs": 0}, "epochs: got 0; shrp has to train the MLPs"),
        ({"routed": 1.0}, "routed: got 1.0; give a share of the steps"),
        ({"tokens": 0, "logits": 0}, "tokens, logits: got 0 and 0"),
        ({"lr": float("nan")}, "lr: got nan; give a positive learning rate"),
        ({"entropy": -1.0}, "entropy: got -1.0; give a finite number of at least 0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PruneConfig(**options)


def test_what_cannot_be_pruned_is_refused_before_photos_are_read(vit, photos, tmp_path):
    for given, message in (
        ({"config": replace(HEADS, keep=3)}, "keep: got 3 for block 5 of 2 heads; give 1 to 2"),
        ({"layers": "6"}, "layers: got 6, but VisionTransformer has blocks 0 to 5"),
        ({"layers": "x"}, "layers: got 'x'"),
        ({"data": []}, "data: got an empty list"),
        (
            {"data": [str(next(photos.rglob("*.png")))]},
            "data: got 1 photos, but one in 5 is set aside",
        ),
    ):
        arguments = {"photos": given.pop("data", photos), **given}
        with pytest.raises(ValueError, match=re.escape(message)):
            cut(vit, **arguments)
    cnn = xattn.load_backbone("test_efficientnet", weights=None)
    with pytest.raises(ValueError, match="backbone: a block of EfficientNet .* has no attention"):
        cut(cnn, photos)
    (tmp_path / "one.png").write_text("x")
    (tmp_path / "two.png").write_text("x")
    with pytest.raises(ValueError, match="data: none of the 1 images could be read"):
        cut(vit, tmp_path)


def test_more_tokens_than_fit_into_memory_are_refused(vit, photos, monkeypatch):
    monkeypatch.setattr(pruning_run, "KEPT_BYTES", 1000)
    with pytest.raises(ValueError, match="data: the tokens of .* GiB of memory.*give fewer photos"):
        cut(vit, photos)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def command(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    save_file(network().state_dict(), folder / "vit.safetensors")
    (folder / "labels.json").write_text(
        json.dumps({p.name: i % 5 for i, p in enumerate(sorted(photos.rglob("*.png")))})
    )
    model = ["-b", "test_vit", "--input-size", "64", "--device", "cpu"]
    prune = ["prune", str(photos), *model, "--weights", str(folder / "vit.safetensors")]
    prune += ["--epochs", "1", "--batch-size", "4", "--labels", str(folder / "labels.json")]
    return folder, model, prune


@pytest.mark.parametrize("method", ["heads", "shrp"])
def test_the_command_writes_a_folder_that_every_command_reads(command, photos, capsys, method):
    folder, model, prune = command
    run = folder / method
    assert main([*prune, "--method", method, "--layers", "4,5", "--output", str(run)]) == 0
    told = capsys.readouterr().out
    assert "| whole network | " in told and f"network: {run / 'network'}" in told
    record = json.loads((run / "network" / "prune.json").read_text())
    stages, networks = record["results"]["stages"], record["results"]["networks"]
    accuracy = stages["trained"]["accuracy"]
    assert accuracy["lo"] <= accuracy["mean"] <= accuracy["hi"]
    assert record["results"]["photos"] == record["results"]["labelled"] == 3
    assert networks["pruned"]["parameters"] < networks["whole"]["parameters"]
    assert networks["pruned"]["images_per_second"] > 0
    model = [*model, "--weights", str(run / "network")]
    some = str(next(photos.rglob("*.png")))
    explain = ["explain", some, *model, "--explainers", "rollout", "--output", str(run / "pack")]
    assert main(explain) == 0
    measure = [
        str(photos),
        *model,
        "--explainers",
        "rollout",
        "--no-sanity",
        "--metrics",
        "masking",
    ]
    assert main(["evaluate", *measure, "--output", str(run / "evaluated")]) == 0
    train = ["train", str(photos), *model, "--recipe", "small", "--epochs", "1"]
    assert main([*train, "--workers", "0", "--output", str(run / "head")]) == 0
    head = ["--heads", str(run / "head" / "head"), "--output", str(run / "other")]
    assert main(["explain", some, *model, *head]) == 0
    whole = [*model[:6], "--weights", str(folder / "vit.safetensors")]
    capsys.readouterr()
    assert main(["explain", some, *whole, *head, "--overwrite"]) == 2
    assert "trained on" in capsys.readouterr().err


def test_bad_command_lines_are_one_line(command, capsys):
    folder, model, prune = command
    for wrong, message in (
        (["--mechanism", "gna"], "mechanism: heads are removed from the network's own attention"),
        (["--keep", "5"], "keep: got 5 for block 5 of 2 heads"),
        (["--labels", str(folder / "none.json")], "labels: no file"),
    ):
        assert main([*prune, *wrong, "--output", str(folder / "wrong")]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("xattn: error: ") and message in err
    assert main(["explain", prune[1], *model, "--weights", str(folder)]) == 2
    assert "is a folder; name a weight file in it" in capsys.readouterr().err


# ---------------------------------------------------------------- a trained network


@pytest.mark.slow
def test_of_a_trained_vit_the_last_blocks_heads_can_go_and_all_blocks_heads_cannot(
    tmp_path, photo_vit
):
    weights, photos = photo_vit
    command = ["prune", *NETWORK, "--weights", str(weights), str(photos), "--epochs", "0"]
    output = tmp_path / "run"
    assert main([*command, "--layers", "11", "--output", str(output)]) == 0
    stages = json.loads((output / "network" / "prune.json").read_text())["results"]["stages"]
    assert stages["cut"]["same"]["mean"] > 0.85
    vit = xattn.load_backbone(NAME, weights, input_size=SIDE)
    one = pruned(vit.model, Pruning("heads", {i: (0,) for i in range(12)}))
    files = sorted(photos.glob("*/*.png"))[::4]
    images = torch.stack([prepare(load_image(file), vit.preprocessing)[0] for file in files])
    same = one(images).argmax(1) == vit.logits(images).argmax(1)
    assert same.float().mean() < 0.5


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, stage, least",
    [
        (["--layers", "11", "--epochs", "0"], "cut", 0.77),
        (["--layers", "10-11", "--epochs", "0"], "cut", 0.70),
        (["--layers", "8-11", "--epochs", "0"], "cut", 0.48),
        (["--layers", "11", "--method", "shrp"], "trained", 0.74),
    ],
)
def test_a_trained_vit_keeps_its_accuracy(tmp_path, options, stage, least):
    weights = DATA / "vit-tiny" / "vit_tiny_patch16_224.safetensors"
    photos = DATA / "imagenet-sample"
    if not weights.is_file() or not photos.is_dir():
        pytest.skip("needs ../shared/data")
    command = ["prune", "-b", "vit_tiny_patch16_224", "--weights", str(weights), "--device", "cpu"]
    command += [str(photos), "--labels", str(photos / "classes.json"), *options]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "network" / "prune.json").read_text())
    stages = record["results"]["stages"]
    assert record["results"]["labelled"] == 100 and stages["whole"]["accuracy"]["mean"] == 0.86
    assert stages[stage]["accuracy"]["mean"] >= least


@pytest.mark.parametrize("norm", [torch.nn.Identity(), None])
def test_a_network_whose_end_is_not_its_norm_and_classifier_is_refused(norm):
    model = xattn.load_backbone(network(), input_size=64)
    seen, tail = tail_inputs(model, 3, torch.rand(2, 3, 64, 64))
    check_tail(model, tail, seen)
    model.model.norm = norm
    with pytest.raises(ValueError, match="has more after its blocks than a norm and a classifier"):
        check_tail(model, tail, seen)
