"""Converted backbones: names, fingerprints, caches, heads and commands know the conversion."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_networks import made

import xattn
from xattn.attention import Conversion, convert, revert
from xattn.backbone import converted
from xattn.backbone.conversion import save_conversion, with_trained_weights
from xattn.cli import main
from xattn.heads.probed import probed
from xattn.packs.reader import Pack

TINY = ("gna", "0", {"kernel": 2})
WORDS = "gna:kernel=2 in layers 0"


@pytest.fixture(scope="module")
def vit():
    return made("vit")


@pytest.fixture
def photos(tmp_path):
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_a_converted_backbone_is_a_new_one_with_a_name_and_fingerprint_of_its_own(vit):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before, name, hashed = vit.logits(x), vit.name, vit.fingerprint
    other = converted(vit, *TINY)
    assert other.conversion == [Conversion("gna", (0,), {"kernel": 2})]
    assert other.name == f"{name} ({WORDS})" and other.fingerprint != hashed
    assert not torch.equal(other.logits(x), before)
    assert vit.conversion is None and (vit.name, vit.fingerprint) == (name, hashed)
    assert torch.equal(vit.logits(x), before)
    both = converted(other, "dma", [1], {"window": 4})
    assert both.name == f"{name} ({WORDS} and dma:window=4 in layers 1)"
    found = {vit.fingerprint, other.fingerprint, both.fingerprint}
    found |= {converted(vit, "gna", "0", {"kernel": 3}).fingerprint}
    found |= {converted(vit, "gna", "1", {"kernel": 2}).fingerprint}
    assert len(found) == 5
    same = converted(vit, *TINY)
    for twin in (same, other.with_taps("block"), copy.deepcopy(other)):
        assert (twin.name, twin.fingerprint) == (other.name, other.fingerprint)


def test_what_a_mechanism_adds_is_the_same_each_time(vit):
    torch.rand(3)
    one = converted(vit, "agent", options={"agents": 4, "window": [4, 4]})
    torch.rand(5)
    state = torch.get_rng_state()
    two = converted(vit, "agent", options={"agents": 4, "window": [4, 4]})
    assert one.fingerprint == two.fingerprint and torch.equal(torch.get_rng_state(), state)


def test_a_backbone_converted_in_place_changes_its_fingerprint_and_back():
    backbone = made("vit")
    before = backbone.fingerprint
    convert(backbone, *TINY)
    assert backbone.fingerprint == converted(made("vit"), *TINY).fingerprint != before
    revert(backbone)
    assert backbone.fingerprint == before


def test_heads_remember_the_conversion_and_refuse_another(vit, tmp_path):
    other = converted(vit, *TINY)
    plain = xattn.save_head(xattn.create_head("ttame", vit), tmp_path / "plain")
    folder = xattn.save_head(xattn.create_head("ttame", other), tmp_path / "head")
    assert "conversion" not in json.loads((plain / "config.json").read_text())["backbone"]
    record = json.loads((folder / "config.json").read_text())["backbone"]
    assert record["conversion"] == [{"mechanism": "gna", "layers": "0", "options": {"kernel": 2}}]
    assert record["sha256"] == other.fingerprint and record["name"] == other.name
    xattn.load_head(folder, converted(vit, *TINY))
    with pytest.raises(ValueError) as error:
        xattn.load_head(folder, vit)
    assert str(error.value) == (
        f"head: head was trained with {WORDS}, but the backbone has its own; load the backbone with "
        f"--mechanism gna:kernel=2 --layers 0"
    )
    with pytest.raises(ValueError, match="head was trained with .*kernel=2.*has gna:kernel=3 in"):
        xattn.load_head(folder, converted(vit, "gna", "0", {"kernel": 3}))
    with pytest.raises(
        ValueError, match="the model itself, but the backbone has gna.*leave out --mech"
    ):
        xattn.load_head(plain, other)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"layers": "0"', '"layers": "x"')
    )
    with pytest.raises(ValueError, match="head: the config of head is damaged"):
        xattn.load_head(folder, vit)


def test_heads_of_a_trained_conversion_ask_for_its_folder(vit, tmp_path):
    made = Conversion("agent", (0,), {"agents": 4, "window": [4, 4]})
    start = converted(vit, *made)
    state = {
        name: value + 1
        for name, value in start.model.state_dict().items()
        if ".attn.mechanism." in name
    }
    trained = with_trained_weights(vit, made, state)
    save_conversion(tmp_path / "conversion", vit, made, state, {})
    folder = xattn.save_head(xattn.create_head("ttame", trained), tmp_path / "head")
    record = json.loads((folder / "config.json").read_text())["backbone"]
    written = json.loads((tmp_path / "conversion" / "config.json").read_text())
    assert record["conversion_sha256"] == written["sha256"]
    assert trained.with_taps("block").conversion_record() == trained.conversion_record()
    assert copy.deepcopy(trained).conversion_record() == trained.conversion_record()
    ask = r"--mechanism FOLDER \(what xattn distill wrote\)$"
    with pytest.raises(ValueError, match=f"the backbone has its own; load the backbone with {ask}"):
        xattn.load_head(folder, vit)
    with pytest.raises(ValueError, match=f"load the backbone it was trained on, with {ask}"):
        xattn.load_head(folder, start)
    xattn.load_head(folder, xattn.load_conversion(tmp_path / "conversion", vit))
    xattn.save_head(xattn.create_head("ttame", start), folder)
    with pytest.raises(ValueError, match="trained on, with --mechanism agent:.* --layers 0$"):
        xattn.load_head(folder, trained)


def test_caches_and_runs_of_another_conversion_are_refused(vit, photos, tmp_path):
    other = converted(vit, *TINY)
    xattn.cache_features(vit, photos, tmp_path / "features", progress=False)
    with pytest.raises(ValueError) as error:
        xattn.cache_features(other, photos, tmp_path / "features", progress=False)
    assert other.fingerprint in str(error.value)
    head, config = (
        xattn.create_head("ttame", other),
        xattn.TrainConfig("small", epochs=1, workers=0),
    )
    with pytest.raises(ValueError, match="head: it was made for weights"):
        xattn.fit(head, vit, photos, config)
    xattn.fit(head, other, photos, config, output=tmp_path / "run", progress=False)
    plain = xattn.create_head("ttame", vit)
    with pytest.raises(ValueError, match="resume: .*other settings"):
        xattn.fit(plain, vit, photos, config, output=tmp_path / "run", resume=True)


def test_a_probe_belongs_to_its_conversion(vit):
    other = converted(vit, *TINY)
    head = xattn.create_head("gap", other, classes=3)
    both = probed(other, head)
    assert both.conversion == other.conversion and WORDS in both.name
    assert both.with_preprocessing(both.preprocessing).fingerprint == both.fingerprint
    with pytest.raises(ValueError, match="load a matching pair"):
        probed(vit, head)
    with pytest.raises(ValueError, match="convert the backbone, then"):
        converted(both, "softmax")


def test_maps_say_which_attention_made_them(vit, photos, tmp_path):
    other = converted(vit, *TINY)
    xattn.explain(photos, other, explainer="rollout", output=tmp_path / "pack")
    pack = Pack(tmp_path / "pack")
    network = pack.provenance(pack.entries.index[0])["protocol"]["backbone"]
    assert network["conversion"] == other.conversion_record()["conversion"]
    assert network["sha256"] == other.fingerprint and network["name"] == other.name


# ---------------------------------------------------------------- commands


@pytest.fixture
def network(tmp_path):
    """Options of a ViT with weights in a file."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=64)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    weights = str(tmp_path / "vit.pth")
    return ["-b", "test_vit", "--weights", weights, "--input-size", "64", "--device", "cpu"]


