"""Heads: the limit cases of T-TAME and L-CAM, the two fusions, and artefacts on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import xattn
from xattn.backbone import Taps
from xattn.heads import create_head, load_head, parse_options, read_config, save_head
from xattn.heads.maps.ttame import Branch


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", weights=None, num_classes=7)


def taps_of(backbone, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return backbone(
            torch.rand(batch, 3, *backbone.preprocessing.input_size, generator=generator)
        )


def randomized(head, seed=0):
    """Random weights everywhere, so that no zero initialisation hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return head.eval()


def published(head, taps):
    """T-TAME's equations written down literally, for a head with fusion='per_class'."""
    size = taps.maps[0].shape[2:]
    maps = []
    for branch, f in zip(head.branches, taps.maps, strict=True):
        u = F.relu(branch.norm(branch.conv(f)) + f)
        maps.append(F.interpolate(u, size, mode="bilinear", align_corners=False))
    return head.fusion.conv(torch.cat(maps, 1))


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_per_class_equals_the_published_equations(name, training, request):
    backbone = request.getfixturevalue(name)
    head = randomized(create_head("ttame", backbone, fusion="per_class"))
    taps = taps_of(backbone)
    head.train(training)
    with torch.no_grad():
        torch.testing.assert_close(head(taps), published(head, taps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["per_class", "classifier"])
@pytest.mark.parametrize("kind", ["ttame", "lcam"])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_class_slice_equals_the_full_channel(name, kind, fusion, request):
    backbone = request.getfixturevalue(name)
    head = randomized(create_head(kind, backbone, fusion=fusion))
    taps = taps_of(backbone)
    with torch.no_grad():
        full = head(taps)
        assert full.shape[:2] == (3, 7)
        torch.testing.assert_close(head(taps, 4), full[:, 4:5])
        one = torch.tensor([2, 0, 6])
        torch.testing.assert_close(head(taps, one), full[torch.arange(3), one][:, None])
        many = torch.tensor([[2, 0], [1, 1], [6, 3]])
        expected = full.gather(1, many[..., None, None].expand(-1, -1, *full.shape[2:]))
        torch.testing.assert_close(head(taps, many), expected)
        torch.testing.assert_close(head(taps, many[:1]), full[:, [2, 0]])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (7, "out of range"),
        (-1, "out of range"),
        (torch.tensor([0, 1]), "2 targets for a batch of 3"),
        (torch.tensor([0.5, 1.0, 2.0]), "integers"),
        (torch.tensor([0, 1, 99]), "99 is out of range"),
        ("cat", "give an int"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "integers of shape"),
    ],
)
def test_bad_class_index_is_refused(cnn, index, message):
    with pytest.raises(ValueError, match=message):
        create_head("ttame", cnn)(taps_of(cnn), index)


def test_zero_weights_leave_the_rectified_tap():
    branch = Branch(4, rank=None, skip=True, norm=True, activation="relu", identity=False).eval()
    torch.nn.init.zeros_(branch.conv.weight)
    torch.nn.init.zeros_(branch.conv.bias)
    f = torch.randn(2, 4, 5, 3)
    assert torch.allclose(branch(f), f.relu(), atol=1e-6)


def test_zero_fusion_gives_its_bias_everywhere_and_no_nan(cnn):
    head = create_head("ttame", cnn, fusion="per_class").eval()
    torch.nn.init.zeros_(head.fusion.conv.weight)
    scores = head(taps_of(cnn))
    expected = head.fusion.conv.bias[None, :, None, None].expand_as(scores)
    assert torch.equal(scores, expected)
    assert torch.equal(head.mask(scores), expected.sigmoid())
    from xattn.eval import saliency

    maps, valid = saliency(scores[:, :1].detach(), (64, 64))
    assert not valid.any() and maps.isfinite().all()


def test_one_tap_with_a_zero_branch_is_lcam(cnn):
    ttame = create_head("ttame", cnn, fusion="per_class", num_taps=1, branch_rank=None).eval()
    lcam = create_head("lcam", cnn, fusion="per_class").eval()
    torch.nn.init.zeros_(ttame.branches[0].conv.weight)
    torch.nn.init.zeros_(ttame.branches[0].conv.bias)
    lcam.fusion.load_state_dict(ttame.fusion.state_dict())
    taps = taps_of(cnn)
    taps = Taps(taps.logits, tuple(m.relu() for m in taps.maps))
    torch.testing.assert_close(ttame(taps), lcam(taps), atol=1e-6, rtol=1e-5)


