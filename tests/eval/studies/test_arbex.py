"""ARBEx and generated faces: limit cases of window attention, streams, faces, refusals."""

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


IMAGE, WINDOWS, LANDMARKS = ((5, 4), (6, 2)), (2, 2), (3, 4)


def model(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"image": IMAGE, "windows": WINDOWS, "landmarks": LANDMARKS}
    options = {**sizes, "width": 8, "dim": 16, "depth": 1, "heads": 2, **options}
    return Arbex(3, **options).double().eval()


def maps(count=3):
    image = [draw(count, c, side, side, seed=i) for i, (c, side) in enumerate(IMAGE)]
    sizes = zip(LANDMARKS, WINDOWS, strict=True)
    return image, [draw(count, c, side, side, seed=5 + i) for i, (c, side) in enumerate(sizes)]


def turned(of_scales):
    return [x.flip(0) for x in of_scales]


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


@pytest.mark.parametrize("landmarks", [LANDMARKS, ()])
def test_a_network_reads_its_streams_and_nothing_of_the_batch(landmarks):
    net = model(landmarks=landmarks, reliability={"anchors": 2})
    image, points = maps()
    with torch.no_grad():
        logits, p = net(image, points), net.balanced(image, points).probabilities
        one = net.balanced([x[1:2] for x in image], [x[1:2] for x in points]).probabilities
        torch.testing.assert_close(one, p[1:2])
        torch.testing.assert_close(p.sum(1), torch.ones(3).double())
        assert not torch.allclose(net(turned(image), points), logits)
        assert torch.allclose(net(image, turned(points)), logits) == (not landmarks)
        if not landmarks:
            torch.testing.assert_close(net(image), logits)


def test_a_gamma_of_zero_leaves_the_image_alone():
    net = model(gamma=0.0)
    image, points = maps()
    torch.testing.assert_close(net(image, points), net(image, turned(points)))


def test_without_trust_the_prediction_is_the_networks_own():
    net = model(reliability={"anchors": 2})
    image, points = maps()
    plain = net(image, points).softmax(1)
    torch.testing.assert_close(net.balanced(image, points, 0.0).probabilities, plain)
    labels, weights = torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 0.5]).double()
    own = torch.nn.functional.cross_entropy(net(image, points), labels, weights)
    torch.testing.assert_close(net.loss(image, points, labels, 0.0, weights), own)


@pytest.mark.parametrize("landmarks", [LANDMARKS, ()])
def test_gradients_reach_every_parameter(landmarks):
    net = model(landmarks=landmarks, reliability={"anchors": 2}, dropout=0.0).train()
    net.loss(*maps(), torch.tensor([0, 2, 1]), 0.5).backward()
    for name, parameter in net.named_parameters():
        unused = not landmarks and "query_norm" in name
        assert unused or parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------------- faces


def test_a_face_depends_on_its_seed_and_number_alone():
    few, many = draw_faces(3, seed=2), draw_faces(6, seed=2)
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a, b[:3])
    assert not torch.equal(few.images, draw_faces(3, seed=3).images)
    assert few.images.shape == (3, 1, 32, 32) and few.landmarks.shape == (3, len(POINTS), 2)
    assert draw_faces(1, size=64).images.shape == (1, 1, 64, 64)


def test_expressions_can_be_asked_for():
    asked = [2, 2, 5, 0, 1, 1, 3, 4]
    found = draw_faces(8, seed=1, blends=0.5, false_labels=0, truth=asked)
    assert found.truth.tolist() == found.labels.tolist() == asked
    free = draw_faces(8, seed=1, blends=0.5, false_labels=0)
    again = draw_faces(8, seed=1, blends=0.5, false_labels=0, truth=free.truth.tolist())
    assert torch.equal(free.images, again.images)


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
        (lambda: model()(maps()[0]), r"^landmark_maps: got None of each image; give \[\(3, 2, 2\)"),
        (lambda: model()(maps()[1], maps()[1]), r"^image_maps: got \[\(3, 2, 2\), \(4, 2, 2\)\]"),
        (lambda: model(reliability={"anchor": 2}), "^reliability: got 'anchor'"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
