"""Models of the viewer: by name, loaded once, and the very one that a pack was made with."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("streamlit")

from synthetic_packs import picture
from viewer_pages import only

from xattn.app import models, state
from xattn.app.library import Library
from xattn.app.models import ModelError
from xattn.attention import Conversion
from xattn.backbone import converted
from xattn.backbone.conversion import save_conversion
from xattn.cli.model import BackboneArgs
from xattn.explaining.photos import explain
from xattn.heads import create_head, save_head
from xattn.packs.writer import save_pack

CNN, VIT = "test_efficientnet", "test_vit"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Settings of a viewer on ``tmp_path`` that was started with a small network of random weights."""

    def start(**options) -> Path:
        chosen = {"backbone": CNN, "weights": "random", **options}
        own = BackboneArgs(**chosen, device="cpu")
        monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path, model=own))
        monkeypatch.setattr(state, "library", lambda: Library(tmp_path))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models._loaded.clear()
    yield start
    models._loaded.clear()


def start_with_a_file(start) -> Path:
    """A viewer whose network has the same weights each time that it is loaded."""
    from safetensors.torch import save_file

    root = start()
    save_file(models.backbone(CNN).model.state_dict(), root / "net.safetensors")
    return start(weights=str(root / "net.safetensors"))


def test_the_viewers_own_model_comes_first_and_is_loaded_once(start):
    start()
    assert models.backbones()[0] == CNN
    assert models.backbone(CNN) is models.backbone(CNN)


def test_other_taps_share_the_weights(start):
    start()
    one, two = models.backbone(CNN), models.backbone(CNN, taps=["stage.2", "head"])
    assert two.taps == ("stage.2", "head") and two.model is one.model
    assert two.fingerprint == one.fingerprint


def test_the_model_not_used_for_longest_goes(start, monkeypatch):
    start()
    first = models.backbone(CNN)
    for size in range(96, 96 + 32 * models.KEPT, 32):
        models.backbone(CNN, input_size=size)
    assert models.backbone(CNN) is not first


@pytest.mark.parametrize(
    "name", ["no_such_model", "../../etc/passwd", "hf-hub:owner/name", "local-dir:/tmp", ""]
)
def test_what_is_no_timm_model_is_refused(start, name):
    start()
    with pytest.raises(ModelError):
        models.backbone(name)


@pytest.mark.parametrize("weights", ["/etc/passwd", "weights.pth", "random", "abc"])
def test_weights_are_never_a_path(start, weights):
    start()
    with pytest.raises(ModelError, match="in the root"):
        models.backbone(CNN, weights)


def test_a_safetensors_file_below_the_root_is_loaded_by_its_id(start):
    from safetensors.torch import save_file

    root = start()
    own = models.backbone(CNN)
    (root / "mine").mkdir()
    save_file(own.model.state_dict(), root / "mine" / "net.safetensors")
    torch.save(own.model.state_dict(), root / "mine" / "net.pth")
    (root / "out.safetensors").symlink_to("/etc/hostname")
    for part in ("rows-0-64.safetensors", "maps-00000.safetensors"):  # of a cache, of a pack
        (root / "mine" / part).write_bytes(b"")
    files = models.weight_files()
    assert [path.name for path in files.values()] == ["net.safetensors"]
    loaded = models.backbone(CNN, next(iter(files)))
    assert loaded is not own and loaded.fingerprint == own.fingerprint


def test_a_replaced_weight_file_is_read_again(start):
    from safetensors.torch import save_file

    root = start()
    weights = dict(models.backbone(CNN).model.state_dict())
    save_file(weights, root / "net.safetensors")
    (key,) = models.weight_files()
    before = models.backbone(CNN, key).fingerprint
    save_file({k: v * 2 for k, v in weights.items()}, root / "net.safetensors")
    assert models.backbone(CNN, key).fingerprint != before


def test_a_pruned_network_is_chosen_by_its_folder(start):
    from xattn.eval.pruned_networks import write
    from xattn.training.pruning_run import PruneConfig, prune

    root = _write_vit_file(start)
    whole = models.backbone(VIT)
    config = PruneConfig(epochs=0, scored=1)
    photos = [root / f"{i}.png" for i in range(2)]
    for i, photo in enumerate(photos):
        picture(i).save(photo)
    result = prune(whole, data=photos, config=config, progress=False)
    write(root / "cut" / "network", whole, result, {}, config)
    files = {path.name: key for key, path in models.weight_files().items()}
    assert set(files) == {"net.safetensors", "network"}
    found = models.backbone(VIT, files["network"])
    assert found.fingerprint == result.backbone.fingerprint != whole.fingerprint
    explain(picture(0), found, explainer="rollout", output=root / "pack")
    start(backbone=VIT, weights=str(root / "cut" / "network"))
    assert models.backbone_of(only(root)).fingerprint == found.fingerprint