def test_maps_are_capped_at_56(cnn):
    maps = tuple(torch.randn(1, c, s, s) for c, s in zip(cnn.channels, (80, 20, 7), strict=True))
    head = create_head("ttame", cnn)
    assert head(Taps(torch.zeros(1, 7), maps), 0).shape == (1, 1, 56, 56)


@pytest.mark.parametrize("kind", ["ttame", "lcam"])
def test_untrained_classifier_fusion_ranks_pixels_as_cam(cnn, kind):
    assert cnn.pools_linearly
    head = create_head(kind, cnn, fusion="classifier").eval()
    taps = taps_of(cnn)
    scores = head(taps)
    cam = torch.einsum("kc,bchw->bkhw", cnn.classifier_weight, taps.maps[-1])
    cam = F.interpolate(cam, scores.shape[2:], mode="bilinear", align_corners=False)
    scale = 1 / cnn.classifier_weight.norm(dim=1).mean()
    assert scale > 0
    torch.testing.assert_close(scores, cam * scale, atol=1e-5, rtol=1e-4)


def test_classifier_fusion_has_no_parameter_of_a_class(cnn):
    wide = xattn.load_backbone("test_efficientnet", None, input_size=64, num_classes=100)
    count = [
        sum(p.numel() for p in create_head("ttame", b, fusion="classifier").parameters())
        for b in (cnn, wide)
    ]
    assert count[0] == count[1]


def test_classifier_fusion_elsewhere_uses_a_projection(vit):
    assert not vit.pools_linearly
    maps = create_head("ttame", vit, fusion="classifier").eval()(taps_of(vit))
    assert maps.std(dim=(2, 3)).min() > 0
    assert not torch.allclose(maps[:, 0], maps[:, 1])


def test_parameter_counts_of_the_published_heads():
    resnet = xattn.load_backbone("resnet50", weights=None, input_size=64)
    head = create_head("ttame", resnet, fusion="per_class", branch_rank=None)
    assert sum(p.numel() for p in head.parameters()) == 9_100_776
    vit = xattn.load_backbone("vit_base_patch16_224", weights=None)
    head = create_head("ttame", vit, fusion="per_class", branch_rank=None)
    assert sum(p.numel() for p in head.parameters()) == 4_081_384


def test_wide_taps_are_low_rank_by_default():
    lite = xattn.load_backbone("tf_efficientnet_lite0", weights=None, input_size=64)
    head = create_head("ttame", lite)
    kinds = [isinstance(b.conv, torch.nn.Sequential) for b in head.branches]
    assert kinds == [False, False, True]
    exact = create_head("ttame", lite, branch_rank=None)
    assert not any(isinstance(b.conv, torch.nn.Sequential) for b in exact.branches)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ttame", {"num_taps": 9}, "num_taps"),
        ("ttame", {"wings": 2}, "does not take"),
        (
            "gap",
            {"reads_prefix": True},
            "gap does not take that option .reads_prefix.; its options",
        ),
        ("gap", {"pooled": 4}, "gap does not take that option .pooled.; its options"),
        ("tame", {}, "ttame"),
    ],
)
def test_bad_options_are_refused(cnn, kind, options, message):
    with pytest.raises(ValueError, match=message):
        create_head(kind, cnn, **options)


def test_feature_masking_needs_the_pooled_tap(vit, cnn):
    create_head("lcam", cnn, mask_policy="feature")
    for kind in ("lcam", "ttame"):
        with pytest.raises(ValueError, match="feature"):
            create_head(kind, vit, mask_policy="feature")


@pytest.mark.parametrize("fusion", ["per_class", "classifier"])
def test_saved_heads_load_bit_identical(cnn, tmp_path, fusion):
    head = randomized(create_head("ttame", cnn, fusion=fusion))
    save_head(head, tmp_path / "h", summary={"epochs": 3})
    loaded = load_head(tmp_path / "h", cnn)
    taps = taps_of(cnn)
    assert torch.equal(head(taps), loaded(taps))
    assert loaded.summary == {"epochs": 3} and not loaded.training
    config = json.loads((tmp_path / "h/config.json").read_text())
    assert config["backbone"]["sha256"] == cnn.fingerprint
    save_head(head, tmp_path / "h", dtype="float16")  # replaces, and halves
    half = load_head(tmp_path / "h", cnn)
    torch.testing.assert_close(half(taps), head(taps), atol=0.05, rtol=0.05)
    assert not any(
        "weight" == name.split(".")[-1] and "fusion.weight" in name for name in head.state_dict()
    )


