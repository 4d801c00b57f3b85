"""Distillation: mechanisms learn their layer's softmax; runs resume exactly; labels are not read."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photo_vit import NAME, NETWORK, SIDE
from PIL import Image
from safetensors.torch import load_file, save_file
from small_networks import made
from training_runs import killed_and_resumed

import xattn
from xattn.backbone import converted, sha256
from xattn.backbone.conversion import with_trained_weights
from xattn.cli import main
from xattn.photos.sources import open_photos, split_every_nth
from xattn.training.distilling import layer_losses, learning_rate, locate_step, softmax_passes
from xattn.training.students.closeness import (
    Closeness,
    closeness,
    head_closeness,
    head_csv,
    head_table,
)
from xattn.training.students.distilled import (
    LowRankUpdate,
    Student,
    layer_passes,
    run_mechanism,
    sampled_rows,
)

ROOT = Path(__file__).resolve().parents[2]
AGENT = {"agents": 4, "window": [4, 4]}
SMALL = xattn.DistillConfig(epochs=3, batch_size=4, workers=0, rows=5, checkpoint_every=2)


@pytest.fixture(scope="module")
def vit():
    return made("vit")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 36)).save(folder / f"{i:02d}.png")
    return folder


def train(vit, photos, name="agent", layers=None, options=AGENT, config=SMALL, **more):
    return xattn.distill(
        vit, name, layers, options, data=photos, config=config, progress=False, **more
    )


# ---------------------------------------------------------------- what is learned


def test_the_error_falls_and_only_the_mechanism_changes(vit, photos, tmp_path):
    before, names = sha256(vit.model), set(vit.model.state_dict())
    result = train(vit, photos, layers=[1], output=tmp_path / "run")
    assert result.after.error < 0.9 * result.before.error
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert result.steps == len(log) == 3 * 5  # 18 photos, as one of ten is measured on
    assert log[-1]["loss"] < log[0]["loss"]
    assert sha256(vit.model) == before and vit.conversion is None
    trained, start = result.backbone.model.state_dict(), converted(vit, "agent", [1], AGENT)
    for name, value in start.model.state_dict().items():
        same = torch.equal(trained[name], value)
        assert same == (name in names), name
    assert result.backbone.fingerprint not in (vit.fingerprint, start.fingerprint)
    assert result.backbone.name == start.name
    assert not any(p.requires_grad for p in result.backbone.parameters())


def test_a_mechanism_that_is_the_softmax_is_close_from_the_start(vit, photos):
    kept = open_photos(photos)
    found = closeness(vit, converted(vit, "softmax"), kept, batch_size=3)
    assert found.photos == 20 and found.agreement == 1.0
    assert found.row_kl == pytest.approx(0, abs=1e-5) and found.error < 1e-9
    assert found.cosine == pytest.approx(1, abs=1e-6)
    other = closeness(vit, converted(vit, "gna", "1", {"kernel": 2}), kept)
    assert [layer.layer for layer in other.layers] == [1] and other.error > 1e-4


@pytest.mark.parametrize("name", ["flow", "lla"])
def test_closeness_has_no_divergence_of_rows_that_are_not_shares(vit, photos, name):
    found = closeness(vit, converted(vit, name, [1]), open_photos(photos), 2)
    assert found.row_kl is None and found.error > 0


def test_figures_do_not_depend_on_the_batches_and_can_be_read_back(vit, photos):
    student = converted(vit, "agent", options=AGENT)
    one, two = (closeness(vit, student, open_photos(photos), 7, size) for size in (1, 4))
    assert one.photos == two.photos == 7 and one.row_kl == pytest.approx(two.row_kl, rel=1e-4)
    assert one.error == pytest.approx(two.error, rel=1e-4)
    assert one.cosine == pytest.approx(two.cosine, rel=1e-5)
    assert Closeness.of_record(json.loads(json.dumps(one.record()))) == one


@pytest.mark.parametrize("name, options", [("agent", AGENT), ("dma", {"window": 9})])
def test_a_layer_learns_from_what_the_network_gives_it(vit, name, options):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), layer_passes(vit, [0, 1]) as passes:
        vit.logits(x)
    inputs = passes[1].inputs((4, 4), 1)
    with torch.no_grad(), layer_passes(converted(vit, name, [1], options), [1]) as own:
        pass
    student = converted(vit, name, [1], options)
    layer = student.model.blocks[1].attn
    with torch.no_grad(), layer_passes(student, [1]) as own:
        student.logits(x)  # layer 0 is the network's own, so layer 1 reads the same
    found = run_mechanism(layer.mechanism.requires_grad_(True), inputs)
    local = layer.mechanism.local(inputs)
    output = found.output if local is None else found.output - local
    assert torch.allclose(output, own[1].call.output, atol=1e-5)
    assert torch.equal(inputs.x, own[1].args[0]) and found.output.requires_grad


def test_a_low_rank_update_starts_as_nothing_from_rows_of_length_about_one():
    torch.manual_seed(0)
    weight = torch.randn(7, 400)
    update = LowRankUpdate(weight, 64)
    assert torch.equal(update(weight), weight)
    norms = update.a.norm(dim=1)
    assert norms.shape == (64,) and 0.8 < norms.min() < norms.max() < 1.2
    update.b.data.normal_()
    torch.testing.assert_close(update(weight), weight + 2 * update.b @ update.a)


def test_what_a_mechanism_logs_is_in_the_log(vit, photos, tmp_path):
    config = replace(SMALL, finetune="lora", finetune_epochs=1)
    train(vit, photos, "flow", options={}, config=config, output=tmp_path / "run")
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert all(0 < json.loads(line)["saturation"] < 1 for line in lines)


def test_sampled_rows_are_a_function_of_seed_and_step():
    assert sampled_rows(5, 8, 0, 3).tolist() == [0, 1, 2, 3, 4]
    one = sampled_rows(50, 8, 0, 3)
    torch.rand(4)
    assert torch.equal(one, sampled_rows(50, 8, 0, 3)) and len(set(one.tolist())) == 8
    assert not torch.equal(one, sampled_rows(50, 8, 0, 4))
    assert not torch.equal(one, sampled_rows(50, 8, 1, 3))


def test_the_rate_rises_and_falls_in_each_part():
    config = replace(SMALL, finetune="lora", finetune_epochs=2)
    rates = [learning_rate(step, 20, config) for step in range(100)]
    assert max(rates[:60]) == rates[3] == 1e-2 and rates[59] < 1e-4
    assert max(rates[60:]) == pytest.approx(1e-4) and rates[99] < 1e-6


def test_parts_follow_one_another_each_with_its_own_rate():
    config = replace(SMALL, student_epochs=1, student_lr=2e-3, finetune="lora", finetune_epochs=1)
    rates = [learning_rate(step, 20, config) for step in range(100)]
    assert [locate_step(step, 20, config)[0] for step in (0, 59, 60, 79, 80, 99)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert max(rates[:60]) == 1e-2 and max(rates[60:80]) == pytest.approx(2e-3)
    assert max(rates[80:]) == pytest.approx(1e-4) and config.all_epochs == 5
    later = replace(config, epochs=0)
    assert locate_step(0, 20, later) == (1, 0, 20) and locate_step(40, 20, later) == (2, 20, 20)
    with pytest.raises(ValueError, match="epochs: got 0 without student_epochs or finetune"):
        replace(SMALL, epochs=0)


def test_layers_may_learn_from_the_tokens_of_the_converted_network(vit):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student = Student(vit, "hedgehog", None, {}, SMALL)
    own, theirs = (softmax_passes(student, x, own) for own in (True, False))
    assert torch.equal(own[0].args[0], theirs[0].args[0])
    assert not torch.allclose(own[1].args[0], theirs[1].args[0])
    with torch.no_grad(), layer_passes(student.network, [1]) as passes:
        student.network.logits(x)
    assert torch.equal(own[1].args[0], passes[1].args[0])
    inputs = own[1].inputs((4, 4), 1)
    exact = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
    assert torch.allclose(own[1].call.output, exact, atol=1e-5)
    layer_losses(student, x, SMALL, 0, own_tokens=True)["loss"].backward()
    assert all(p.grad is not None for p in student.mechanisms.parameters())


def test_training_on_the_tokens_of_the_converted_network_changes_mechanisms_alone(vit, photos):
    before = sha256(vit.model)
    config = replace(SMALL, epochs=1, student_epochs=2, student_lr=1e-2)
    result = train(vit, photos, "hedgehog", options={}, config=config)
    assert result.steps == 3 * 5 and sha256(vit.model) == before
    assert result.after.row_kl < 0.9 * result.before.row_kl


def test_training_goes_on_from_an_earlier_conversion(vit, photos, tmp_path):
    first = train(vit, photos, "hedgehog", options={}, output=tmp_path / "one")
    folder = tmp_path / "one/conversion"
    config = replace(SMALL, epochs=0, finetune="lora", finetune_epochs=1, finetune_lr=1e-3)
    given = {"name": "hedgehog", "options": {}, "start": folder}
    second = train(vit, photos, **given, config=config, output=tmp_path / "two")
    assert second.before == first.after and second.after != first.after
    head = json.loads((tmp_path / "two/run.json").read_text())["head"]
    assert head["start"] == json.loads((folder / "config.json").read_text())["sha256"]
    with pytest.raises(ValueError, match="start: .* also contains trained weights of the network"):
        train(vit, photos, **{**given, "start": tmp_path / "two/conversion"}, config=config)
    with pytest.raises(ValueError, match="start: .* holds hedgehog in layers 0-1, not hedgehog in"):
        train(vit, photos, **given, layers=[1], config=config)


def test_heads_are_compared_with_their_softmax_and_with_maps_that_learn_nothing(vit, photos):
    kept = open_photos(photos)
    found = head_closeness(vit, converted(vit, "softmax", [1]), kept, most=3, batch_size=2)
    own = [head for head in found if head.map == "softmax"]
    assert {head.map for head in found} == {"softmax", "elu + 1", "Taylor"}
    assert all(head.layer == 1 for head in found) and len(found) == 3 * len(own)
    for head in own:
        assert head.divergence == pytest.approx(0, abs=1e-5) and head.order > 0.99
        assert head.entropy == pytest.approx(head.softmax_entropy, rel=1e-4)
    table = head_table(found)
    assert len({line.count("|") for line in table}) == 1 and len(table) == 3 + len(own)
    assert head_csv(found).count("\n") == 1 + len(found)


# ---------------------------------------------------------------- the network around it


@pytest.mark.parametrize("finetune", ["lora", "all"])
def test_the_network_can_be_trained_on_its_own_logits(vit, photos, tmp_path, finetune):
    before = sha256(vit.model)
    config = replace(SMALL, epochs=1, finetune=finetune, finetune_epochs=4, finetune_lr=1e-3)
    gates = {"options": {"window": 1}, "name": "dma"}
    result = train(vit, photos, **gates, config=config, output=tmp_path / "run")
    assert sha256(vit.model) == before
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert "rows" in log[0] and "rows" not in log[-1]
    logits = [line["logits"] for line in log[5:]]
    assert sum(logits[-5:]) < sum(logits[:5])
    own, found = vit.model.state_dict(), result.backbone.model.state_dict()
    changed = {n for n, v in own.items() if not torch.equal(v, found[n])}
    projections = {f"blocks.{i}.attn.{n}.weight" for i in (0, 1) for n in ("qkv", "proj")}
    assert changed == projections if finetune == "lora" else changed > projections
    loaded = xattn.load_conversion(tmp_path / "run/conversion", vit)
    assert loaded.fingerprint == result.backbone.fingerprint
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.logits(x), result.backbone.logits(x))


def test_the_network_around_a_mechanism_without_parameters_can_be_trained(vit, photos):
    config = replace(SMALL, finetune="lora", finetune_epochs=1)
    result = train(vit, photos, "gna", options={"kernel": 2}, config=config)
    assert result.steps == 5 and set(result.losses) == {"loss", "logits", "own"}
    assert result.backbone.fingerprint != converted(vit, "gna", None, {"kernel": 2}).fingerprint
    with pytest.raises(ValueError, match="epochs: got 0 without student_epochs or finetune"):
        xattn.DistillConfig(epochs=0)


def test_updates_start_at_the_networks_own_weights(vit):
    student = Student(vit, "softmax", None, None, replace(SMALL, finetune="lora"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(student.network.logits(x), vit.logits(x), atol=1e-5)
    assert len(student.updates) == 4 and not student.mechanisms["0"].state_dict()
    assert all(p.requires_grad for p in student.parameters())


# ---------------------------------------------------------------- runs


def test_a_resumed_run_equals_a_whole_one(vit, photos, tmp_path):
    config = replace(SMALL, epochs=2, finetune="lora", finetune_epochs=2)
    whole = train(vit, photos, config=config, output=tmp_path / "whole")
    for stop in (5, 13):  # in each part
        step, run = Student.train, {"left": stop}

        def stopping(self, mode=True, run=run, step=step):
            run["left"] -= 1
            if run["left"] < 0:
                raise RuntimeError("killed")
            return step(self, mode)

        folder = tmp_path / f"killed{stop}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Student, "train", stopping)
            with pytest.raises(RuntimeError, match="killed"):
                train(vit, photos, config=config, output=folder)
        again = train(vit, photos, config=config, output=folder, resume=True)
        assert again.backbone.fingerprint == whole.backbone.fingerprint
        assert again.before == whole.before and again.after == whole.after
        one, two = (
            load_file(f / "conversion/model.safetensors") for f in (folder, tmp_path / "whole")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(ValueError, match="resume: .*other settings .rows: 5 then, 6 now"):
        train(vit, photos, config=replace(config, rows=6), output=tmp_path / "whole", resume=True)
    with pytest.raises(ValueError, match="resume: .*other settings .layers: '0-1' then, '1' now"):
        train(vit, photos, layers="1", config=config, output=tmp_path / "whole", resume=True)


def test_a_conversion_belongs_to_its_backbone(vit, photos, tmp_path):
    result = train(vit, photos, config=replace(SMALL, epochs=1), output=tmp_path / "run")
    folder = tmp_path / "run" / "conversion"
    loaded = xattn.load_conversion(folder, vit)
    assert loaded.fingerprint == result.backbone.fingerprint and loaded.name == result.backbone.name
    config = json.loads((folder / "config.json").read_text())
    assert config["conversion"] == result.backbone.conversion_record()["conversion"][0]
    assert config["backbone"] == {"name": vit.name, "sha256": vit.fingerprint}
    assert all("mechanism" in name for name in load_file(folder / "model.safetensors"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert Closeness.of_record(report["after"]) == result.after
    other = made("vit")
    other.model.norm.weight.data.add_(1)
    with pytest.raises(ValueError) as error:
        xattn.load_conversion(folder, other)
    assert vit.fingerprint in str(error.value) and other.fingerprint in str(error.value)
    with pytest.raises(
        FileNotFoundError, match="mechanism: .* holds no config.json; give the folder"
    ):
        xattn.load_conversion(tmp_path, vit)
    state = load_file(folder / "model.safetensors")
    missing = dict(list(state.items())[1:])
    for damaged in (missing, {**state, "x.y": torch.zeros(1)}):
        with pytest.raises(ValueError, match="does not fit agent:.*names differ"):
            with_trained_weights(vit, result.backbone.conversion[0], damaged)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a trained conversion .KeyError"):
        xattn.load_conversion(folder, vit)


def test_a_conversion_that_was_changed_on_disk_is_refused(vit, photos, tmp_path):
    train(vit, photos, config=replace(SMALL, epochs=1), output=tmp_path / "run")
    folder = tmp_path / "run" / "conversion"
    weights, config = folder / "model.safetensors", folder / "config.json"
    bytes_, text = weights.read_bytes(), config.read_text()
    hashed = json.loads(text)["sha256"]
    assert xattn.load_conversion(folder, vit).conversion_record()["conversion_sha256"] == hashed
    assert "conversion_sha256" not in converted(vit, "agent", None, AGENT).conversion_record()

    def refused() -> bool:
        with pytest.raises(ValueError, match=f"was changed or damaged .*{hashed}.; train") as error:
            xattn.load_conversion(folder, vit)
        return "\n" not in str(error.value)

    weights.write_bytes(bytes_[:-4] + bytes([bytes_[-4] ^ 1]) + bytes_[-3:])
    assert refused()
    weights.write_bytes(bytes_)
    config.write_text(text.replace('"layers": "0-1"', '"layers": "1"'))
    assert refused()
    config.write_text(text.replace('"agents": 4', '"agents": 9'))
    assert refused()
    config.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}))
    with pytest.raises(ValueError, match="not a trained conversion .*sha256.*train it again"):
        xattn.load_conversion(folder, vit)


def test_one_photo_of_ten_is_measured_on_and_not_trained_on(photos):
    whole = open_photos(photos)
    rest, kept = split_every_nth(whole, 10)
    assert [kept.name(i)[-6:] for i in range(len(kept))] == ["09.png", "19.png"]
    assert {rest.name(i) for i in range(18)}.isdisjoint(kept.name(i) for i in range(2))
    assert rest.describe() != kept.describe() != whole.describe()
    assert rest.load(9).size == whole.load(10).size


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": "0-5"}, "layers: got 2, but VisionTransformer has blocks 0 to 1"),
        (
            {"name": "softmax", "options": None},
            "name: softmax has no parameters, so there is nothing",
        ),
        (
            {"name": "gna", "options": {"kernel": 2}},
            "use it without training (--mechanism gna:kernel=2), or",
        ),
        ({"name": "agentt"}, "unknown attention 'agentt'"),
        ({"data": "nowhere/"}, "nowhere"),
        ({"data": []}, "data: got an empty list"),
        ({"data": ["one.png"]}, "data: got 1 photos, one of 10 is kept to measure on"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(vit, photos, arguments, message):
    given = {"name": "agent", "options": AGENT, "data": photos, **arguments}
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        xattn.distill(vit, **given, config=SMALL, progress=False)
    assert "\\n" not in str(error.value)


def test_a_converted_network_is_no_teacher(vit, photos):
    with pytest.raises(ValueError, match="is already converted; give the original network"):
        train(converted(vit, "softmax"), photos)
    encoder = copy.deepcopy(vit)
    encoder.model.num_classes = 0
    with pytest.raises(ValueError, match="finetune: .* has no classes"):
        train(encoder, photos, config=replace(SMALL, finetune="lora"))
    with pytest.raises(ValueError, match="rows, outputs: got 0 and 0"):
        xattn.DistillConfig(rows=0, outputs=0)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(vit, photos, tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=64)
    save_file(model.state_dict(), str(tmp_path / "vit.safetensors"))
    network = ["-b", "test_vit", "--weights", str(tmp_path / "vit.safetensors")]
    network += ["--input-size", "64", "--device", "cpu"]
    agent = ["--mechanism", "agent:agents=4,window=[4,4]", "--layers", "2-3"]
    train = ["--epochs", "2", "--batch-size", "4", "--workers", "0"]
    return network, ["distill", *network, str(photos), *agent, *train]


def loaded_backbone(network, folder):
    backbone = xattn.load_backbone(network[1], network[3], input_size=64)
    return xattn.load_conversion(folder, backbone)


def test_the_command_trains_and_other_jobs_load_the_folder(command, photos, tmp_path, capsys):
    network, distill = command
    assert main([*distill, "--output", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "| layer 2 | " in told and "same class as the original network" in told
    folder = str(tmp_path / "run" / "conversion")
    out = ["--output", str(tmp_path / "pack"), "--explainers", "raw_attention"]
    assert main(["explain", str(photos), *network, "--mechanism", folder, *out]) == 0
    head = xattn.create_head("ttame", loaded_backbone(network, folder))
    xattn.save_head(head, tmp_path / "head")
    explain = ["explain", str(photos), *network, "--heads", str(tmp_path / "head")]
    out.append("--overwrite")
    assert main([*explain, "--mechanism", folder, *out[:2], "--overwrite"]) == 0
    untrained = ["--mechanism", "agent:agents=4,window=[4,4]", "--layers", "2-3"]
    assert main([*explain, *untrained, *out[:2], "--overwrite"]) == 2
    assert (
        "trained on, with --mechanism FOLDER (what xattn distill wrote)" in capsys.readouterr().err
    )
    for wrong, message in (
        (["--mechanism", folder, "--layers", "1"], "layers: got 1, but "),
        (
            ["--mechanism", str(tmp_path / "run")],
            "holds no config.json; give the folder 'conversion'",
        ),
    ):
        assert main(["explain", str(photos), *network, *wrong, *out]) == 2
        assert message in capsys.readouterr().err
    assert main(["distill", *network, str(photos)]) == 2
    assert "mechanism: got none; give the one to train" in capsys.readouterr().err
    assert main([*distill, "--output", str(tmp_path / "run")]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.slow
def test_hedgehog_comes_nearer_to_the_rows_of_a_trained_vit_than_elu(tmp_path, photo_vit):
    weights, photos = photo_vit
    command = ["distill", *NETWORK, "--weights", str(weights), str(photos), "--epochs", "2"]
    command += ["--mechanism", "hedgehog", "--layers", "10-11", "--workers", "0"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    before, after = (Closeness.of_record(report[key]) for key in ("before", "after"))
    backbone = xattn.load_backbone(NAME, weights, input_size=SIDE)
    _, kept = split_every_nth(open_photos(photos), 10)
    elu = closeness(backbone, converted(backbone, "hedgehog", "10-11", {"feature": "elu"}), kept)
    assert after.row_kl < 0.5 * before.row_kl and after.row_kl < elu.row_kl


DATA = ROOT.parent / "shared" / "data"


@pytest.mark.slow
def test_hedgehog_learns_the_rows_of_a_trained_vit_twice_as_well_as_elu(tmp_path, capsys):
    weights = DATA / "vit-tiny" / "vit_tiny_patch16_224.safetensors"
    photos = DATA / "imagenet-sample"
    if not weights.is_file() or not photos.is_dir():
        pytest.skip("needs ../shared/data")
    command = [
        "distill",
        "-b",
        "vit_tiny_patch16_224",
        "--weights",
        str(weights),
        "--device",
        "cpu",
    ]
    command += [str(photos), "--mechanism", "hedgehog", "--layers", "8-11"]
    command += ["--workers", "0", "--epochs", "1"]
    seconds, work = killed_and_resumed(
        command, tmp_path, 57, {"OMP_NUM_THREADS": "1"}, "conversion", 57 // 2
    )
    report = json.loads((tmp_path / "whole/report.json").read_text())
    before, after = (Closeness.of_record(report[key]) for key in ("before", "after"))
    backbone = xattn.load_backbone("vit_tiny_patch16_224", weights)
    _, kept = split_every_nth(open_photos(photos), 10)
    elu = closeness(backbone, converted(backbone, "hedgehog", "8-11", {"feature": "elu"}), kept)
    with capsys.disabled():
        print(f"\nrow KL {before.row_kl:.3f} -> {after.row_kl:.3f}, elu + 1 {elu.row_kl:.3f}")
        print(
            f"{seconds:.0f} s, {work:.0f} s of one core; same class {before.agreement:.3f} -> {after.agreement:.3f}"
        )
    assert after.photos == elu.photos == 50
    assert after.row_kl <= 0.5 * elu.row_kl and after.row_kl < before.row_kl
