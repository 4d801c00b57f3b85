"""Evaluating a target that is no class: its own score in every metric, and in the protocol's id."""

import pytest
import torch
from PIL import Image
from small_networks import made

from xattn import Target, create_explainer, load_pack
from xattn.backbone.scored import scored
from xattn.eval import Comparison, Protocol, compare, evaluate

METRICS = ("masking", "insertion-deletion", "road")


@pytest.fixture(scope="module")
def backbone():
    return made("vit")


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def rows(backbone):
    return {
        "gradcam": create_explainer("gradcam", backbone),
        "rise": create_explainer("rise", backbone, masks=6),
    }


def test_the_probability_of_a_class_as_target_has_the_metrics_of_the_class(backbone, images):
    options = {"metrics": METRICS, "progress": False}
    own = evaluate(backbone, {"rise": rows(backbone)["rise"]}, images, target=3, **options)
    p = Target(lambda z: z.double().softmax(1)[:, 3], name="p of 3", p="probability")
    found = evaluate(backbone, {"rise": rows(backbone)["rise"]}, images, target=p, **options)
    for column, values in own.methods["rise"].values.items():
        assert found.methods["rise"].values[column] == pytest.approx(values, abs=1e-4), column.key
    assert [image.p for image in found.images] == pytest.approx([i.p for i in own.images])


def test_the_protocol_says_what_was_scored(backbone, images):
    ids = set()
    for p in ("value", "sigmoid"):
        for function in (lambda z: z[:, 1] - z[:, 2], lambda z: z[:, 1] - z[:, 0]):
            target = Target(function, name="contrast", p=p)
            found = evaluate(
                backbone, rows(backbone), images, target=target, metrics=["road"], progress=False
            )
            protocol = found.protocol
            assert protocol.score == p and protocol.target.startswith("contrast ")
            assert protocol.class_policy == "given"
            assert Protocol.from_dict(protocol.to_dict() | {"id": protocol.id}) == protocol
            assert "'contrast " in protocol.explained
            ids.add(protocol.metric_id("ROAD", None, {}))
    assert len(ids) == 4


def test_protocols_without_a_target_are_what_they_were():
    assert "target" not in Protocol().to_dict()
    assert Protocol().id == Protocol.from_dict(Protocol().to_dict()).id


def test_the_score_is_the_number_itself_or_its_sigmoid(backbone, images):
    with torch.no_grad():
        z = backbone.logits(images)
    difference = (z[:, 1] - z[:, 2]).double()
    for p, expected in (("value", difference), ("sigmoid", difference.sigmoid())):
        target = Target(lambda z: z[:, 1] - z[:, 2], p=p)
        found = evaluate(
            backbone, rows(backbone), images, target=target, metrics=["road"], progress=False
        )
        assert [image.p for image in found.images] == pytest.approx(expected.tolist(), abs=1e-5)


def test_numbers_of_any_size_have_no_average_drop(backbone, images):
    with pytest.raises(ValueError, match=r"^score: AD, ADD and AG need probabilities.*p='sigmoid'"):
        evaluate(backbone, rows(backbone), images, target=lambda z: z[:, 1], progress=False)


def test_one_class_an_image_is_a_target(backbone, images):
    classes = torch.tensor([1, 2, 3])
    found = evaluate(
        backbone, rows(backbone), images, target=classes, metrics=["road"], progress=False
    )
    assert [image.target for image in found.images] == [1, 2, 3]


def test_explainers_of_ones_own_need_to_be_made_for_the_view(backbone, images):
    class Mine:
        def attribute(self, inputs, target):
            return inputs.mean(1, keepdim=True)

    target = Target(lambda z: z[:, 1])
    with pytest.raises(ValueError, match=r"^target: explainer 'mine' comes from outside xattn"):
        evaluate(backbone, {"mine": Mine()}, images, target=target, metrics=["road"])
    view = scored(backbone, target)
    found = evaluate(view, {"mine": Mine()}, images, metrics=["road"], progress=False)
    assert found.protocol.score == "value"


def test_a_state_belongs_to_its_target(backbone, images, tmp_path):
    options = {"metrics": ["road"], "progress": False, "state": tmp_path / "state.sqlite"}
    evaluate(backbone, rows(backbone), images, target=lambda z: z[:, 1], **options)
    again = evaluate(backbone, rows(backbone), images, target=lambda z: z[:, 1], **options)
    assert again.cost["images_scored"] == 0
    with pytest.raises(ValueError, match=r"^state: .*protocol"):
        evaluate(backbone, rows(backbone), images, target=lambda z: z[:, 2], **options)


def test_compare_explains_a_target(backbone, tmp_path):
    for i in range(2):
        Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / f"{i}.png")
    said = []
    target = Target(lambda z: z[:, 1] - z[:, 2], name="one rather than two")
    job = Comparison(
        backbone=backbone,
        explainers=("gradcam", "generic_relevance"),
        metrics=("direct", "sensitivity"),
        target=target,
    )
    results, _ = compare(
        job, tmp_path, tmp_path / "out", progress=False, say=lambda line: said.append(str(line))
    )
    assert results.protocol.target.startswith("one rather than two")
    assert any(line.startswith("left out masking: score") for line in said)
    assert "one rather than two" in (tmp_path / "out" / "leaderboard.md").read_text()
    pack = load_pack(tmp_path / "out" / "pack")
    assert {e.target_name for e in pack} == {"one rather than two"}
