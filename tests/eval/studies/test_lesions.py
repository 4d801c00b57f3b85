"""Generated lesions: a function of (seed, index), and what they look like."""

import numpy as np
import pytest
import torch

from xattn.eval.studies.models import lesions
from xattn.eval.studies.models.lesions import (
    FAINT,
    SLICES,
    VOLUMES,
    sample,
    samples,
    template,
)

pytest.importorskip("nilearn", reason="the extra xattn[volumes] is not installed")


@pytest.mark.parametrize("kind", [SLICES, FAINT, VOLUMES])
def test_a_sample_is_a_function_of_seed_and_index(kind):
    first = sample(3, 5, kind)
    np.random.seed(1)
    torch.manual_seed(1)
    again = sample(3, 5, kind)
    assert torch.equal(first.image, again.image) and torch.equal(first.mask, again.mask)
    for other in (sample(3, 6, kind), sample(4, 5, kind)):
        assert not torch.equal(first.image, other.image)
    assert first.image.shape == first.mask.shape == (1, *kind.size)
    assert first.image.dtype == torch.float32
    assert 0 <= first.image.min() and first.image.max() <= 1


def test_a_sixth_is_clean_and_lesions_have_their_size():
    found = samples(0, 200)
    clean = found.radii == 0
    assert 0.08 < clean.float().mean() < 0.25
    areas = found.masks.flatten(1).sum(1)
    assert (areas[clean] == 0).all() and (areas[~clean] > 0).all()
    inside = areas[~clean] / (torch.pi * found.radii[~clean] ** 2)
    assert 0.7 < inside.median() < 1.1 and inside.max() < 1.5  # less where the brain ends
    assert set(found.masks.unique().tolist()) == {0.0, 1.0}


def test_lesions_are_brighter_than_the_brain_around_them_and_faint_ones_less():
    def contrast(kind):
        found = samples(0, 60, kind)
        inside = found.masks > 0
        brain = (found.images > 0.2) & ~inside
        return float(found.images[inside].mean() - found.images[brain].mean())

    assert contrast(SLICES) > contrast(FAINT) + 0.1 > 0.1


def test_the_template_is_the_brain_in_the_middle():
    for spacing, size in ((3, (64, 74, 64)), (4, (48, 56, 48))):
        brain = template(spacing)
        assert brain.shape == size and brain.max() == 1 and brain.min() == 0
        middle = [np.average(np.arange(n), weights=brain.sum((0, 1, 2)[:i] + (0, 1, 2)[i + 1 :])) for i, n in enumerate(size)]  # fmt: skip
        assert all(abs(at / n - 0.5) < 0.06 for at, n in zip(middle, size, strict=True))
        with pytest.raises(ValueError):
            brain[0] = 1  # samples share it


def test_without_nilearn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nilearn.datasets", None)
    with pytest.raises(ValueError, match=r'^lesions: .*run: pip install "xattn\[volumes\]"'):
        lesions.template.__wrapped__(3)
