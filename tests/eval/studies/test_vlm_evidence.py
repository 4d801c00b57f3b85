"""Models whose evidence is known: what their photos show, and that the processor makes of them what they
were trained on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.eval.studies import vlm_evidence as study
from xattn.eval.studies.benches import answers, reading_rows

transformers = pytest.importorskip("transformers")


def test_what_is_asked_for_stands_in_its_evidence_alone():
    found = study.scenes(study.RUNS["A"], 6, seed=3)
    for i in range(6):
        for k in (0, 1):
            evidence = found.evidence(i, k)
            assert evidence.sum() == 4
            large = np.kron(evidence, np.ones((8, 8))).astype(bool)
            pixels = found.photos[i].numpy() / 255
            own = np.array(list(study.COLOURS.values())[found.colours[i, k]])
            saturation = pixels.max(2) - pixels.min(2)
            assert saturation[large].mean() > 0.15
            shown = pixels[large].mean(0)
            assert abs(np.corrcoef(shown, own)[0, 1]) > 0.98


def test_textures_differ_and_are_no_mean_of_each_other():
    patterns = study.textures()
    assert len({p.tobytes() for p in patterns}) == 6
    assert set(np.unique(patterns)) == {0.0, 1.0}


def test_a_prior_makes_a_guess_right():
    run = study.RUNS["prior"]
    found = study.scenes(run, 500, seed=1)
    guessed = (found.looks == found.colours).mean()
    assert abs(guessed - (0.8 + 0.2 / 6)) < 0.05


@pytest.mark.parametrize("name", ["A", "local"])
def test_the_processor_makes_what_the_model_was_trained_on(name, tmp_path):
    run = study.RUNS[name]
    found, processor = study.scenes(run, 2, seed=5), study.processor_of()
    photos = [Image.fromarray(pixels.numpy()) for pixels in found.photos]
    text = [f"<image>{found.question(i)}" for i in range(2)]
    inputs = processor(images=photos, text=text, return_tensors="pt")
    ids = study.sequences(found)
    assert torch.equal(inputs["input_ids"], ids[:, :-6])
    torch.testing.assert_close(inputs["pixel_values"], study.normalised(found.photos))
    answer = processor.tokenizer.decode(ids[0, -6:-1])
    assert answer.split()[2] == "and" and answer.split()[0] == found.question(0).split()[0]
    with torch.no_grad():
        logits = study.untrained(run)(ids, pixel_values=study.normalised(found.photos)).logits
    assert logits.shape == (2, 74, 18)


def test_image_tokens_of_the_local_model_are_patches_alone():
    run = study.RUNS["local"]
    model, found = study.untrained(run).eval(), study.scenes(run, 1, seed=5)
    pixels = study.normalised(found.photos)
    changed = pixels.clone()
    changed[:, :, 8:16, 24:32] = 0
    with torch.no_grad():
        before, after = (model.get_image_features(x).pooler_output[0] for x in (pixels, changed))
    assert ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist() == [8 + 3]


def test_a_run_is_kept_as_a_model_that_opens(tmp_path):
    lines = [*study.study(tmp_path, ["A"], quick=True)]
    assert lines[2].startswith("| A | 217,664 |") and (tmp_path / "report.md").is_file()
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert {
        "| attention, last layer",
        "| occlusion, random weights",
        "| occlusion, another photo",
        "| all ones",
        "| occlusion of one token",
        "| random",
    } <= {*rows}
    auto = transformers.AutoModelForImageTextToText, transformers.AutoProcessor
    model, processor = (kind.from_pretrained(tmp_path / "A") for kind in auto)
    truth = json.loads((tmp_path / "A" / "truth.json").read_text())["photos"]
    assert len(truth) == len([*(tmp_path / "A" / "photos").iterdir()]) == 2
    with Image.open(tmp_path / "A" / "photos" / truth[0]["photo"]) as photo:
        inputs = processor(images=photo, text="<image>" + truth[0]["question"], return_tensors="pt")
    assert len(truth[0]["evidence"][0]) == 4 and truth[0]["answer"].split()[2] == "and"
    assert model.generate(**inputs, max_new_tokens=1).shape == (1, 69)
    before = (tmp_path / "A" / "model.safetensors").stat().st_mtime_ns
    assert [*study.study(tmp_path, ["A"], quick=True)] == lines
    assert (tmp_path / "A" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another run; choose a new folder"):
        [*study.study(tmp_path, ["A"])]
    with pytest.raises(ValueError, match="runs: got 'D'; choose from A, B"):
        [*study.study(tmp_path, ["D"])]


def test_pointing_and_energy():
    evidence = np.zeros((8, 8), bool)
    evidence[2:4, 2:4] = True
    assert study.pointing_and_energy(evidence.astype(float), evidence) == (1, 1)
    assert study.pointing_and_energy(np.ones((8, 8)), evidence) == (4 / 64, 4 / 64)
    assert study.pointing_and_energy(evidence - 0.5, evidence) == (1, 1)
    assert study.pointing_and_energy(np.zeros((8, 8)), evidence) == (4 / 64, 0)
    assert all((of > 0).all() for of in study.controls(0, 1).values())


def test_f1_iou_needs_bright_evidence_and_a_dark_function_word():
    evidence = [np.zeros((8, 8), bool) for _ in range(2)]
    evidence[0][:4], evidence[1][4:] = True, True
    exact = [2.0 * true for true in evidence]
    # Bilinear edges lie half on, half off: Otsu cuts within them.
    assert study.f1_iou(exact, evidence, np.zeros((8, 8))) == pytest.approx(1, abs=0.04)
    assert study.f1_iou(exact, evidence, np.full((8, 8), 2.0)) == 0  # bright where nothing is meant
    assert study.f1_iou(exact[::-1], evidence, np.zeros((8, 8))) < 0.2
    assert study.f1_iou([np.zeros((8, 8))] * 2, evidence, np.zeros((8, 8))) == 0
    half = study.f1_iou([np.ones((8, 8))] * 2, evidence, np.eye(8))
    assert half == 0  # a flat map has no threshold, so nothing of it is shown
    assert study.f1_iou(exact, evidence, 2.0 * evidence[0]) == pytest.approx(2 / 3, abs=0.05)


class OneTokenMatters:
    """Its word is certain while image token 9 is there, and as likely as another without it."""

    entered = forced = inputs = lambda *_: SimpleNamespace(features=torch.arange(64.0)[:, None])

    def tokenizer(self, text, add_special_tokens):
        return {"input_ids": [0] * len(text.split())}

    def logits(self, forced, entered, features):
        there = (features[:, 9, 0] == 9).float()
        return torch.stack([1000 * there, 0 * there], 1)[:, None].expand(-1, 3, 2)


@pytest.mark.parametrize(("value", "expected"), [(1, 0.5 + 0.5 / 32), (-1, 1 - 0.5 / 32)])
def test_deletion_and_insertion_are_areas_below_the_probability(value, expected):
    """It falls at the first sixteenth that is hidden, or at the last, and comes back likewise."""
    masked, of = study.Masked(OneTokenMatters(), None, "", "a b c", seed=0), np.zeros((8, 8))
    assert masked(of, 1)[2] == 0  # what hides nothing, or all alike, tells nothing of masks
    of.flat[9] = value
    deletion, insertion, related = masked(of, 1)
    assert deletion == pytest.approx(expected)
    assert insertion == pytest.approx(1.5 - expected)
    assert related == pytest.approx(value)  # masks that hide the token cost a word, others nothing
    assert masked.masks.shape == (32, 64) and 0.3 < masked.masks.mean() < 0.7


@pytest.mark.slow
def test_methods_reach_what_they_should_where_the_evidence_is_known(tmp_path):
    [*study.study(tmp_path, ["A"])]
    found = json.loads((tmp_path / "A-scores.json").read_text())
    pointing, energy, *_ = (
        {k: np.mean(v, 0)[i] for k, v in found["rows"].items()} for i in range(4)
    )
    lost = {kind: np.mean(values) for kind, values in found["lost"].items()}
    assert min(pointing["attention"], pointing["occlusion"]) >= 0.7
    assert pointing["integrated_gradients"] >= 0.8
    assert energy["outcomes, trained, whole rows"] >= energy["attention"] + 0.2
    assert energy["outcomes, trained"] >= max(0.85, energy["outcomes"])
    assert max(pointing["attention, last layer"], pointing["tam"]) <= 0.5
    assert lost["look"] >= 3 and max(lost["and"], lost["colour"]) <= 0.1
    assert 0.02 <= pointing["random"] <= 0.12


def test_the_cost_of_reading_is_measured_beside_plain_attention():
    lines = [*reading_rows.study(tokens=200, new_tokens=2, rounds=1)]
    rows = [line.split(" | ") for line in lines if line.startswith("| rows read")]
    above = [float(row[2].strip(" |")) for row in rows[:2]]
    assert len(rows) == 3 and max(above) < 1 < 4 * 4 * 200**2 * 4 / 1e6


def test_a_pack_is_measured_beside_the_answer_alone():
    lines = [*answers.study(side=4, new_tokens=2, rounds=1)]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "tokens |" in line
    ]
    jobs = [job for _, job, *_ in rows]
    assert [prompt for prompt, *_ in rows] == 6 * ["LLaVA, 68 tokens"] + 6 * ["Qwen2-VL, 22 tokens"]
    assert jobs[:6] == jobs[6:] and rows[1][3] == rows[7][3] == "1.00x"
    assert all(float(seconds) >= 0 for *_, seconds, _ in rows)