def test_hub_mixin_round_trip_on_local_files(cnn, tmp_path):
    head = randomized(create_head("ttame", cnn))
    head.save_pretrained(tmp_path / "hub")
    loaded = xattn.Head.from_pretrained(str(tmp_path / "hub"), backbone=cnn)
    taps = taps_of(cnn)
    assert torch.equal(head(taps), loaded(taps))


def test_hub_download_and_push_use_huggingface_hub(cnn, tmp_path, monkeypatch):
    import huggingface_hub

    head = randomized(create_head("ttame", cnn))
    save_head(head, tmp_path / "repo")
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename))
        return str(tmp_path / "repo" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = load_head("someone/some-head", cnn)
    assert torch.equal(head(taps_of(cnn)), loaded(taps_of(cnn)))
    assert asked == [
        ("someone/some-head", "config.json"),
        ("someone/some-head", "model.safetensors"),
    ]

    class Hub:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **options):
            pushed[repo_id] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}

    pushed = {}
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    head.push_to_hub("someone/pushed")
    for name in ("config.json", "model.safetensors"):
        assert pushed["someone/pushed"][name] == (tmp_path / "repo" / name).read_bytes()


def test_a_head_for_another_backbone_is_refused_with_both_hashes(cnn, tmp_path):
    save_head(create_head("ttame", cnn), tmp_path / "h")
    torch.manual_seed(5)
    other = xattn.load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)
    with pytest.raises(ValueError) as error:
        load_head(tmp_path / "h", other)
    assert cnn.fingerprint in str(error.value) and other.fingerprint in str(error.value)


@pytest.mark.parametrize("name", ["self", "name", "backbone", "seed"])
def test_an_option_that_is_an_argument_of_its_own_is_refused(cnn, name):
    with pytest.raises(ValueError, match=f"options: got '{name}=1'; {name} is not an option"):
        parse_options([f"{name}=1"])
    with pytest.raises(ValueError, match="head: ttame"):
        create_head("ttame", cnn, **{name: 1})


def test_options_nested_too_deep_are_text():
    assert parse_options(["a=" + "[" * 50_000]) == {"a": "[" * 50_000}


def test_damaged_artefacts_are_refused(cnn, tmp_path):
    import pickle

    head = create_head("ttame", cnn)
    for name in ("truncated", "pickle", "config", "missing"):
        save_head(head, tmp_path / name)
    weights = tmp_path / "truncated/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "pickle/model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "config/config.json").write_text("{")
    (tmp_path / "missing/model.safetensors").unlink()
    for name in ("truncated", "pickle", "config"):
        with pytest.raises(ValueError, match="head"):
            load_head(tmp_path / name, cnn)
    with pytest.raises(FileNotFoundError, match="head"):
        load_head(tmp_path / "missing", cnn)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_head(tmp_path / "nowhere", cnn)


@pytest.mark.parametrize("taps", [None, 5, "norm1", [5]])
def test_read_config_refuses_taps_that_are_not_a_list_of_names(cnn, tmp_path, taps):
    path = save_head(create_head("gap", cnn), tmp_path / "head") / "config.json"
    config = json.loads(path.read_text())
    config["backbone"]["taps"] = taps
    path.write_text(json.dumps(config))
    for read in (read_config, lambda folder: load_head(folder, cnn)):
        with pytest.raises(ValueError, match="its taps are not a list of str"):
            read(path.parent)


def test_saving_keeps_what_is_not_ours_and_survives_a_full_disk(cnn, tmp_path, monkeypatch):
    head = create_head("ttame", cnn)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    for content in (None, "{}", '{"head": "of state", "options": 1, "backbone": {"sha256": 0}}'):
        if content is not None:
            (tmp_path / "mine/config.json").write_text(content)
        with pytest.raises(ValueError, match="not empty"):
            save_head(head, tmp_path / "mine")
        assert (tmp_path / "mine/thesis.txt").read_text() == "precious"

    save_head(head, tmp_path / "h")
    before = (tmp_path / "h/model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    (tmp_path / "h/README.md").write_text("card")
    save_head(head, tmp_path / "h")
    assert (tmp_path / "h/README.md").read_text() == "card"
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left.*untouched"):
        save_head(randomized(head), tmp_path / "h")
    assert (tmp_path / "h/model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("fusion", ["per_class", "classifier"])
def test_compiles_and_runs_in_bf16(cnn, fusion):
    head = randomized(create_head("ttame", cnn, fusion=fusion))
    taps = taps_of(cnn)
    target = torch.tensor([1, 2, 3])
    with torch.no_grad():
        expected = head(taps, target)
        compiled = torch.compile(head, backend="aot_eager")(taps, target)
        torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(taps, target)
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
