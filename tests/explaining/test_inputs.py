"""Networks with several inputs: the view of one is the network with the others fixed; planted truth."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xattn
from xattn import load_backbone
from xattn.cli import main
from xattn.explainers import create_explainer
from xattn.explaining.inputs import _Sample, band_maps, explain_inputs, input_view
from xattn.packs.reader import Pack

DRAW = torch.Generator().manual_seed(0)


class Linear(nn.Module):
    """Logits that are linear in two images and a table."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(2, 3, 12, 12, generator=draw))
        self.b = nn.Parameter(torch.randn(2, 1, 12, 12, generator=draw))
        self.c = nn.Parameter(torch.randn(2, 5, generator=draw))

    def forward(self, rgb, depth, table):
        images = torch.einsum("bchw,kchw->bk", rgb, self.a) + torch.einsum(
            "bchw,kchw->bk", depth, self.b
        )
        return images + table @ self.c.T


class Dict(Linear):
    def forward(self, inputs):
        return super().forward(**inputs)


class Keywords(Linear):
    def forward(self, **inputs):
        return super().forward(**inputs)


class Tuple(Linear):
    def forward(self, *inputs):
        return super().forward(*inputs)


INPUTS = {
    "rgb": torch.rand(1, 3, 12, 12, generator=DRAW),
    "depth": torch.rand(1, 1, 12, 12, generator=DRAW),
    "table": torch.randn(1, 5, generator=DRAW),
}


@pytest.mark.parametrize("kind", [Linear, Dict, Keywords, Tuple])
def test_a_linear_network_shares_its_logit_out_exactly(kind):
    net = kind()
    given = INPUTS if kind is not Tuple else tuple(INPUTS.values())
    found = explain_inputs(net, given, ["input_x_gradient", "occlusion"], target=1, task="regression", options={"occlusion": {"size": 1, "stride": 1}})  # fmt: skip
    rgb, depth, table = found.values()
    for one, x, w in ((rgb, INPUTS["rgb"], net.a), (depth, INPUTS["depth"], net.b)):
        exact = (x[0] * w[1]).sum(0).detach().numpy()
        for method in ("input_x_gradient", "occlusion"):
            assert np.allclose(one.maps[method].map, exact, atol=1e-4), (one.name, method)
        assert one.drop == pytest.approx(exact.sum(), abs=1e-4)
    exact = (INPUTS["table"][0] * net.c[1]).detach().numpy()
    for method in ("integrated_gradients", "feature_ablation"):
        assert np.allclose(table.numbers[method], exact, atol=1e-4), method
    whole = Linear.forward(net, **INPUTS)[0, 1].item()
    assert rgb.drop + depth.drop + table.drop == pytest.approx(whole, abs=1e-3)


def test_a_view_is_the_network_with_the_other_inputs_of_the_sample():
    net = Linear()
    view = input_view(net, INPUTS, "depth", mean={"depth": 0.5}, std={"depth": [0.25]})
    x = torch.rand(4, 1, 12, 12, generator=DRAW)
    others = {k: v.expand(4, *v.shape[1:]) for k, v in INPUTS.items() if k != "depth"}
    assert torch.allclose(view.logits(x), net(depth=(x - 0.5) / 0.25, **others), atol=1e-4)
    assert (
        view.fingerprint
        != input_view(net, INPUTS | {"table": torch.zeros(1, 5)}, "depth").fingerprint
    )
    assert net.a.requires_grad and net.training  # it is still the caller's


def test_bytes_and_doubles_are_the_images_that_floats_are():
    image = (INPUTS["rgb"] * 255).to(torch.uint8)
    about = {"target": 1, "mean": 0.4, "std": 0.25, "task": "multilabel"}

    def found(change):
        one = explain_inputs(Linear(), INPUTS | change, **about)["rgb"]
        return one.drop, one.maps["occlusion"].probability, one.maps["occlusion"].map

    drop, p, map = found({"rgb": image / 255})
    double = {"rgb": image.double() / 255, "table": INPUTS["table"].double()}
    for change in ({"rgb": image}, double):
        other = found(change)
        assert other[:2] == pytest.approx((drop, p), abs=1e-5) and np.allclose(
            other[2], map, atol=1e-5
        )