def _pack(root: Path, **options) -> object:
    loaded = models.backbone(CNN, **options)
    explain(picture(0), loaded, explainer="gradcam", output=root / "pack")
    return only(root)


def test_a_pack_finds_the_network_that_made_it(start):
    root = start()
    assert models.backbone_of(_pack(root)) is models.backbone(CNN)


def test_a_pack_of_another_input_size_and_taps_finds_them(start):
    root = start_with_a_file(start)
    pack = _pack(root, taps=["stage.2", "head"], input_size=96)
    found = models.backbone_of(pack)
    assert found.preprocessing.input_size == (96, 96) and found.taps == ("stage.2", "head")


def test_a_pack_of_another_preprocessing_finds_it_whatever_the_viewer_was_started_with(start):
    weights = str(start_with_a_file(start) / "net.safetensors")
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4,), "crop_pct": 0.9, "interpolation": "lanczos"}
    root = start(weights=weights, **given)
    pack, used = _pack(root), models.backbone(CNN)
    start(weights=weights)
    found = models.backbone_of(pack)
    assert found.preprocessing == used.preprocessing and found.fingerprint == used.fingerprint
    start()
    with pytest.raises(
        ModelError, match=r"FILE --mean 0.1 0.2 0.3 --std 0.4 0.4 0.4 --crop-pct 0.9"
    ):
        models.backbone_of(pack)


def test_other_weights_are_named(start):
    root = start()
    pack = _pack(root)
    models._loaded.clear()
    with pytest.raises(ModelError, match="weights sha256"):
        models.backbone_of(pack)


def test_a_pack_without_a_model_says_so(start):
    from synthetic_packs import explanation

    root = start()
    save_pack(root / "pack", [explanation(0, protocol={"classes": "top"})], overlays=False)
    pack = only(root)
    with pytest.raises(ModelError, match="does not record which model"):
        models.backbone_of(pack)


def test_heads_below_the_root_are_offered_and_loaded(start):
    root = start()
    loaded = models.backbone(CNN)
    save_head(create_head("ttame", loaded), root / "mine" / "head")
    ((key, title),) = models.heads(CNN).items()
    assert "mine" in title and "ttame" in title and "/" not in key
    found, head = models.with_head(CNN, key)
    assert found is loaded and head.name == "ttame"
    assert not models.heads(VIT)


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        '{"format": 1, "head": [], "options": {}, "backbone": {"sha256": ""}}',
        '{"format": 1, "head": "ttame", "options": 3, "backbone": {"sha256": ""}}',
        '{"format": 1, "head": "ttame", "options": {}, "backbone": {"sha256": "", "taps": 5}}',
    ],
)
def test_a_damaged_head_hides_no_other(start, config):
    root = start()
    save_head(create_head("ttame", models.backbone(CNN)), root / "mine" / "head")
    (root / "bad").mkdir()
    (root / "bad" / "config.json").write_text(config)
    (root / "bad" / "model.safetensors").write_bytes(b"")
    assert len(models.heads(CNN)) == 1 and len(Library(root).heads()) == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_head_whose_files_lie_elsewhere_is_not_offered(start, name, tmp_path_factory):
    root = start()
    folder = save_head(create_head("ttame", models.backbone(CNN)), root / "mine" / "head")
    outside = tmp_path_factory.mktemp("outside") / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert not models.heads(CNN)


def test_a_head_of_other_weights_is_refused_and_an_unknown_one_too(start):
    root = start()
    save_head(create_head("ttame", models.backbone(CNN)), root / "mine" / "head")
    (key,) = models.heads(CNN)
    models._loaded.clear()
    with pytest.raises(ModelError, match="trained on"):
        models.with_head(CNN, key)
    with pytest.raises(ModelError, match="choose another"):
        models.with_head(CNN, "../mine")