GNA = ["--mechanism", "gna:kernel=2", "--layers", "0-3"]


def test_every_job_runs_on_a_converted_backbone(network, photos, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    data = [str(photos)]
    train = ["train", *network, *data, "--recipe", "small", "--epochs", "1", "--workers", "0"]
    assert main([*train, *GNA, "--output", str(tmp_path / "run")]) == 0
    head = str(tmp_path / "run" / "head")
    record = json.loads((tmp_path / "run" / "run.json").read_text())["head"]["backbone"]
    assert record["conversion"][0]["layers"] == "0-3"
    assert main(["explain", str(photos), *network, *GNA, "--heads", head, *out]) == 0
    capsys.readouterr()
    again = [*out, "--overwrite"]
    assert main(["explain", str(photos), *network, "--heads", head, *again]) == 2
    assert "--mechanism gna:kernel=2 --layers 0-3" in capsys.readouterr().err
    assert main([*train, "--output", str(tmp_path / "run"), "--resume"]) == 2
    evaluate = ["evaluate", str(photos), *network, *GNA, "--heads", head, "--levels", "0.5"]
    assert main([*evaluate, "--explainers", "rollout", "--no-sanity", *out]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "gna:kernel=2 in layers 0-3" in results["backbone"]["name"]
    compare = ["compare", *network, *GNA, *data, "--heads", head, "--explainers", "rollout"]
    compare += ["--metrics", "masking", "--output", str(tmp_path / "comparison")]
    assert main(compare) == 0
    probe = ["probe", *network, *GNA, *data, "--recipe", "small", "--epochs", "1", "--heads", "gap"]
    assert main([*probe, "--output", str(tmp_path / "probe")]) == 0
    trained = ["--probe", str(tmp_path / "probe" / "gap" / "head"), "--explainers", "rollout"]
    assert main(["explain", str(photos), *network, *GNA, *trained, *again]) == 0
    assert main(["explain", str(photos), *network, *trained, *again]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layers", "1"], "layers: got 1 without --mechanism"),
        (["--mechanism", "gnaa"], "unknown attention 'gnaa'"),
        (["--mechanism", "gna:kernel"], "mechanism: got 'kernel'"),
        (["--mechanism", "gna:width=3"], "gna does not take that option"),
        (
            ["--mechanism", "gna:kernel=2", "--layers", "0-99"],
            "layers: got 6, but VisionTransformer",
        ),
    ],
)
def test_mechanisms_that_cannot_be_are_refused_in_one_line(
    network, photos, options, message, capsys
):
    assert main(["explain", str(photos), *network, *options, "--explainers", "rollout"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
