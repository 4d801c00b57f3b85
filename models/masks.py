"""Networks that predict masks: losses, prediction by tiles, and files of weights.

    loss = mask_loss(net.outputs(images), masks)          foreground Dice + cross-entropy
    probabilities = predict_tiles(net, volume, (32, 32, 32))
    save_network(net, folder);  net = load_network(folder)
    backbone = load_backbone(MaskClassifier(net))         # for explainers

Dice has squared denominators and a smooth term of 1, which keeps it finite where there is no lesion:

    dice(p, t) = (2 sum p t + 1) / (sum p^2 + sum t^2 + 1)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone.weights import load_weight_file
from xattn.models.agunet import AGUNet, Outputs
from xattn.photos.preprocessing import Preprocessing
from xattn.runtime import strict_json
from xattn.runtime.files import check_folder, write_json

KIND = "xattn mask network"


def soft_dice(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Compute the Dice coefficient (B, M) of ``probabilities`` and ``masks``, both (B, M, *size)."""
    p, t = probabilities.flatten(2), masks.flatten(2)
    return (2 * (p * t).sum(2) + 1) / (p.square().sum(2) + t.square().sum(2) + 1)


def mask_loss(found: Outputs, masks: Tensor) -> Tensor:
    """Compute 1 - Dice + cross-entropy, averaged over masks and levels.

    Each level has half the weight of the next finer one, and its target is the mask averaged to its size.

    Raises:
        ValueError: masks and logits differ in shape, or masks have values other than 0 and 1.
    """
    _check_masks(masks, found.logits)
    levels = (found.logits, *found.deep)
    loss = found.logits.new_zeros(())
    for i, logits in enumerate(levels):
        wanted = masks if i == 0 else F.interpolate(masks, logits.shape[2:], mode="area")
        overlap = 1 - soft_dice(logits.sigmoid(), wanted).mean()
        loss = loss + 0.5**i * (overlap + F.binary_cross_entropy_with_logits(logits, wanted))
    return loss / sum(0.5**i for i in range(len(levels)))


def _check_masks(masks: Tensor, logits: Tensor) -> None:
    """Raise a ``ValueError`` unless ``masks`` (B, M, *size) are 0 or 1 on the pixels of ``logits``."""
    if masks.shape != logits.shape:
        raise ValueError(
            f"masks: got shape {tuple(masks.shape)} for logits {tuple(logits.shape)}; give (B, M, *size) "
            f"of the same size"
        )
    if not bool(((masks == 0) | (masks == 1)).all()):
        raise ValueError("masks: got values other than 0 and 1; give binary masks, such as x > 0.5")


def released_dice_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Compute the loss of the authors' program, for comparison.

    The program passes probabilities and one-hot masks (B, K, *size) of all K classes, including the
    background, but divides by K - 1. The loss is therefore clipped to 0 near a correct answer and has no
    gradient there."""
    total = soft_dice(probabilities, masks).sum(1) / (masks.shape[1] - 1)
    return (1 - total).clamp(0, 1 - 1e-10).mean()


# ---------------------------------------------------------------------- tiles


@torch.no_grad()
def predict_tiles(
    net: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: Sequence[int],
    *,
    overlap: float = 0.5,
    sharpness: float = 8.0,
    batch_size: int = 4,
) -> Tensor:
    """Apply ``net`` to overlapping tiles and average the results with Gaussian weights.

    Args:
        net: a function (b, C, *tile) -> (b, M, *tile), for example one that returns logits.
        image: tensor (C, *size).
        tile: the sides of a tile, which may not exceed those of the image.
        overlap: the fraction of its side by which a tile overlaps its neighbours, from 0 to below 1.
        sharpness: the side of a tile in standard deviations of its Gaussian weights.

    Returns:
        The averaged result, (M, *size).

    Raises:
        ValueError: the image contains NaN or infinite values, the tile does not fit, or the overlap is out
            of range.
    """
    sides = tuple(image.shape[1:])
    if len(tile) != len(sides) or any(not 1 <= t <= s for t, s in zip(tile, sides, strict=False)):
        raise ValueError(f"tile: got {tuple(tile)} for a size of {sides}; give at most that size")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: got {overlap}; give a number from 0 to below 1")
    if not bool(torch.isfinite(image).all()):
        raise ValueError("image: holds NaN or infinite values; replace them first")
    weight = _gaussian(tile, sharpness).to(image)
    corners = list(
        itertools.product(*(_starts(s, t, overlap) for s, t in zip(sides, tile, strict=True)))
    )
    total: Tensor | None = None
    weights = image.new_zeros(sides)
    for start in range(0, len(corners), batch_size):
        places = [
            tuple(slice(a, a + t) for a, t in zip(corner, tile, strict=True))
            for corner in corners[start : start + batch_size]
        ]
        made = net(torch.stack([image[(slice(None), *place)] for place in places]))
        if total is None:
            total = made.new_zeros(made.shape[1], *sides)
        for place, part in zip(places, made, strict=True):
            total[(slice(None), *place)] += part * weight
            weights[place] += weight
    assert total is not None
    return total / weights


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    step = max(int(tile * (1 - overlap)), 1)
    return [*range(0, side - tile, step), side - tile]


def _gaussian(tile: Sequence[int], sharpness: float) -> Tensor:
    """The weights of a tile's pixels, at least 0.001 of the largest."""
    weight = torch.ones(())
    for side in tile:
        at = (torch.arange(side) - (side - 1) / 2) * (sharpness / side)
        weight = weight[..., None] * torch.exp(-0.5 * at.square())
    return weight.clamp(min=1e-3 * float(weight.max()))


