"""A probed backbone: the head's classes for every explainer, metric and command, both weights in its hash."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import xattn
from xattn.cli import main
from xattn.config import ProbeConfig
from xattn.eval import evaluate, sanity_rows
from xattn.eval.probing import ProbeJob, run_probes
from xattn.eval.sanity import cascade, randomized_backbone
from xattn.explainers import create_explainer
from xattn.heads import create_head, load_head
from xattn.heads.probed import probed
from xattn.packs.reader import load_pack

NAMES = ["red", "green", "blue"]


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(name="test_vit", taps=("head",), head="efficient_probe", **options):
    torch.manual_seed(0)
    backbone = xattn.load_backbone(name, None, taps, input_size=64)
    options = {"queries": 4, **options} if head == "efficient_probe" else options
    made = create_head(head, backbone, class_names=NAMES, **options).eval()
    torch.nn.init.normal_(made.classifier.weight, std=0.5)
    return backbone, made


PAIRS = [
    ("test_vit", ("head",), "efficient_probe"),
    ("test_vit", ("block.0", "block.1"), "memetector"),
    ("test_vit", ("head",), "cait"),
    ("test_vit", ("block.0",), "efficient_probe"),
    ("test_vit", ("norm1.1",), "abmilp"),
    ("test_efficientnet", ("stage.1", "stage.2"), "memetector"),
    ("test_efficientnet", ("head",), "gap"),
    ("test_efficientnet", ("stage.2", "head"), "memetector"),
    ("test_resnet", ("head",), "abmilp"),
]


@pytest.mark.parametrize(("name", "taps", "head"), PAIRS)
def test_logits_are_the_heads_and_maps_the_backbones(name, taps, head):
    backbone, made = make(name, taps, head)
    both = probed(backbone, made)
    x = rand(2, 3, 64, 64)
    with torch.no_grad():
        plain, taps_ = backbone(x), both(x)
        assert torch.equal(taps_.logits, made.logits(made.tokens(plain)))
        assert torch.equal(both.logits(x), taps_.logits)
        assert all(torch.equal(a, b) for a, b in zip(plain.maps, taps_.maps, strict=True))
    assert (plain.prefix is None) == (taps_.prefix is None)
    assert both.class_names == NAMES and both.num_classes == 3 and both.class_index("green") == 1
    assert both.classifier_weight is None and not any(p.requires_grad for p in both.parameters())
    with torch.no_grad():
        if both.has_pooled_tap and made.num_taps == 1:
            torch.testing.assert_close(both.head_logits(plain.maps[-1]), taps_.logits)


@pytest.mark.parametrize(("name", "taps", "head"), PAIRS)
@pytest.mark.parametrize("explainer", ["gradcam", "ablationcam", "rise"])
def test_explainers_explain_the_new_classes(name, taps, head, explainer):
    both = probed(*make(name, taps, head))
    options = {"masks": 6} if explainer == "rise" else {}
    method = create_explainer(explainer, both, **options)
    x = rand(2, 3, 64, 64)
    maps = method.attribute(x, torch.tensor([2, 1]))  # rectified maps of a class may be 0
    assert maps.isfinite().all() and (maps != 0).any()
    with pytest.raises(ValueError, match="class 3 is out of range"):
        method.attribute(x, 3)


def test_gradcam_of_a_mean_is_cam():
    backbone, made = make("test_efficientnet", ("head",), "gap", norm=False)
    both = probed(backbone, made)
    x = rand(2, 3, 64, 64)
    with torch.no_grad():
        final = backbone(x).maps[-1]
    expected = torch.einsum("c,bchw->bhw", made.classifier.weight[1], final).relu()
    maps = create_explainer("gradcam", both).attribute(x, 1)[:, 0]
    area = final.shape[2] * final.shape[3]
    torch.testing.assert_close(maps * area, expected, atol=1e-5, rtol=1e-4)


def test_the_head_explains_the_logits_completely():
    backbone, made = make()
    both = probed(backbone, made)
    x = rand(2, 3, 64, 64)
    maps = create_explainer("head", both, made).attribute(x, torch.tensor([2, 0]))
    with torch.no_grad():
        taps = both(x)
        rest = made.class_maps(made.tokens(taps)).rest.gather(1, torch.tensor([[2], [0]]))
        logits = taps.logits.gather(1, torch.tensor([[2], [0]]))
    torch.testing.assert_close(maps.sum((2, 3)) + rest, logits, atol=1e-5, rtol=1e-5)


def test_foreign_heads_are_refused():
    backbone, made = make()
    both = probed(backbone, made)
    torch.manual_seed(3)
    other = create_head("efficient_probe", backbone, queries=4, class_names=NAMES).eval()
    with pytest.raises(ValueError, match="head: trained on"):
        create_explainer("head", both, other)
    assert create_explainer("head", both, copy.deepcopy(made)).head is not made
    with pytest.raises(ValueError, match="taps"):
        probed(backbone.with_taps(["block.1", "head"]), made)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="matching pair"):
        probed(xattn.load_backbone("test_vit", None, ["head"], input_size=64), made)
    with pytest.raises(ValueError, match="not a classifier"):
        probed(backbone, create_head("ttame", backbone))


def test_the_fingerprint_tells_both_weights():
    backbone, made = make()
    first = probed(backbone, made).fingerprint
    assert first == probed(backbone, copy.deepcopy(made)).fingerprint != backbone.fingerprint
    changed = copy.deepcopy(made)
    with torch.no_grad():
        changed.classifier.bias.add_(1)
    assert probed(backbone, changed).fingerprint != first
    torch.manual_seed(0)
    trained_on_it = create_head("ttame", probed(backbone, made), fusion="per_class")
    create_explainer("head", probed(backbone, made), trained_on_it)
    with pytest.raises(ValueError, match="head: trained on"):
        create_explainer("head", probed(backbone, changed), trained_on_it)


def write_photos(folder, count=15):
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 90, (10, 14, 3), dtype=np.uint8)
        noise[..., i % 3] += 120
        path = folder / NAMES[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((70, 50)).save(path)
    return folder


def test_metrics_and_sanity_rows_score_the_new_classes(tmp_path):
    both = probed(*make("test_resnet", ("head",), "abmilp"))
    rows = sanity_rows(both, "head", head=both.probe)
    assert rows["randomized_head"].backbone is not both
    methods = {"head": create_explainer("head", both, both.probe), **rows}
    results = evaluate(both, methods, write_photos(tmp_path / "p", 4), progress=False)
    assert results.backbone["sha256"] == both.fingerprint
    assert {"head", "random", "ones", "randomized_head"} <= set(methods)


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One xattn probe of two heads, with weights that a file keeps."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("cli")
    write_photos(root / "photos")
    (root / "photos/red/bad.png").write_bytes(b"words")
    torch.manual_seed(0)
    model = xattn.load_backbone("test_vit", None, input_size=64).model
    save_file(model.state_dict(), str(root / "w.safetensors"))
    common = ["-b", "test_vit", "--weights", str(root / "w.safetensors"), "--input-size", "64"]
    common += ["--device", "cpu"]
    arguments = [
        "probe", str(root / "photos"), *common, "--recipe", "small", "--epochs", "6",
        "--warmup", "1", "--batch-size", "4", "--heads", "gap", "efficient_probe",
        "--options", "efficient_probe.queries=4", "--output", str(root / "out"), "--sample", "2",
    ]  # fmt: skip
    assert main(arguments) == 0
    return root, common, arguments


def test_probe_writes_a_table_results_and_heads(run, capsys):
    root, _, arguments = run
    results = json.loads((root / "out/results.json").read_text())
    assert results["classes"] == sorted(NAMES) and results["photos"] == 15
    assert [h["head"] for h in results["heads"]] == ["gap", "efficient_probe"]
    gap, ep = results["heads"]
    assert gap["parameters"] == 3 * 64 + 3 and ep["parameters"] == 4 * 64 + 64 * 64 + 3 * 64 + 3
    assert gap["macs"] == 16 * 64 + 3 * 64 and gap["photos"] == 3
    assert 0 <= gap["accuracy_lo"] <= gap["accuracy"] <= gap["accuracy_hi"] <= 1
    lines = (root / "out/results.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("head,accuracy")
    backbone = xattn.load_backbone("test_vit", root / "w.safetensors", ["head"], input_size=64)
    head = load_head(root / "out/efficient_probe/head", backbone)
    assert head.class_names == sorted(NAMES)
    shown = load_pack(root / "out/efficient_probe/sample")
    assert len(shown) == 4 and {e.target_name for e in shown} <= set(NAMES)
    assert main(arguments) == 2
    assert "already contains results of gap, efficient_probe" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    said = capsys.readouterr()
    assert "| efficient_probe |" in said.out and "bad.png: image: " in said.err
    assert (
        json.loads((root / "out/results.json").read_text())["heads"][1]["accuracy"]
        == ep["accuracy"]
    )


@pytest.mark.parametrize(("command", "taps"), [("evaluate", ()), ("compare", ("--taps", "head"))])
def test_a_probing_head_among_the_heads_is_sent_to_probe(run, tmp_path, capsys, command, taps):
    root, common, _ = run
    folder = str(root / "out/efficient_probe/head")
    chosen = ["--heads", folder, "--output", str(tmp_path / "o")]
    assert main([command, str(root / "photos/blue"), *common, *taps, *chosen]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"heads: {folder} has its own classes; give --probe {folder} instead" in said


def test_the_explainer_head_is_sent_to_heads(run, tmp_path, capsys):
    root, common, _ = run
    photos, output = str(root / "photos/blue"), ["--output", str(tmp_path / "o")]
    chosen = ["--probe", str(root / "out/gap/head"), "--explainers", "head"]
    assert main(["compare", photos, *common, *chosen, *output]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "explainers: 'head' needs a head; name heads with --heads (the head of --probe is" in said
    )
    assert main(["evaluate", photos, *common, "--explainers", "head", *output]) == 2
    assert "a folder with --heads or --probe" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("source", "how"), [("shipped", "--probe"), ("hub", "--heads")])
def test_a_probing_head_is_the_same_from_a_folder_the_package_or_the_hub(
    run, tmp_path, monkeypatch, source, how
):
    import huggingface_hub

    root, common, _ = run
    folder, asked = root / "out/efficient_probe/head", []

    def download(repo_id, filename, **options):
        asked.append(repo_id)
        return str(folder / filename)

    name = {"shipped": "my-probe", "hub": "someone/my-probe"}[source]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("xattn.runtime.head_files.shipped_heads", lambda: {"my-probe": folder})
    packs = []
    for given, output in ((str(folder), "a"), (name, "b")):
        output = ["--output", str(tmp_path / output)]
        photo = str(root / "photos/green/001.png")
        assert main(["explain", photo, *common, how, given, *output]) == 0
        packs.append(xattn.load_pack(output[1])[0])
    a, b = packs
    assert a.target_name == b.target_name and a.target_name in NAMES
    assert a.protocol["backbone"] == b.protocol["backbone"]
    np.testing.assert_array_equal(np.asarray(a.map), np.asarray(b.map))
    assert bool(asked) == (source == "hub") and set(asked) <= {"someone/my-probe"}


@pytest.mark.parametrize("how", ["--heads", "--probe"])
def test_explain_takes_a_probing_head(run, tmp_path, how):
    root, common, _ = run
    photo = str(root / "photos/green/001.png")
    chosen = [how, str(root / "out/efficient_probe/head")]
    assert main(["explain", photo, *common, *chosen, "--output", str(tmp_path / "a")]) == 0
    (found,) = xattn.load_pack(tmp_path / "a")
    assert found.target_name in NAMES and found.method == "head"
    more = ["--explainers", "gradcam", "--classes", "blue", "--output", str(tmp_path / "b")]
    assert main(["explain", photo, *common, *chosen, *more]) == 0
    (found,) = xattn.load_pack(tmp_path / "b")
    assert found.target_name == "blue" and found.method == "gradcam"
    assert found.protocol["backbone"]["name"] == "test_vit + efficient_probe"


def test_evaluate_takes_a_probe_with_its_own_head(run, tmp_path, capsys):
    root, common, _ = run
    chosen = ["--probe", str(root / "out/efficient_probe/head"), "--output", str(tmp_path / "e")]
    assert main(["evaluate", str(root / "photos/blue"), *common, *chosen]) == 0
    out = capsys.readouterr().out
    assert "efficient_probe" in out and "gradcam" in out and "randomized_head" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--heads", "ttame", "--options"], "heads: 'ttame' is not a classifier"),
        (["--heads", "efficient_prob", "--options"], "did you mean efficient_probe"),
        (["--heads", "gap", "gap"], "heads: gap, gap names a head twice"),
        (["--heads", "gap", "--options", "queries=4"], "options: got 'queries=4'"),
        (["--heads", "gap", "--attention", "at", "--options"], "attention: the scores of gap"),
        (["--labels", "{root}/none.json", "--options"], "labels: no file"),
        (["--folds", "7"], "fold: got 7 of 5"),
        (["--attention", "at", "--epsilon", "0"], "epsilon"),
        (["--taps", "block.9"], "taps: got 'block.9'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_bad_input_is_one_line(run, tmp_path, capsys, more, message):
    root, _, arguments = run
    arguments = [*arguments, *[m.format(root=root) for m in more], "--output", str(tmp_path / "o")]
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_bench_prints_epochs_and_steps(tmp_path):
    from xattn.eval.studies.benches.probes import study

    text = "\n".join(study(["test_vit"], 1, write_photos(tmp_path / "p", 6)))
    for row in ("| gap |", "| efficient_probe | at |", "| abmilp | ivat |", "at most 4.5x"):
        assert row in text


@pytest.mark.parametrize(("name", "taps", "head"), PAIRS[:2])
def test_the_cascade_begins_at_the_head(name, taps, head):
    both = probed(*make(name, taps, head))
    twins = [twin for _, twin in cascade(both, 3)]
    x = rand(2, 3, 64, 64)
    with torch.no_grad():
        first, plain = twins[0](x), both(x)
        assert not torch.allclose(first.logits, plain.logits)
        assert all(torch.equal(a, b) for a, b in zip(first.maps, plain.maps, strict=True))
        assert torch.equal(twins[-1](x).logits, randomized_backbone(both)(x).logits)
    maps = create_explainer("saliency", twins[0]).attribute(x, 1)
    assert not torch.allclose(maps, create_explainer("saliency", both).attribute(x, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": (0, 0)}, "folds: got 0, 0, with a repeated number"),
        ({"seeds": (1, 1)}, "seeds: got 1, 1, with a repeated number"),
        ({"folds": (9,)}, "fold: got 9"),
        ({"config": ProbeConfig(attention="at")}, "attention: the scores of gap are fixed"),
        ({"sample": -1}, "sample: got -1 photos; give at least 1"),
    ],
)
def test_a_probe_job_is_refused_before_features_are_computed(change, message, tmp_path):
    for k in range(2):
        (tmp_path / "p" / f"c{k}").mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (32, 32), (k * 90, i * 9, 0)).save(
                tmp_path / "p" / f"c{k}" / f"{i}.png"
            )
    backbone, _ = make()
    folder = tmp_path / "features"
    job = ProbeJob(
        backbone=backbone, data=str(tmp_path / "p"), labels=None, heads=("gap",), features=folder
    )
    with pytest.raises(ValueError, match=message):
        run_probes(replace(job, **change), tmp_path / "out", progress=False)
    assert not folder.exists()