def test_a_probe_head_becomes_the_classifier_and_its_packs_find_it(start):
    root = start_with_a_file(start)
    (weights,) = models.weight_files()
    loaded = models.backbone(CNN)
    head = create_head("gap", loaded, class_names=["cat", "dog"])
    save_head(head, root / "probe" / "head")
    (key,) = models.heads(CNN)
    found, own = models.with_head(CNN, key)
    assert list(found.class_names) == ["cat", "dog"] and own is found.probe
    again, _ = models.with_head(CNN, key, weights)
    assert again.fingerprint == found.fingerprint
    explain(picture(0), found, explainer="gradcam", output=root / "pack")
    pack = only(root)
    assert models.backbone_of(pack).fingerprint == found.fingerprint


def test_the_packs_of_a_converted_network_find_it_whatever_the_viewer_was_started_with(start):
    root = _write_vit_file(start)
    options = {"backbone": VIT, "weights": str(root / "net.safetensors")}
    start(**options)
    plain = models.backbone(VIT)
    explain(picture(0), plain, explainer="rollout", output=root / "pack")
    start(**options, mechanism="gna:kernel=3", layers="0-3")
    converted = models.backbone(VIT)
    assert converted.fingerprint != plain.fingerprint
    assert models.backbone_of(only(root)).fingerprint == plain.fingerprint
    explain(picture(0), converted, explainer="rollout", output=root / "pack")
    start(**options)
    assert models.backbone_of(only(root)).fingerprint == converted.fingerprint


def test_a_conversion_that_was_trained_again_is_read_again(start):
    root = _write_vit_file(start)
    options = {"backbone": VIT, "weights": str(root / "net.safetensors")}
    _train_conversion(models.backbone(VIT), root / "conversion", 1.0)
    start(**options, mechanism=str(root / "conversion"))
    before = models.backbone(VIT)
    assert models.backbone(VIT) is before
    start(**options)
    _train_conversion(models.backbone(VIT), root / "conversion", 2.0)
    start(**options, mechanism=str(root / "conversion"))
    assert models.backbone(VIT).fingerprint != before.fingerprint


def test_a_pack_of_a_converted_network_names_options_that_can_be_given(start):
    root = _write_vit_file(start)
    options = {"backbone": VIT, "weights": str(root / "net.safetensors")}
    _train_conversion(models.backbone(VIT), root / "conversion", 1.0)
    start(**options, mechanism=str(root / "conversion"))
    explain(picture(0), models.backbone(VIT), explainer="rollout", output=root / "pack")
    start(**options)
    command = f"xattn app --backbone {VIT} --weights FILE --mechanism "
    with pytest.raises(ModelError) as error:
        models.backbone_of(only(root))
    assert str(error.value).endswith(f"{command}FOLDER (the folder that xattn distill wrote)")
    start(**options, mechanism="gna:kernel=3", layers="0-2")
    explain(picture(0), models.backbone(VIT), explainer="rollout", output=root / "pack")
    start(backbone=VIT)  # with other weights
    with pytest.raises(ModelError) as error:
        models.backbone_of(only(root))
    assert str(error.value).endswith(f"{command}gna:kernel=3 --layers 0-2")


def _write_vit_file(start) -> Path:
    from safetensors.torch import save_file

    root = start(backbone=VIT)
    save_file(models.backbone(VIT).model.state_dict(), root / "net.safetensors")
    return start(backbone=VIT, weights=str(root / "net.safetensors"))


def _train_conversion(plain, folder: Path, value: float) -> None:
    """A folder as ``xattn distill`` writes it, whose mechanism holds ``value`` everywhere."""
    made = Conversion("hedgehog", (0,), {})
    model = converted(plain, *made).model
    state = {
        name: torch.full_like(tensor, value)
        for name, tensor in model.state_dict().items()
        if ".attn.mechanism." in name
    }
    save_conversion(folder, plain, made, state, {})


def test_explainers_that_fit_are_told_from_those_that_do_not(start):
    start()
    loaded = models.backbone(CNN)
    allowed, refused = models.explainers(loaded)
    assert allowed["gradcam"] == 1 and allowed["rise"] > 100
    assert {"head", "rollout"} <= set(refused) and not set(allowed) & set(refused)
    with_head, _ = models.explainers(loaded, create_head("ttame", loaded))
    assert "head" in with_head


def test_two_threads_use_a_model_in_turn():
    inside, most = [], []

    def use() -> None:
        with models.model_lock():
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
