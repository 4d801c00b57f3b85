"""The study of one character drawn again: its pictures, the model and its limit cases, the command."""

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import same_character
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.characters import (
    CHOICES,
    draw,
    draw_prompts,
    looks_of,
    other_prompts,
    words_of,
)
from xattn.eval.studies.models.character_flow import READINGS, CharacterFlow
from xattn.eval.studies.same_character import DEFAULTS, ROWS, coarse, shares, train

SMALL = DEFAULTS.quick()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(count=3):
    prompts = draw_prompts(count, seeded())
    references = draw(looks_of(range(count)), other_prompts(prompts, seeded(1)))
    x, t = torch.randn(count, 3, 16, 16, generator=seeded(2)), torch.full((count,), 0.5)
    return x, t, prompts, references


def test_a_character_depends_on_its_number_and_a_picture_on_both():
    looks = looks_of([5, 6])
    assert looks.shape == (2, 15) and torch.equal(looks[1:], looks_of([6]))
    assert not torch.equal(looks[0], looks[1])
    prompts = draw_prompts(2, seeded())
    pictures = draw(looks, prompts)
    assert pictures.shape == (2, 3, 16, 16) and 0 <= pictures.min() <= pictures.max() <= 1
    torch.testing.assert_close(draw(looks[1:], prompts[1:]), pictures[1:])
    other = draw(looks, other_prompts(prompts, seeded()))
    assert ((other - pictures).abs().amax((1, 2, 3)) > 0.1).all()


def test_a_reference_shares_no_word_with_the_prompt():
    prompts = draw_prompts(200, seeded())
    other = other_prompts(prompts, seeded(1))
    assert (other != prompts).all() and (other < torch.tensor(CHOICES)).all()
    assert words_of(torch.tensor([3, 0, 2])) == "night, nothing, right"


def test_characters_of_the_test_differ_in_each_seed_and_are_not_learned():
    found = [set(same_character.tested(SMALL, Split("test"), seed).numbers) for seed in (0, 1)]
    assert not found[0] & found[1]
    learned = set(range(SMALL.characters)) | set(same_character.judging(SMALL))
    assert not learned & (found[0] | found[1])


def test_at_the_start_parallel_reads_the_words_alone():
    torch.manual_seed(0)
    model = CharacterFlow(CHOICES, "parallel").eval()
    x, t, prompts, references = inputs()
    found = model(x, t, prompts, references)
    assert torch.equal(model(x, t, prompts, references.flip(0)), found)
    assert not torch.equal(model(x, t, prompts.flip(0), references), found)


@pytest.mark.parametrize("reading", READINGS)
def test_each_reading_depends_on_what_it_reads(reading):
    torch.manual_seed(0)
    model = CharacterFlow(CHOICES, reading)
    x, t, prompts, references = inputs()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.loss(references, prompts, references, x, t).backward()  # moves the added stream off 0
    optimizer.step()
    found = model(x, t, prompts, references)
    assert torch.equal(model(x, t, prompts.flip(0), references), found) == (reading == "vision")
    assert torch.equal(model(x, t, prompts, references.flip(0)), found) == (reading == "text")


def test_a_model_that_knows_the_picture_draws_it():
    model = CharacterFlow(CHOICES, "text")
    x, _, prompts, references = inputs()
    model.predict = lambda *_: 2 * references - 1
    torch.testing.assert_close(model.sample(prompts, references, x, 4), references)


def test_blurred_pictures_keep_their_mean_and_a_plain_one_is_unchanged():
    plain = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(coarse(plain), plain)
    picture = inputs()[3]
    assert coarse(picture).shape == picture.shape
    assert (coarse(picture) - coarse(picture).mean()).square().mean() < picture.var()


def test_rows_of_a_seed_have_the_same_batches(monkeypatch):
    seen = []

    def loss(self, pictures, prompts, references, noise, t):
        seen.append((prompts, references, noise, t))
        return next(self.parameters()).sum()

    monkeypatch.setattr(CharacterFlow, "loss", loss)
    for name in ("parallel", "parallel, fine only", "text only"):
        train(CharacterFlow(CHOICES, ROWS[name].reading), ROWS[name], SMALL, range(8), 3)
    runs = [seen[i : i + SMALL.steps] for i in range(0, len(seen), SMALL.steps)]
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_both_needs_one_picture_with_both():
    run = {"kept": [1, 1, 0, 0], "followed": [0, 1, 1, 0]}
    assert shares(run) == {"kept": 50.0, "followed": 50.0, "both": 25.0}


def test_the_command_prints_all_rows_and_draws(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["same-character", "--quick", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for name in (*ROWS, *same_character.DRAWN):
        assert f"\n| {name} | " in printed
    assert Image.open(output / "samples.jpg").width > 100
    assert (output / "values.csv").is_file()
    assert np.load(output / "parallel.npy").shape == (8, 3, 16, 16)


def test_an_unknown_row_is_one_line(tmp_path, capsys):
    assert main(["same-character", "--rows", "alone", "--output", str(tmp_path / "out")]) == 2
    assert "rows: no 'alone'; choose from parallel, " in capsys.readouterr().err
