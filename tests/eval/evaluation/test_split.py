"""The split of a study: what was fitted or chosen on is not scored, however it is called."""

import hashlib
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch

from xattn.eval.evaluation.split import LeakError, Split
from xattn.eval.studies.study_photos import Photo
from xattn.photos.sources import open_photos
from xattn.runtime.files import file_sha256


class Columns(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


@pytest.fixture
def paths(tmp_path):
    made = [tmp_path / f"{name}.png" for name in "abc"]
    for path in made:
        path.write_bytes(path.name.encode())
    return made


@pytest.mark.parametrize(("first", "used"), [("fit", "fitted on"), ("choose", "chosen by")])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_what_was_fitted_or_chosen_on_is_not_scored(first, used, late):
    split = Split("trial")
    parts = [(first, ["a", "b"]), ("score", ["b", "c"])]
    (name, part), (then, leak) = reversed(parts) if late else parts
    assert getattr(split, name)(part) is part
    with pytest.raises(
        LeakError, match=f"^split: trial scores 1 of the items that it was {used}, such as b"
    ):
        getattr(split, then)(leak)


def test_parts_that_share_nothing_pass_and_one_may_choose_by_what_was_fitted():
    split = Split("trial")
    split.fit([1, 2])
    split.choose([2, 3])
    split.score([4])
    split.score([4, 5])


def test_a_photo_is_its_bytes_whatever_it_is_called(paths, tmp_path):
    copy = tmp_path / "copy.png"
    shutil.copy(paths[0], copy)
    link = tmp_path / "link.png"
    link.symlink_to(paths[0])
    forms = [
        [paths[0]], [copy], [link], open_photos([paths[0]]),
        [Photo("a", paths[0], 3, file_sha256(paths[0]))],
    ]  # fmt: skip
    for form in forms:
        split = Split("trial")
        split.fit(form)
        for other in forms:
            with pytest.raises(LeakError, match="fitted on"):
                split.score(other)
        split.score(paths[1:])
    missing = Split("trial")
    missing.fit([tmp_path / "gone.png"])
    missing.score(paths)
    with pytest.raises(LeakError, match="gone.png"):
        missing.score([tmp_path / "gone.png"])


def test_tensors_are_told_apart_by_their_values():
    images = torch.arange(12.0).view(3, 2, 2)
    split = Split("trial")
    columns = Columns(images[:2], torch.zeros(2))
    assert split.fit(columns) is columns
    split.score(images[2:])
    split.score(images[:2].double())
    with pytest.raises(LeakError, match=r"a tensor of shape \(2, 2\)"):
        split.score(images[1:].clone())
    low = Split("trial")
    low.fit(images[:2].bfloat16())
    with pytest.raises(LeakError):
        low.score(images[1:].bfloat16())


def test_numbers_and_slices_stand_for_items(paths):
    split = Split("trial", paths)
    split.fit(np.array([0, 2]))
    split.score(slice(1, 2))
    for leak in ([2], range(3), slice(2, None), [paths[0]]):
        with pytest.raises(LeakError):
            split.score(leak)
    seeds = Split("trial")
    seeds.fit([7])
    with pytest.raises(LeakError, match="such as 7"):
        seeds.score([np.int64(7)])


def test_folds_are_apart_and_the_record_holds_all(tmp_path):
    plain = Split("trial")
    first, second = plain.fold(["a", "b"]), plain.fold(["a", "b"])
    first.fit([0])
    assert not plain.has_scored
    first.score([1])
    second.fit([1])
    second.score([0])
    assert plain.has_scored
    with pytest.raises(LeakError):
        second.score([1])
    digest = {name: hashlib.sha256(repr(name).encode()).hexdigest() for name in "ab"}
    folds = plain.record()["folds"]
    assert folds[0] == {
        "fitted": {"count": 1, "sha256": digest["a"]},
        "scored": {"count": 1, "sha256": digest["b"]},
    }
    assert folds[1]["fitted"] == folds[0]["scored"]
    plain.write(tmp_path / "split.json")
    assert '"study": "trial"' in (tmp_path / "split.json").read_text()
