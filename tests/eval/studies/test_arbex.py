"""ARBEx and generated faces: limit cases of window attention, streams, reliability, faces, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xattn.eval.studies.faces import (
    EXPRESSIONS,
    OF_EXPRESSION,
    POINTS,
    SHAPE,
    draw_faces,
    landmarks_of,
)
from xattn.eval.studies.models.arbex import Arbex, WindowCrossAttention


def cross(width=8, window=2, heads=2, gamma=1.0):
    torch.manual_seed(0)
    return WindowCrossAttention(width, window, heads, gamma).double()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(seed=0, **options):
    torch.manual_seed(seed)
    options = {"widths": (8, 8), "dim": 16, "depth": 1, "heads": 2, **options}
    return Arbex(3, (0, 0, 1, 2), **options).double().eval()


def faces(count=3):
    points = torch.rand(count, 4, 2, generator=torch.Generator().manual_seed(5)).double()
    return draw(count, 1, 32, 32), points


# ---------------------------------------------------------------------- window attention


def test_window_attention_is_a_loop_over_windows_and_heads():
    layer, x, queries = cross(), draw(2, 8, 4, 4), draw(2, 8, 2, 2, seed=2)
    found = layer(x, queries)
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for b in range(2):
        asked = layer.query_norm(torch.stack([queries[b, :, i, j] for i, j in cells]))
        for top in (0, 2):
            for left in (0, 2):
                own = torch.stack([x[b, :, top + i, left + j] for i, j in cells])
                k, v = layer.key_value(layer.norm(own)).chunk(2, 1)
                q, y = layer.query(asked), torch.zeros(4, 8, dtype=torch.float64)
                for h in range(2):
                    part = slice(4 * h, 4 * h + 4)
                    for a, (i, j) in enumerate(cells):
                        scores = [
                            q[a, part] @ k[c, part] / 2 + layer.bias[(i - m + 1) * 3 + j - n + 1, h]
                            for c, (m, n) in enumerate(cells)
                        ]
                        y[a, part] = torch.stack(scores).softmax(0) @ v[:, part]
                own = own + layer.gammas[0] * layer.out(y)
                own = own + layer.gammas[1] * layer.mlp(own)
                for a, (i, j) in enumerate(cells):
                    torch.testing.assert_close(found[b, :, top + i, left + j], own[a])


def test_a_gamma_of_zero_is_the_identity_and_windows_do_not_see_each_other():
    x, queries = draw(2, 8, 4, 4), draw(2, 8, 2, 2, seed=2)
    assert torch.equal(cross(gamma=0.0)(x, queries), x)
    layer, other = cross(), x.clone()
    other[:, :, :2, :2] += 1
    a, b = layer(x, queries), layer(other, queries)
    assert torch.equal(a[:, :, 2:], b[:, :, 2:]) and not torch.allclose(a[:, :, :2], b[:, :, :2])
    swapped = torch.cat([x[:, :, 2:], x[:, :, :2]], 2)
    torch.testing.assert_close(layer(swapped, queries), torch.cat([a[:, :, 2:], a[:, :, :2]], 2))


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize("streams", ["both", "image", "landmarks"])
def test_streams_read_what_their_name_says_and_nothing_of_the_batch(streams):
    net = model(streams=streams, reliability={"anchors": 2})
    images, points = faces()
    with torch.no_grad():
        logits, p = net(images, points), net.balanced(images, points).probabilities
        one = net.balanced(images[1:2], points[1:2]).probabilities
        torch.testing.assert_close(one, p[1:2])
        torch.testing.assert_close(p.sum(1), torch.ones(3).double())
        assert torch.allclose(net(images.flip(0), points), logits) == (streams == "landmarks")
        assert torch.allclose(net(images, points.flip(0)), logits) == (streams == "image")
    if streams == "image":
        torch.testing.assert_close(net(images), logits)
    if streams == "landmarks":
        torch.testing.assert_close(net(None, points), logits)


def test_a_gamma_of_zero_leaves_the_image_alone():
    net = model(gamma=0.0)
    images, points = faces()
    torch.testing.assert_close(net(images, points), net(images, points.flip(0)))


def test_without_trust_the_prediction_is_the_networks_own():
    net = model(reliability={"anchors": 2})
    images, points = faces()
    plain = net(images, points).softmax(1)
    torch.testing.assert_close(net.balanced(images, points, 0.0).probabilities, plain)
    labels = torch.tensor([0, 2, 1])
    own = torch.nn.functional.cross_entropy(net(images, points), labels)
    torch.testing.assert_close(net.loss(images, points, labels, 0.0), own)


@pytest.mark.parametrize("streams", ["both", "image", "landmarks"])
def test_gradients_reach_every_parameter(streams):
    net = model(streams=streams, reliability={"anchors": 2}, dropout=0.0)
    net.loss(*faces(), torch.tensor([0, 2, 1]), 0.5).backward()
    for name, parameter in net.named_parameters():
        unused = streams != "both" and "query_norm" in name
        assert unused or parameter.grad.abs().max() > 0, name


def test_landmark_maps_are_gaussians_by_part():
    net = model()
    points = torch.tensor([[[0.5, 0.25], [0.5, 0.25], [0.1, 0.9], [0.75, 0.5]]]).double()
    maps = net.landmark_maps(points, 16)
    assert maps.shape == (1, 3, 16, 16)
    middle = torch.arange(16).double() + 0.5
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    expected = 2 * (-0.5 * ((x - 8) ** 2 + (y - 4) ** 2)).exp()
    torch.testing.assert_close(maps[0, 0], expected)
    row, column = divmod(int(maps[0, 1].argmax()), 16)
    assert (row, column) == (14, 1)


# ---------------------------------------------------------------------- faces


def test_a_face_depends_on_its_seed_and_number_alone():
    few, many = draw_faces(3, seed=2), draw_faces(6, seed=2)
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a, b[:3])
    assert not torch.equal(few.images, draw_faces(3, seed=3).images)
    assert few.images.shape == (3, 1, 32, 32) and few.landmarks.shape == (3, len(POINTS), 2)
    assert draw_faces(1, size=64).images.shape == (1, 1, 64, 64)


def test_shares_of_blends_and_false_labels():
    found = draw_faces(400, seed=1)
    assert abs(float((~found.clear).double().mean()) - 0.35) < 0.08
    assert abs(float((found.labels != found.truth).double().mean()) - 0.1) < 0.05
    assert set(found.truth.tolist()) == set(range(len(EXPRESSIONS)))
    plain = draw_faces(50, seed=1, blends=0, false_labels=0)
    assert plain.clear.all() and torch.equal(plain.labels, plain.truth)
    assert not draw_faces(50, seed=1, blends=1).clear.any()


def test_expressions_move_the_landmarks_as_their_names_say():
    def of(name):
        brows, eyes, _, mouth, _ = landmarks_of(OF_EXPRESSION[EXPRESSIONS.index(name)])
        corners, middle = mouth[[0, 2], 1].mean(), (mouth[1, 1] + mouth[4, 1]) / 2
        slant = (brows[0, 1] - brows[2, 1]) + (brows[3, 1] - brows[5, 1])
        return {
            "smile": middle - corners, "slant": slant, "open": eyes[3, 1] - eyes[1, 1],
            "mouth": mouth[4, 1] - mouth[1, 1],
        }  # fmt: skip

    neutral = landmarks_of(np.zeros(len(SHAPE)))
    assert [len(part) for part in neutral[:4]] == [POINTS.count(i) for i in range(4)]
    assert of("happy")["smile"] > 0 > of("sad")["smile"]
    assert of("sad")["slant"] > 0 > of("angry")["slant"]
    assert of("surprised")["open"] > of("disgusted")["open"]
    assert of("surprised")["mouth"] > of("sad")["mouth"]


def test_landmarks_lie_where_the_face_is_drawn():
    found = draw_faces(40, seed=4, size=64)
    mouths = found.landmarks[:, 17:].mean(1)
    dark, all_of = [], []
    for image, (x, y) in zip(found.images[:, 0], mouths.tolist(), strict=True):
        row, column = int(y * 64), int(x * 64)
        dark.append(float(image[row - 1 : row + 2, column - 2 : column + 3].mean()))
        all_of.append(float(image[16:48, 16:48].mean()))
    assert np.mean(dark) < np.mean(all_of) - 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: model()(faces()[0]), r"^landmarks: got None; give \(B, 4, 2\).*streams='image'"),
        (
            lambda: model()(faces()[0], draw(3, 5, 2)),
            r"^landmarks: got \(3, 5, 2\); give \(B, 4, 2\)",
        ),
        (lambda: model()(None, faces()[1]), r"^images: got None; give \(B, 1, 32, 32\)"),
        (lambda: model()(draw(3, 1, 16, 16), faces()[1]), r"^images: got \(3, 1, 16, 16\)"),
        (lambda: model(streams="three"), "^streams: got 'three'"),
        (lambda: model(reliability={"anchor": 2}), "^reliability: got 'anchor'"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