def test_a_view_stays_as_it_was_made_when_the_sample_changes():
    given = {name: value.clone() for name, value in INPUTS.items()}
    view = input_view(Linear(), given, "depth")
    before = view.logits(INPUTS["depth"])
    given["table"].zero_()
    given["rgb"].zero_()
    assert torch.equal(view.logits(INPUTS["depth"]), before)


# ------------------------------------------------------------------ planted truth


class Branches(nn.Module):
    """An RGB and a depth branch, and a table's row."""

    def __init__(self):
        super().__init__()
        self.rgb, self.depth = (
            nn.Sequential(nn.Conv2d(c, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()) for c in (3, 1)
        )  # fmt: skip
        self.fc = nn.Linear(8 + 8 + 4, 2)

    def forward(self, rgb, depth, table):
        pooled = [self.rgb(rgb).amax((2, 3)), self.depth(depth).amax((2, 3))]
        return self.fc(torch.cat([*pooled, table], 1))


def drawn(count, decides, generator):
    """Samples in which a bright square in one image, or column 2 of the table, decides; squares in the other
    image and other columns are noise. Corners (y, x) of the deciding squares."""
    labels = torch.randint(2, (count,), generator=generator)
    noise = torch.randint(2, (count,), generator=generator)
    at = torch.randint(0, 12, (count, 2), generator=generator)
    images = {
        k: 0.2 * torch.rand(count, c, 16, 16, generator=generator)
        for k, c in (("rgb", 3), ("depth", 1))
    }
    for name, image in images.items():
        shown = labels if name == decides else noise
        for i in range(count):
            y, x = at[i].tolist()
            image[i, :, y : y + 4, x : x + 4] += 0.8 * float(shown[i])
    table = torch.randn(count, 4, generator=generator)
    if decides == "table":
        table[:, 2] = 4.0 * labels - 2 + 0.2 * table[:, 2]
    return {**images, "table": table}, labels, at


@pytest.mark.parametrize("decides", ["rgb", "depth", "table"])
def test_the_input_that_decides_carries_the_attribution(decides):
    torch.manual_seed(0)
    net, draw = Branches(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        inputs, labels, _ = drawn(64, decides, draw)
        loss = F.cross_entropy(net(**inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, labels, at = drawn(40, decides, draw)
    assert float((net(**inputs).argmax(1) == labels).float().mean()) > 0.9
    inside = []
    for i in [i for i in range(40) if labels[i]][:6]:
        sample = {name: value[i : i + 1] for name, value in inputs.items()}
        found = explain_inputs(net, sample, ["occlusion", "gradcam"], target=1, options={"occlusion": {"size": 4, "stride": 2}})  # fmt: skip
        drops = {name: abs(one.drop) for name, one in found.items()}
        assert (
            max(drops, key=drops.get) == decides and drops[decides] > 2 * sorted(drops.values())[1]
        ), drops
        if decides == "table":
            assert all(np.abs(n).argmax() == 2 for n in found["table"].numbers.values())
            continue
        other = "depth" if decides == "rgb" else "rgb"
        maps = {name: found[name].maps["occlusion"].map for name in (decides, other)}
        assert maps[decides].max() > 3 * np.abs(maps[other]).max()
        y, x = at[i].tolist()
        row, column = np.unravel_index(maps[decides].argmax(), (16, 16))
        inside.append(y <= row < y + 4 and x <= column < x + 4)
    assert all(inside)


def test_layers_are_those_of_the_inputs_own_branch(tmp_path):
    net = Branches()
    inputs, _, _ = drawn(1, "rgb", torch.Generator().manual_seed(3))
    for name in ("rgb", "depth"):
        assert input_view(net, inputs, name).taps[-1].startswith(f"net.{name}")
    found = explain_inputs(net, inputs, "gradcam", class_names=["no", "yes"], target="yes", output=tmp_path / "pack")  # fmt: skip
    pack = Pack(tmp_path / "pack")
    assert pack.counts == (2, 2)
    for name in ("rgb", "depth"):
        about = pack.provenance(f"{name}@1.gradcam")["protocol"]
        assert about["input"] == name and len(about["numbers"]["table"]["feature_ablation"]) == 4
        assert about["drops"]["table"] == pytest.approx(found["table"].drop, rel=1e-5)


def test_views_of_one_sample_keep_their_own_taps():
    net = Branches()
    inputs, _, _ = drawn(1, "rgb", torch.Generator().manual_seed(3))
    sample = _Sample(net, inputs, None, None)
    views = {name: sample.view(name) for name in ("rgb", "depth")}
    views["deep"] = sample.view("depth", taps=["net.depth.0", "net.depth.1", "net.depth.3"])
    for key, view in views.items():
        name, taps = "rgb" if key == "rgb" else "depth", list(view.taps)
        expected = input_view(net, inputs, name, taps=taps)(inputs[name]).maps
        assert all(torch.equal(*pair) for pair in zip(view(inputs[name]).maps, expected, strict=True)), key  # fmt: skip


# ------------------------------------------------------------------ bands


def test_the_maps_of_bands_sum_to_that_of_the_image_and_find_the_band_that_decides():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    backbone = load_backbone(net, input_size=16, mean=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], std=[0.2] * 6)
    image = torch.rand(6, 16, 16, generator=DRAW)
    maps = band_maps(backbone, image, "input_x_gradient", 2)
    whole = create_explainer("input_x_gradient", backbone).attribute(image[None], 2)
    assert maps.shape == (6, 16, 16) and torch.allclose(maps.sum(0), whole[0, 0], atol=1e-5)
    saliency = create_explainer("saliency", backbone).attribute(image[None], 2)
    assert torch.allclose(
        band_maps(backbone, image, "saliency", 2).amax(0), saliency[0, 0], atol=1e-5
    )
    with torch.no_grad():
        net[0].weight[:, [0, 1, 2, 3, 5]] = 0
    hidden = band_maps(backbone, image, "occlusion", 2, size=4, stride=4).abs().amax((1, 2))
    assert float(hidden[4]) > 0 and hidden[[0, 1, 2, 3, 5]].max() == 0
    with pytest.raises(ValueError, match="gradcam.* reads a layer, which all channels share"):
        band_maps(backbone, image, "gradcam", 2)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "change, match",
    [
        ({"table": torch.zeros(2, 5)}, "inputs: 'table' is .*batch of one"),
        ({"table": [1, 2]}, "inputs: 'table' is list"),
        ({"rgb": INPUTS["rgb"] * 255}, r"inputs\['rgb'\]: got values in .*: inputs\['rgb'\] / 255"),
        ({"rgb": torch.rand(1, 3, 9, 9)}, "fails on images"),
    ],
)
def test_inputs_of_another_form_are_refused_in_one_line(change, match):
    with pytest.raises(ValueError, match=match) as error:
        explain_inputs(Linear(), INPUTS | change, "saliency", target=0)
    assert "\n" not in str(error.value)


def test_names_that_are_not_there_are_refused():
    for call, match in (
        (lambda: explain_inputs(Linear(), torch.rand(1, 3, 8, 8)), "inputs: got a Tensor"),
        (lambda: explain_inputs(Linear(), {"table": INPUTS["table"]}), "inputs: none is an image"),
        (lambda: input_view(Linear(), INPUTS, "dept"), "name: 'dept' is not an image"),
        (lambda: input_view(Linear(), INPUTS, "table"), "name: 'table' is not an image"),
        (lambda: explain_inputs(Linear(), INPUTS, target="fox"), "class 'fox'"),
        (lambda: explain_inputs(Linear(), INPUTS, numbers=["shap"]), "numbers: got 'shap'"),
        (lambda: explain_inputs(Linear(), INPUTS, baselines={"table": torch.zeros(3)}), "baselines: 'table'"),
        (lambda: explain_inputs(Linear(), INPUTS, baselines={"tabel": torch.zeros(3)}), "baselines: 'tabel'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    assert xattn.explain_inputs is explain_inputs


# ---------------------------------------------------------------------- the command

NETWORK = """
import torch
from torch import nn
class Two(nn.Module):
    def forward(self, photo, age):
        return torch.cat([photo.mean((1, 2, 3))[:, None], age[:, :1]], 1)
def made():
    return Two()
def number():
    return 7
"""


@pytest.fixture
def network_file(tmp_path):
    path = tmp_path / f"inputs_of_{tmp_path.name}.py"  # a name of its own
    path.write_text(NETWORK)
    return path


@pytest.mark.parametrize("kind", ["npz", "unnamed", "pt"])
def test_the_command_explains_each_input_of_a_file(network_file, kind, tmp_path, capsys):
    photo, age = torch.rand(1, 3, 32, 32, generator=DRAW), torch.tensor([[0.4, 1.0]])
    sample = tmp_path / ("sample.pt" if kind == "pt" else "sample.npz")
    if kind == "pt":
        torch.save({"photo": photo, "age": age}, sample)
    elif kind == "npz":
        np.savez(sample, photo=photo.numpy(), age=age.numpy())
    else:
        np.savez(sample, photo.numpy(), age.numpy())
    out = tmp_path / "pack"
    words = ["--multi-input", f"{network_file}:made", "--explainers", "saliency", "--classes", "0"]
    assert main(["explain", str(sample), *words, "--output", str(out)]) == 0
    first, second = ("input 0", "input 1") if kind == "unnamed" else ("photo", "age")
    said = capsys.readouterr().out
    assert f"{first}: p falls by" in said and f"{second}: p falls by" in said
    (shown,) = xattn.load_pack(out)
    assert shown.image_id == first and shown.target == 0
    lines = (out / f"numbers-{second.replace(' ', '_')}.csv").read_text().splitlines()
    assert lines[0] == "element,integrated_gradients,feature_ablation" and len(lines) == 3


def test_errors_of_the_command_name_the_argument_and_the_remedy(network_file, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", photo=np.zeros((1, 3, 8, 8), np.float32), age=np.zeros((1, 2)))
    np.savez(tmp_path / "flat.npz", photo=np.zeros((3, 8, 8), np.float32))
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    torch.save(torch.zeros(3), tmp_path / "alone.pt")
    sample, network = str(tmp_path / "s.npz"), ["--multi-input", f"{network_file}:made"]
    for words, reason in (
        ([sample, "--multi-input", "resnet18"], "multi_input: got 'resnet18'; give FILE.py:NAME"),
        ([sample, "--multi-input", f"{network_file}:none"], "multi_input: "),
        ([sample, "--multi-input", f"{network_file}:number"], "multi_input: "),
        ([str(network_file), *network], "images: got "),
        ([str(tmp_path / "broken.npz"), *network], "images: "),
        ([str(tmp_path / "alone.pt"), *network], "images: "),
        ([str(tmp_path / "flat.npz"), *network], "inputs: 'photo' is (3, 8, 8); give each"),
        (
            [sample, *network, "--classes", "0", "1"],
            "classes: only one class can be explained with --multi-input",
        ),
        ([sample, *network, "--top", "2"], "top: "),
        ([sample, *network, "--limit", "2"], "limit: "),
    ):
        assert main(["explain", *words, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"error: {reason}" in error and error.count("\n") == 1, error
