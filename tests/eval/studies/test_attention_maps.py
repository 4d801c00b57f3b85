"""Pictures of mechanisms: one for each with maps, of the layer that is asked for, and clear refusals."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from xattn.attention import Conversion
from xattn.attention.base import MECHANISMS
from xattn.attention.description import described
from xattn.backbone import Backbone, converted, load_backbone
from xattn.backbone.conversion import save_conversion
from xattn.eval.studies import attention_maps
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.attention_maps import LARGEST, setting_of, study, with_maps
from xattn.pictures.contact_sheet import contact_sheet_image


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 90)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def backbone(tmp_path) -> Backbone:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "w.pth")
    return load_backbone("test_vit", tmp_path / "w.pth", class_names=("a", "b", "c"))


def test_mechanisms_with_maps_are_those_that_record_some():
    assert with_maps() == [name for name in MECHANISMS.names() if described(name).maps]


def test_what_a_mechanism_asks_to_show_are_maps_that_it_has():
    for name in MECHANISMS.names():
        setting = setting_of(name)
        assert {*setting.channels, *setting.legends} <= set(described(name).maps), name


def test_every_mechanism_with_maps_has_a_small_picture(backbone, photo, tmp_path):
    output = tmp_path / "maps"
    lines = list(study(backbone, photo, output, size=160))
    assert [line.partition(":")[0] for line in lines] == with_maps()
    for name in with_maps():
        assert (output / f"{name}.jpg").stat().st_size <= LARGEST, name
        assert Image.open(output / f"{name}.jpg").width >= 700, name  # the photo and two maps


def test_the_command_draws_the_mechanisms_that_it_names(backbone, photo, tmp_path, capsys):
    command = ["attention-maps", str(photo), "-b", "test_vit", "--size", "160"]
    (tmp_path / "names.txt").write_text("a\nb\nc")
    command += ["--weights", str(tmp_path / "w.pth"), "--class-names", str(tmp_path / "names.txt")]
    command += ["--only", "spatten", "gna", "--layer", "2", "--output", str(tmp_path / "maps")]
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["gna.jpg", "spatten.jpg"]
    assert capsys.readouterr().out.count("\n") == 2


def test_the_caption_says_whether_the_network_was_trained(backbone, photo, tmp_path, monkeypatch):
    captions = []

    def sheet(*given, notes, **options):
        captions.extend(notes)
        return contact_sheet_image(*given, notes=notes, **options)

    monkeypatch.setattr(attention_maps, "contact_sheet_image", sheet)
    made = Conversion("dma", tuple(range(6)), {"window": 4})
    weights = converted(backbone, *made).model.state_dict().items()
    state = {name: value for name, value in weights if ".attn.mechanism." in name}
    save_conversion(tmp_path / "trained", backbone, made, state, {})
    for name, trained in (("gna", []), ("dma", []), ("dma", [tmp_path / "trained"])):
        output = tmp_path / f"maps-{len(captions)}"
        list(study(backbone, photo, output, only=[name], size=160, distilled=trained))
    assert [caption.partition(", layer ")[2].partition(". ")[2] for caption in captions] == [
        "Converted without training.",
        "Converted without training; the parameters of the mechanism are as they were initialised.",
        "Trained by xattn distill.",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"only": ["softmax"]}, "only: got 'softmax', no mechanism with maps of its own"),
        ({"only": ["hipp"]}, "only: got 'hipp', .* choose from .* hip"),
        ({"only": ["gna"], "layer": 60}, "layer: got 60; gna has maps in layers 0-5, choose one"),
        ({"only": ["gna"], "size": 100}, "size: test_vit cannot take"),
    ],
)
def test_bad_input_is_refused(backbone, photo, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        list(study(backbone, photo, tmp_path / "maps", **wrong))
    assert not list(tmp_path.glob("maps/*"))


def test_a_converted_network_is_refused(backbone, photo, tmp_path):
    with pytest.raises(ValueError, match="mechanism: .* is converted already"):
        list(study(converted(backbone, "gna", None, {"kernel": 3}), photo, tmp_path / "maps"))
