"""NIfTI volumes: reading, writing, and their axial slices as photos."""

import numpy as np
import pytest

from xattn.explaining.naming import named_photos
from xattn.photos.image_names import is_volume
from xattn.photos.sources import open_photos
from xattn.photos.volumes import Volume, read_volume, write_volume

nibabel = pytest.importorskip("nibabel", reason="the extra xattn[volumes] is not installed")


def written(path, values, affine=None, code=1):
    image = nibabel.Nifti1Image(np.asarray(values, dtype=np.float32), affine)
    if affine is None:
        image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, path)
    return path


def test_what_is_written_comes_back(tmp_path):
    volume = Volume(np.random.rand(3, 4, 5).astype(np.float32), np.diag([2.0, 2, 3, 1]))
    found = read_volume(write_volume(tmp_path / "a.nii.gz", volume))
    np.testing.assert_array_equal(found.values, volume.values)
    assert found.spacing == (2, 2, 3)


def test_axes_are_turned_to_right_front_and_top(tmp_path):
    values = np.random.rand(3, 4, 5).astype(np.float32)
    affine = np.array([[0, 0, -2, 5], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=float)
    found = read_volume(written(tmp_path / "a.nii", values, affine))
    np.testing.assert_array_equal(found.values, values.transpose(2, 0, 1)[::-1])
    assert found.spacing == (2, 1, 1)


def test_slices_are_seen_from_above_bottom_to_top(tmp_path):
    values = np.zeros((4, 6, 5), dtype=np.float32)
    values[0, 5, 1], values[3, 0, 3] = 8, 4  # left front below; right back above
    photos = open_photos(written(tmp_path / "head.nii.gz", values, np.eye(4)))
    assert [photo.name for photo in photos] == ["head-z001", "head-z003"]
    low, high = (np.asarray(photo.load())[..., 0] for photo in photos)
    assert low.shape == (6, 4) and low[0, 0] == 255 and low.sum() == 255
    assert high[5, 3] == 128 and high.sum() == 128
    pairs = named_photos(str(tmp_path / "head.nii.gz"))
    assert [name for name, _ in pairs] == ["head-z001", "head-z003"]


def test_shares_stay_as_they_are(tmp_path):
    values = np.full((2, 2, 1), 0.2, dtype=np.float32)
    values[0, 0] = 0.6
    photos = open_photos(written(tmp_path / "a.nii", values, np.eye(4)))
    assert np.asarray(photos[0].load()).max() == round(0.6 * 255)


@pytest.mark.parametrize("spacing, size", [((1, 3), (3, 15)), ((4, 2), (6, 5)), ((1, 1), (3, 5))])
def test_pixels_of_anisotropic_volumes_are_made_square(tmp_path, spacing, size):
    values = np.random.rand(3, 5, 1) + 0.1
    affine = np.diag([*spacing, 1.0, 1.0])
    assert open_photos(written(tmp_path / "a.nii", values, affine))[0].load().size == size


def test_a_volume_is_known_by_its_name():
    assert is_volume("a/b.nii") and is_volume("B.NII.GZ") and not is_volume("b.nii.png")


def test_photos_of_another_volume_are_described_otherwise(tmp_path):
    values = np.random.rand(3, 3, 3)
    first = open_photos(written(tmp_path / "a.nii", values, np.eye(4))).describe()
    values[1, 1, 1] += 0.1
    other = open_photos(written(tmp_path / "b.nii", values, np.eye(4))).describe()
    assert first["count"] == other["count"] == 3 and first["sha256"] != other["sha256"]


@pytest.mark.parametrize(
    "values, affine, message",
    [
        (
            np.ones((2, 2, 2, 3)),
            np.eye(4),
            r"^volume: .* has shape \(2, 2, 2, 3\); give one with three",
        ),
        (np.ones((2, 2)), np.eye(4), r"^volume: .* has shape \(2, 2\)"),
        (
            np.ones((2, 2, 2)),
            None,
            "^volume: .* has no affine, .*; set one with nibabel's set_sform",
        ),
        (
            np.full((2, 2, 2), np.nan),
            np.eye(4),
            "^volume: .* holds NaN or infinite values; replace",
        ),
        (np.ones((2, 2, 2)), np.eye(4), "^volume: .* is constant; give a volume that shows"),
    ],
)
def test_other_volumes_are_refused(tmp_path, values, affine, message):
    with pytest.raises(ValueError, match=message):
        open_photos(written(tmp_path / "a.nii", values, affine))


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = written(tmp_path / "a.nii.gz", np.random.rand(30, 30, 30), np.eye(4))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="^volume: .* is damaged"):
        open_photos(path)
    path.write_bytes(b"no volume")
    with pytest.raises(ValueError, match="^volume: .* is damaged"):
        open_photos(path)
    with pytest.raises(FileNotFoundError, match="^volume: no file"):
        open_photos(tmp_path / "b.nii")
    with pytest.raises(ValueError, match="^path: got .*; give a name that ends in .nii"):
        write_volume(tmp_path / "b.png", Volume(np.ones((1, 1, 1)), np.eye(4)))


def test_without_nibabel_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(ValueError, match=r'^volume: .*run: pip install "xattn\[volumes\]"'):
        read_volume(tmp_path / "a.nii")