# ---------------------------------------------------------------------- files


def save_network(net: AGUNet, folder: str | Path, about: dict[str, object] | None = None) -> Path:
    """Write the settings and weights of ``net``; ``about`` is stored with them, for example the threshold
    of its masks."""
    from safetensors.torch import save_file

    folder = Path(folder)
    check_folder(folder)
    state = {name: value.detach().contiguous() for name, value in net.state_dict().items()}
    save_file(state, folder / "network.safetensors")
    record = {"kind": KIND, "settings": net.settings, "about": about or {}}
    write_json(folder / "network.json", record)
    return folder


def is_network_folder(folder: str | Path) -> bool:
    """Return whether ``folder`` was written by :func:`save_network`."""
    return (Path(folder) / "network.json").is_file()


def network_record(folder: str | Path) -> dict[str, Any]:
    """Read the ``settings`` and ``about`` that :func:`save_network` wrote."""
    if not is_network_folder(folder):
        raise ValueError(
            f"folder: {folder} has no network.json; give a folder that save_network wrote"
        )
    path = Path(folder) / "network.json"
    found: dict[str, Any] = strict_json.read(path, "folder", "train the network again")
    return found


def load_network(folder: str | Path) -> AGUNet:
    """Load the network that :func:`save_network` wrote, in eval mode.

    Raises:
        ValueError: ``folder`` contains no such network, or its files are damaged.
    """
    record = network_record(folder)
    try:
        net = AGUNet(**record["settings"])
        net.load_state_dict(load_weight_file(Path(folder) / "network.safetensors"))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"folder: {folder} is damaged ({reason}); train the network again"
        ) from None
    return net.eval()


# ---------------------------------------------------------------------- as a classifier


def load_classifier(folder: str | Path) -> tuple[MaskClassifier, list[str] | None]:
    """Load the network in a folder as a classifier, with the names of its classes if they are stored
    there."""
    net, about = load_network(folder), network_record(folder)["about"]
    gates = about.get("gates")
    choice = None if gates is None else (gates["form"], gates["level"])
    size: tuple[int, int] = tuple(about.get("size", (64, 64)))
    return MaskClassifier(net, size, choice), about.get("classes")


def mask_score(logits: Tensor) -> Tensor:
    """Compute the score (B, M) of each mask: the mean logit of its pixels, or the largest logit if it is
    empty.

    The score is above 0 exactly if the mask is not empty. ``logits`` have shape (B, M, *size)."""
    flat = logits.flatten(2)
    inside = flat > 0
    mean = (flat * inside).sum(2) / inside.sum(2).clamp(min=1)
    return torch.where(inside.any(2), mean, flat.amax(2))


class MaskClassifier(nn.Module):
    """A 2-D mask network used as a classifier, so that it can be explained: the logit of a class is the
    score of its mask.

        backbone = load_backbone(MaskClassifier(net), classes=["nothing", "lesion"])

    With one mask there are two classes, nothing and something; with several masks, each mask is a class.
    It is a :class:`~xattn.backbone.TapModule` whose tap is the bottleneck's feature map. If the network
    reads one channel, images (B, 3, H, W) are averaged over their channels.

    Args:
        size: the size of its input images.
        gate_choice: the form and level of the gates that the explainer ``gates`` shows by default.
    """

    def __init__(
        self,
        net: AGUNet,
        size: tuple[int, int] = (64, 64),
        gate_choice: tuple[str, int] | None = None,
    ) -> None:
        super().__init__()
        if net.dims != 2 or net.channels not in (1, 3):
            raise ValueError(
                "net: got one without dims=2 and 1 or 3 channels; to explain a 3-D network, "
                "use its slices"
            )
        self.net, self.gate_choice = net, gate_choice
        self.tap_names = ["bottleneck"]
        self.preprocessing = Preprocessing(
            input_size=size, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", crop_pct=1.0
        )
        self.gradcam_layer = net.bottleneck

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x)[0]

    def forward_taps(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """Return the scores (B, M), and the bottleneck's feature map."""
        found = self._outputs(x)
        return mask_score(found.logits), (found.deepest,)

    def forward_pixels(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """Return the logits (B, M, H, W) of the pixels, and the bottleneck's feature map."""
        found = self._outputs(x)
        return found.logits, (found.deepest,)

    def forward_gates(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the scores (B, M), and psi at each level from fine to coarse."""
        found = self._outputs(x)
        return mask_score(found.logits), found.gates

    def masks(self, x: Tensor) -> Tensor:
        """Return the masks' probabilities (B, M, H, W)."""
        return self._outputs(x).logits.sigmoid()

    def _outputs(self, x: Tensor) -> Outputs:
        return self.net.outputs(x if self.net.channels == 3 else x.mean(1, keepdim=True))
