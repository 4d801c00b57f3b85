"""3-D mask networks on volumes: masks on their own voxels, gates, and their command."""

import numpy as np
import pytest
import torch

from xattn.cli import main
from xattn.models.agunet import AGUNet
from xattn.models.masks import save_network
from xattn.models.volumes import explain_volume, resample, segment, volume_gates
from xattn.packs.reader import load_pack
from xattn.photos.volumes import Volume, write_volume

pytest.importorskip("nilearn", reason="the extra xattn[volumes] is not installed")


def made(**options):
    torch.manual_seed(0)
    return AGUNet(3, filters=(4, 6), norm="instance", **options).eval()


def volume(size=(12, 14, 10), spacing=(4.0, 4.0, 4.0)):
    values = np.random.default_rng(0).random(size).astype(np.float32)
    return Volume(values, np.diag([*spacing, 1.0]))


class Copy(torch.nn.Module):
    """The logit of a voxel is its value."""

    def forward(self, x):
        return x


def test_a_mask_has_the_voxels_of_its_volume_whatever_their_spacing():
    smooth = volume((16, 12, 24), (2.0, 2.0, 1.0))
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in smooth.values.shape), indexing="ij")
    smooth = smooth._replace(values=(0.5 + 0.25 * sum(grid) / 3).astype(np.float32))
    found = segment(Copy(), smooth, spacing=2, tile=(8, 8, 8))
    assert found.values.shape == smooth.values.shape
    inside = (slice(2, -2),) * 3
    expected = 1 / (1 + np.exp(-smooth.values))
    assert abs(found.values[inside] - expected[inside]).max() < 0.02


def test_a_volume_with_the_spacing_is_taken_as_it_is():
    same = volume()
    assert resample(same, 4.0) is same
    assert resample(volume(spacing=(2.0, 4.0, 8.0)), 4.0).spacing == (4, 4, 4)
    with pytest.raises(ValueError, match="^spacing: got 0; give millimetres above 0"):
        resample(same, 0)
    with pytest.raises(ValueError, match="^spacing: got 100 mm .*; give a larger volume"):
        resample(same, 100)


@pytest.mark.parametrize("size", [(1, 3, 2), (5, 7, 9)])
def test_odd_and_tiny_volumes(size):
    assert segment(made(), volume(size)).values.shape == size


def test_gates_of_one_tile_are_psi_times_the_gradient():
    net, image = made().double(), torch.rand(1, 8, 8, 8, dtype=torch.float64)
    net.heads[0].bias.data.fill_(1.0)  # so that there is a mask
    logits, gates = volume_gates(net, image, (8, 8, 8), level=0)
    forward, e = net.gates[0].forward, 1e-6
    before = logits.clamp(min=0).sum()
    net.gates[0].forward = lambda g, x: (1 - e) * forward(g, x)
    after = net(image[None])[0, 0].clamp(min=0).sum()
    torch.testing.assert_close((before - after) / e, gates.sum(), rtol=1e-4, atol=1e-8)


def test_without_a_mask_gates_are_zero():
    net = made()
    net.heads[0].bias.data.fill_(-50.0)
    assert volume_gates(net, torch.rand(1, 9, 8, 8), (4, 4, 4))[1].abs().max() == 0


def test_a_pack_of_axial_slices(tmp_path, capsys):
    about = {"spacing": 4, "tile": [8, 8, 8], "classes": ["nothing", "lesion"]}
    folder = save_network(made(), tmp_path / "net", about)
    scan = write_volume(tmp_path / "scan.nii.gz", volume((24, 28, 10), (2.0, 2.0, 4.0)))
    command = ["explain", str(scan), "-b", str(folder)]
    output = ["--output", str(tmp_path / "pack")]
    assert main([*command, "--explainers", "gates", "--options", "gates.level=0", *output]) == 0
    pack = load_pack(tmp_path / "pack")
    assert [item.image_id for item in pack][:2] == ["scan-z000", "scan-z001"]
    assert pack[0].target_name == "lesion" and pack[0].map.shape[0] in (14, 15)
    assert pack[0].photo().size == pack[0].map.shape[::-1]
    direct = explain_volume(folder, scan, level=0)
    np.testing.assert_array_equal(direct[3].map, pack[3].map)
    assert main([*command, "--explainers", "gradcam", *output]) != 0
    assert "is a 3-D network; give a .nii or .nii.gz file and --explainers gates" in (
        capsys.readouterr().err
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="^net: it has no gates for volumes; give one with dims=3"):
        volume_gates(made(gates=False), torch.rand(1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"^level: got 1; the network has the levels 0\.\.0"):
        volume_gates(made(), torch.rand(1, 8, 8, 8), level=1)
