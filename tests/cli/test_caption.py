"""``xattn caption``: packs of answers, given texts, and what is refused."""

import json

import pytest

pytest.importorskip("transformers")
import vlm_models as tiny
from PIL import Image

from xattn.cli import main
from xattn.packs.reader import Pack

QUESTION = ["--prompt", "what is on the table ?", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.network("llava").save_pretrained(folder)
    tiny.processor("llava").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        tiny.photo().rotate(90 * i).save(folder / f"{i}.png")
    return folder


def caption(*arguments):
    return main(["caption", *map(str, arguments)])


def test_a_folder_of_photos_becomes_a_pack_of_words(model, photos, tmp_path, capsys):
    (photos / "2.png").write_bytes(b"no photo")
    out = tmp_path / "pack"
    names = ["--explainers", "Attention", "occlusion", "--options", "occlusion.size=1"]
    assert caption(photos, "--vlm", model, *QUESTION, *names, "--overlays", 3, "--output", out) == 0
    said = capsys.readouterr()
    assert "skipped 2.png" in said.err and "word" in said.out and f"pack: {out}" in said.out
    pack = Pack(out)
    answer = pack.facts_of("0.png").answer
    assert answer.prompt == QUESTION[1] and answer.asked > 0 and len(answer.words) > 0
    ids = {f"0.png@{i}.{m}" for i in range(len(answer.words)) for m in ("attention", "occlusion")}
    assert ids <= set(pack.entry_ids)
    assert pack.manifest.skipped[0][0] == "2.png"
    assert pack.explanation("0.png@0.occlusion").protocol["options"]["size"] == 1
    assert sum(answer.words[0].shares["attention"]) == pytest.approx(1, abs=1e-3)
    assert len(list((out / "overlays").iterdir())) == len(pack.entry_ids)


def test_given_texts_words_and_photos_together(model, photos, tmp_path, capsys):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"0.png": "a red fork", "1.png": "a blue cup"}))
    given = ["--vlm", model, *QUESTION, "--answer", texts]
    one = ["--words", "a", "--limit", 1, "--output", tmp_path / "a"]
    assert caption(photos, *given, *one) == 0
    [id] = Pack(tmp_path / "a").entry_ids
    assert id.endswith(".png@0.attention")
    assert not (tmp_path / "a" / "overlays").exists()  # drawn where they are asked for
    assert caption(photos, *given, "--output", tmp_path / "b") == 0
    pack = Pack(tmp_path / "b")
    assert [pack.facts_of(f"{i}.png").answer.text for i in range(2)] == ["a red fork", "a blue cup"]
    both = ["--vlm", model, *QUESTION, "--together", "--answer", "a red fork", "--words", "fork"]
    assert caption(photos, *both, "--output", tmp_path / "c") == 0
    assert sorted(Pack(tmp_path / "c").entry_ids) == ["0.png#1@2.attention", "0.png#2@2.attention"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vlm", "nowhere"], "vlm: no folder 'nowhere'"),
        (["--instead", "cat"], "instead: got 'cat'; write word=other"),
        (["--explainers", "atention"], "explainers: "),
        (["--options", "rise.masks=3"], "options: got 'rise.masks=3'"),
        (["--answer", "gone.csv"], "answer: gone.csv is not there; give a text, or a .csv or .json file"),
        (["--device", "cpux"], "device: got 'cpux'"),
        (["--words", "knife", "--answer", "a red fork"], "words: 'knife' is not in the answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(model, tmp_path, capsys, options, says):
    Image.new("RGB", (64, 64)).save(tmp_path / "p.png")
    given = [] if options[0] == "--vlm" else ["--vlm", model]
    out = tmp_path / "out"
    assert caption(tmp_path / "p.png", *given, *QUESTION, *options, "--output", out) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xattn: ")]
    assert len(lines) == 1 and says in lines[0] and not out.exists()
