"""Random labels: each photo gets those of another, and nothing else changes."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import xattn
from xattn.config import TrainConfig
from xattn.eval.studies.random_labels import (
    RandomOutcomes,
    cycle,
    renamed,
    train_on_random_labels,
)
from xattn.heads import create_head, load_head
from xattn.training import fit
from xattn.training.outcomes import OutcomeBatch, Outcomes

COUNT, PAIRS, CLASSES = 5, 3, 7


def table(kept=None):
    """Outcomes of five photos in memory, one of six in the files; ``kept`` of the classes have logits."""
    rng = np.random.default_rng(0)
    shape = (2 * 6, 1 + 2 * PAIRS)
    numbers = {
        "cells": rng.integers(0, 256, (2 * 6, PAIRS, 28, 28), dtype=np.uint8),
        "logits": rng.normal(size=(*shape, kept or CLASSES)).astype(np.float16),
    }
    if kept:
        classes = [rng.permutation(CLASSES)[:kept] for _ in range(2 * 6)]
        numbers |= {
            "classes": np.array(classes, dtype=np.int32),
            "rest": rng.normal(size=shape).astype(np.float32),
        }
    tensors = {name: torch.from_numpy(values) for name, values in numbers.items()}
    cache = SimpleNamespace(
        count=6, folder=None, rows=lambda at: {n: t[at] for n, t in tensors.items()}
    )
    key = {"crops": 2, "masks": 2 * PAIRS, "task": "multiclass", "classes": CLASSES}
    key |= {"sizes": "even", "players": 0, "empty": False}
    names = [f"{i}.png" for i in range(COUNT)]
    return Outcomes(key, names, [], torch.tensor([0, 1, 3, 4, 5]), cache)


@pytest.mark.parametrize("count", [2, 3, 17])
def test_the_partners_are_one_cycle(count):
    partner, seen, at = cycle(count, 4), [], 0
    for _ in range(count):
        seen.append(at)
        at = int(partner[at])
    assert sorted(seen) == list(range(count)) and at == 0
    assert (partner == cycle(count, 4)).all()


@pytest.mark.parametrize("kept", [None, 4])
@pytest.mark.parametrize("crop", [0, torch.tensor([1, 0, 1])])
def test_classes_are_called_as_another_photos_rank_by_rank(kept, crop):
    plain = table(kept)
    mixed = RandomOutcomes.of(plain, "classes", seed=1)
    index = [4, 0, 2]
    partner = cycle(COUNT, 1)[index].tolist()
    own, other, found = (
        plain.batch(index, crop),
        plain.batch(partner, crop),
        mixed.batch(index, crop),
    )
    assert torch.equal(found.top(4), other.top(4))
    assert torch.equal(found.masks, own.masks) and found.names == own.names
    for name in ("probabilities", "log_odds"):
        there = getattr(found, name)(other.top(4))
        assert torch.allclose(there, getattr(own, name)(own.top(4)), atol=1e-6)


def test_outcomes_are_another_photos_under_its_own_masks():
    plain = table(4)
    mixed = RandomOutcomes.of(plain, "outcomes", seed=2)
    other = plain.batch(cycle(COUNT, 2)[[1, 3]].tolist(), 1)
    found = mixed.batch([1, 3], 1)
    assert torch.equal(found.masks, plain.batch([1, 3], 1).masks)
    assert torch.equal(found.log_odds(other.top(3)), other.log_odds(other.top(3)))


def test_the_random_table_has_a_key_of_its_own_and_subsets():
    plain = table()
    digests = {plain.digest}
    digests |= {
        RandomOutcomes.of(plain, kind, s).digest for kind in ("classes", "outcomes") for s in (0, 1)
    }
    assert len(digests) == 5 and plain.key == table().key
    part = RandomOutcomes.of(plain, "classes").subset([0, 4])
    assert torch.equal(part.batch([0]).top(7), plain.batch([4]).top(7))


def test_a_photo_renamed_as_itself_is_the_same():
    batch = table().batch([0, 1, 2])
    assert isinstance(batch, OutcomeBatch)
    assert torch.equal(renamed(batch, batch).logits, batch.logits)


def test_one_photo_has_no_other():
    with pytest.raises(ValueError, match="^table: got one photo"):
        RandomOutcomes.of(table().subset([1]), "classes")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network, photos, their table, and a head that was trained on it."""
    root = tmp_path_factory.mktemp("labels")
    torch.manual_seed(0)
    backbone = xattn.load_backbone("test_efficientnet", None, input_size=64, num_classes=7)
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        (root / "photos").mkdir(exist_ok=True)
        Image.fromarray(noise).resize((80, 70)).save(root / "photos" / f"{i:02}.png")
    config = TrainConfig("outcomes", epochs=2, batch_size=8, masks=4, workers=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = create_head("evidence", backbone, components=3, hidden=4)
    data, place = root / "photos", root / "table"
    fit(head, backbone, data, config, output=root / "run", table=place, progress=False)
    return backbone, head, data, place


def weights(head):
    return torch.cat([value.flatten().double() for value in head.state_dict().values()])


def test_only_the_labels_differ_from_the_head_s_own_training(trained, tmp_path, monkeypatch):
    backbone, head, data, place = trained
    controls = [
        train_on_random_labels(head, backbone, data, place, kind, tmp_path / kind, progress=False)
        for kind in ("classes", "outcomes")
    ]
    found = [weights(h) for h in (head, *controls)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    again = load_head(tmp_path / "classes" / "head", backbone)
    assert torch.equal(weights(again), found[1])
    monkeypatch.setattr(RandomOutcomes, "of", lambda table, labels, seed: table)
    same = train_on_random_labels(
        head, backbone, data, place, "classes", tmp_path / "same", progress=False
    )
    assert torch.equal(weights(same), found[0])


def test_a_finished_run_is_read(trained, tmp_path, monkeypatch):
    backbone, head, data, place = trained
    arguments = (head, backbone, data, place, "classes", tmp_path / "run")
    first = train_on_random_labels(*arguments, progress=False)
    second = train_on_random_labels(*arguments, progress=False)
    assert torch.equal(weights(first), weights(second))
    with pytest.raises(ValueError, match="output"):
        train_on_random_labels(*arguments, progress=False, seed=1)


def test_a_head_of_another_objective_is_refused(trained, tmp_path):
    backbone, _, data, place = trained
    with pytest.raises(ValueError, match="^head: it was not trained on a table of outcomes"):
        train_on_random_labels(
            create_head("evidence", backbone), backbone, data, place, "classes", tmp_path
        )
