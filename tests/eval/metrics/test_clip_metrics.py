"""Metrics of clips: masks in time and space, by their definition and as those of photos for one frame."""

import pytest
import torch
from clip_networks import backbone, clips

from xattn import evaluate, load_backbone
from xattn.eval.metrics import GROUPS
from xattn.eval.metrics.curves import InsertionDeletionMetric
from xattn.eval.metrics.masking import MaskingMetric
from xattn.eval.metrics.measure import measure
from xattn.eval.metrics.registry import create_metric
from xattn.eval.studies.clip_cues import PLACES, drawn

MEAN = (0.5, 0.4, 0.3)


def colour_sums(images):
    """Logits (b, 2) of photos (b, 3, H, W) and of clips of one frame alike."""
    return torch.stack([images[:, 0].flatten(1).sum(1), images[:, 1].flatten(1).sum(1)], 1) / 50


@pytest.mark.parametrize("fill", ["black", "mean", "blur", "rise", "noise"])
def test_one_frame_is_measured_as_a_photo(fill):
    draw = torch.Generator().manual_seed(0)
    x, maps = torch.rand(3, 3, 20, 18, generator=draw), torch.rand(3, 1, 5, 6, generator=draw)
    for metric in (
        MaskingMetric(masked_value=fill, mean=MEAN),
        InsertionDeletionMetric(steps=6, deletion_fill=fill, insertion_fill=fill, mean=MEAN),
    ):
        expected = measure(metric, colour_sums, x, maps, 0)
        found = measure(metric, colour_sums, x[:, :, None], maps[:, :, None], 0)
        for column, values in expected.items():
            torch.testing.assert_close(found[column], values, rtol=1e-4, atol=1e-4)


def test_average_drop_hides_in_time_and_space():
    network = backbone("own")
    x = clips(network)
    maps = torch.rand(2, 1, 3, 7, 5)
    (ad,) = measure(
        MaskingMetric(levels=(1.0,), metrics=("AD",)), network, x, maps, torch.tensor([0, 3])
    ).values()
    grey = (maps - maps.amin((2, 3, 4), True)) / (
        maps.amax((2, 3, 4), True) - maps.amin((2, 3, 4), True)
    )
    grey = torch.nn.functional.interpolate(grey, x.shape[2:], mode="trilinear", align_corners=False)
    rows = torch.arange(2), torch.tensor([0, 3])
    p, q = (network.probabilities(network.logits(images))[rows] for images in (x, x * grey))
    torch.testing.assert_close(ad, 100 * (p - q).clamp_min(0) / p, rtol=1e-4, atol=1e-5)


def test_the_frame_that_decides_is_deleted_first():
    x, classes, truth = drawn(range(4))

    def redness(images):  # and blueness of the 25 reddest and bluest pixels of all frames
        return 8 * (images - 0.5).flatten(2).topk(25).values.mean(2)[:, [0, 2]]

    metric = InsertionDeletionMetric(steps=16, insertion_fill="black")
    right = measure(metric, redness, x, truth[:, None].float(), classes)
    noise = torch.rand(4, 1, *PLACES)
    chance = measure(metric, redness, x, noise, classes)
    for (column, found), other in zip(right.items(), chance.values(), strict=True):
        better = found - other if column.metric == "insertion" else other - found
        assert bool((better > 0.05).all()), (column, found, other)


def test_evaluate_takes_clips_as_tensors_and_agrees_with_measure():
    network = backbone("own")
    x = clips(network, 3)
    metrics = ["masking", InsertionDeletionMetric(steps=4)]
    found = evaluate(
        network, {"gradcam": "hirescam", "random": "random"}, x, metrics=metrics, progress=False
    )
    explained = found.methods["random"]
    from xattn.explainers import create_explainer

    targets = network.logits(x).argmax(1)
    maps = create_explainer("random", network).attribute(x, targets)
    expected = measure(MaskingMetric(), network, x, maps, targets)
    for column, values in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(explained.values[column]), values, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_other_metrics_say_in_one_line_that_they_are_of_photos(name):
    network = backbone("own")
    metric = create_metric(name, mean=MEAN)
    if metric.clips:
        assert name in ("masking", "insertion-deletion")
        return
    with pytest.raises(ValueError, match="photos, but the network reads clips") as error:
        measure(metric, network, clips(network), torch.rand(2, 1, 3, 7, 5), 0)
    assert "\n" not in str(error.value)


def test_what_is_of_photos_alone_is_refused():
    network = backbone("own")
    metric = InsertionDeletionMetric(steps=4, deletion_fill="inpaint")
    with pytest.raises(ValueError, match="kind: got 'inpaint', which needs photos"):
        measure(metric, network, clips(network), torch.rand(2, 1, 3, 7, 5), 0)
    with pytest.raises(ValueError, match="photos, but the network reads clips"):
        evaluate(
            network, {"random": "random"}, clips(network), metrics="complexity", progress=False
        )
    photo = load_backbone("test_resnet", None, input_size=32)
    with pytest.raises(ValueError, match=r"give \(3, H, W\)"):
        evaluate(photo, {"random": "random"}, torch.rand(1, 3, 4, 32, 32), progress=False)
