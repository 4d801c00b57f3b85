"""Perturbation explainers: p(class | x o m + fill o (1 - m)) for many masks m of one image x.

RISE, occlusion, LIME and KernelSHAP differ in their masks and in how they use the scores. All of them use
micro-batches of one fixed shape, scores in float64, and the same fills and superpixels.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from xattn.explainers.base import ImageByImage
from xattn.runtime.memory import ForwardBatches
from xattn.runtime.option_checks import Condition, Count, Positive


@dataclass(kw_only=True, eq=False, repr=False)
class PerturbationExplainer(ImageByImage):
    """Base class of explainers that score many masked copies of each image.

    Scores are the probabilities of the explained classes, so the map of a class also depends on
    the other classes. All classes are explained from the same passes. ``forwards`` counts the masked
    copies of an image, but not the copies that pad the last micro-batch.

    Args:
        fill: what replaces removed pixels: ``"black"`` (0 in [0, 1] pixels) or ``"mean"`` (the mean
            colour of the backbone's preprocessing, which is 0 after normalisation).

    Example:
        >>> import torch, xattn
        >>> from xattn.explainers import PerturbationExplainer
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("occlusion", net)
        >>> isinstance(method, PerturbationExplainer)
        True
    """

    fill: Literal["black", "mean"] = "black"
    perturbs = True
    clips = True

    def _scores(
        self,
        image: Tensor,
        classes: Tensor,
        count: int,
        masks: Callable[[Tensor], Tensor],
        use: Callable[[Tensor, Tensor], None] | None = None,
        logits: bool = False,
    ) -> Tensor:
        """Probabilities (count, M) float64, on the CPU, of ``count`` masked copies of an image.

        Args:
            image: (3, H, W), or a clip (3, T, H, W) with masks (n, 1, T, H, W).
            classes: (M,).
            count: how many masks there are.
            masks: indices (n,) -> masks (n, 1, H, W) in [0, 1], where 1 keeps the pixel; called once per
                micro-batch, so that only one micro-batch of masks is in memory.
            use: receives the masks (n, 1, H, W) and scores (n, M) of each micro-batch.
            logits: return logits instead of probabilities.
        """
        # As few micro-batches as max_forward_batch allows, all of one size: float32 networks give
        # slightly different results for another batch shape, and padding the last one costs time.
        steps = -(-count // self.max_forward_batch)
        batches = ForwardBatches(-(-count // steps))
        fill = self.backbone.mean[0].to(image) if self.fill == "mean" else None

        def step(index: Tensor) -> Tensor:
            repeats = torch.arange(batches.size, device="cpu").clamp_max(len(index) - 1)
            mask = masks(index[repeats])
            keep = mask.to(image.dtype)
            images = image * keep
            if fill is not None:
                images.addcmul_(fill, 1 - keep)
            scores = self.backbone.logits(images)
            scores = scores.double() if logits else self.backbone.probabilities(scores)
            scores = scores[: len(index), classes].cpu()
            if use is not None:
                use(mask[: len(index)], scores)
            return scores

        scores = torch.cat(batches.run(step, torch.arange(count, device="cpu")))
        if batches.halved:
            self.max_forward_batch = batches.size
        return scores

    def _generator(self, *key: object) -> np.random.Generator:
        """A generator that depends only on the explainer's name, the seed and ``key``."""
        digest = hashlib.sha256(":".join(map(str, (self.name, self.seed, *key))).encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


@dataclass(kw_only=True, eq=False, repr=False)
class SuperpixelExplainer(PerturbationExplainer):
    """Base class of explainers that fit coefficients of superpixels to the scores of images in which some
    superpixels are removed.

    Maps are (B, 1, H, W): every pixel has the coefficient of its superpixel, which is not divided by
    the superpixel's area. The map of an image with a single superpixel is constant (SLIC merges pure
    noise into one).

    Args:
        samples: number of masked copies of an image, including the clean image.
        n_segments: requested number of superpixels; SLIC returns approximately this number.
        compactness: SLIC's weight of distance relative to colour; higher values give squarer
            superpixels.
        fill: see :class:`PerturbationExplainer`.
    """

    samples: Annotated[int, Condition(lambda n: n >= 2, "an int of at least 2")] = 500
    n_segments: Count = 50
    compactness: Positive = 10.0
    forwards: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forwards = self.samples

    @abstractmethod
    def _coalitions(self, segments: int) -> Tensor:
        """Which superpixels each masked copy keeps, bool (T, segments)."""

    @abstractmethod
    def _coefficients(self, kept: Tensor, scores: Tensor) -> Tensor:
        """Coefficients per superpixel and class, (segments, M) float64.

        ``kept`` is (T, segments) bool, ``scores`` (T, M) float64.
        """

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        labels = superpixels(image, self.n_segments, self.compactness)
        kept = self._coalitions(int(labels.max()) + 1)
        flat, kept_on_device = labels.flatten().to(image.device), kept.to(image)

        def masks(index: Tensor) -> Tensor:
            rows = kept_on_device[index.to(image.device)]
            return rows[:, flat].view(-1, 1, *labels.shape)

        scores = self._scores(image, classes, len(kept), masks)
        return self._coefficients(kept, scores)[labels].movedim(-1, 0).to(image.device)


def superpixels(image: Tensor, n_segments: int = 50, compactness: float = 10.0) -> Tensor:
    """SLIC superpixels of an image (3, H, W) in [0, 1]: labels (H, W) int64, 0 .. M - 1, on the CPU; for a
    clip (3, T, H, W), supervoxels (T, H, W).

    They are computed with scikit-image's SLIC (Achanta et al., TPAMI 2012), in CIELAB and with
    connected superpixels. M is close to ``n_segments`` on photos and may be 1.
    """
    from skimage.segmentation import slic  # imported late: it loads scipy.ndimage

    pixels = image.detach().double().cpu().movedim(0, -1).clamp(0, 1).numpy()
    labels = slic(pixels, n_segments=n_segments, compactness=compactness, start_label=0)
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1].reshape(labels.shape)).long()
