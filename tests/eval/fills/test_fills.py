"""What stands behind a mask: known values, borders, and what each kind may look at."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from xattn.eval.fills import KINDS, blur, fill, rise_blur
from xattn.eval.fills.imputation import impute

MEAN = (0.5, 0.4, 0.3)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def hole(h, w):
    removed = torch.zeros(1, h, w, dtype=torch.bool)
    removed[:, h // 4 : h // 2, w // 3 : w // 2] = True
    return removed


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_images_shape_and_depends_on_seeds_only(kind):
    image, removed = rand(3, 33, 26), hole(33, 26)
    state = torch.get_rng_state()
    one, two, other = (fill(image, removed, kind, mean=MEAN, seed=seed) for seed in (1, 1, 2))
    assert one.shape == image.shape and one.dtype == image.dtype
    assert torch.equal(one, two)
    assert torch.equal(one, other) == (kind not in ("noise", "road"))
    assert torch.equal(torch.get_rng_state(), state)


def test_constant_fills():
    image, removed = rand(3, 8, 9), hole(8, 9)
    assert torch.equal(fill(image, removed, "black"), torch.zeros(3, 8, 9))
    colour = fill(image, removed, "mean", mean=MEAN)
    assert torch.equal(colour, torch.tensor(MEAN)[:, None, None].expand(3, 8, 9))


def test_noise_is_uniform():
    noise = fill(rand(3, 64, 64), hole(64, 64), "noise", seed=5)
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.02)
    assert noise.std() == pytest.approx(12**-0.5, abs=0.02)


def test_blur_at_224_is_an_11_by_11_gaussian_of_sigma_5():
    image = torch.zeros(3, 224, 224)
    image[:, 100, 90] = 1
    got = blur(image)
    taps = torch.exp(-(torch.arange(-5, 6.0) ** 2) / 50)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    assert torch.allclose(got[:, 95:106, 85:96], kernel.expand(3, 11, 11), atol=1e-6)
    assert float(got.sum()) == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("size", [(2, 2), (7, 40), (64, 64), (130, 300)])
def test_blur_keeps_constants_up_to_the_border_and_smooths(size):
    assert torch.allclose(blur(torch.full((3, *size), 0.7)), torch.tensor(0.7), atol=1e-6)
    image = rand(3, *size)
    assert blur(image).std() < image.std()


@pytest.mark.parametrize("size", [(2, 2), (7, 40), (64, 64)])
def test_the_blur_of_rise_is_its_kernel_on_the_normalised_image_padded_with_zeros(size):
    image, mean = rand(3, *size), torch.tensor(MEAN)
    std = torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(impulse, 5)).float().expand(3, 1, 11, 11)
    colour = mean[:, None, None]
    expected = F.conv2d((image - colour) / std, kernel, padding=5, groups=3) * std + colour
    torch.testing.assert_close(rise_blur(image, mean), expected, rtol=0, atol=1e-6)
    two = torch.stack([image, 1 - image])
    torch.testing.assert_close(rise_blur(two, mean)[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(fill(image, hole(*size), "rise", mean=MEAN), rise_blur(image, mean))


@pytest.mark.parametrize("kind", ["inpaint", "road"])
def test_inpainting_keeps_what_is_kept_and_reads_nothing_else(kind):
    image, removed = rand(3, 30, 30), hole(30, 30)
    changed = torch.where(removed, 1 - image, image)
    one, two = fill(image, removed, kind), fill(changed, removed, kind)
    assert torch.equal(one, two)
    kept = ~removed.expand_as(image)
    assert torch.equal(one[kept], image[kept]) and not torch.equal(one, image)
    flat = torch.full((3, 30, 30), 0.6)
    assert (fill(flat, removed, kind) - flat).abs().max() < 0.06  # 8 bits, noise of 0.01


@pytest.mark.parametrize("kind", ["inpaint", "road"])
def test_nothing_or_everything_removed(kind):
    image = rand(3, 12, 12)
    nothing, everything = torch.zeros(1, 12, 12) > 0, torch.zeros(1, 12, 12) == 0
    assert torch.equal(fill(image, nothing, kind), image)
    colour = image.mean((1, 2), keepdim=True)
    assert (fill(image, everything, kind) - colour).abs().max() < 0.06


def test_road_is_the_imputation():
    image, removed = rand(3, 20, 20), hole(20, 20)
    assert torch.equal(
        fill(image, removed, "road", seed=3), impute(image[None], removed[None], seed=3)[0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "grey"}, "kind: got 'grey'"),
        ({"kind": "mean"}, "mean"),
        ({"kind": "rise"}, "mean: got None; kind='rise' needs the mean colour"),
        ({"image": torch.zeros(1, 3, 8, 8)}, "image"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "image"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"image": torch.zeros(3, 8, 8), "removed": hole(8, 8), "kind": "black"}
    with pytest.raises(ValueError, match=message):
        fill(**{**arguments, **change})
