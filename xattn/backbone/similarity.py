"""Similarity to another photo, or to any embedding, as a target: cos(f(x), r) with pooled features f(x).

    explain("photo.jpg", backbone, explainer="gradcam", target=similarity_to("other.jpg"))

f(x) (C,) is the input of the classifier; for an encoder or an image-text model it is the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xattn.backbone.backbone import Backbone
from xattn.backbone.scored import Scored
from xattn.backbone.targets import Reads, Target
from xattn.photos.images import load_image
from xattn.photos.view import prepare


@dataclass(frozen=True, eq=False)
class _Cosine:
    reference: Tensor  # (C,)

    def __call__(self, features: Tensor) -> Tensor:
        if features.shape[1] != len(self.reference):
            raise ValueError(
                f"target: the embedding has {len(self.reference)} numbers, but the features of this "
                f"backbone have {features.shape[1]}; give an embedding of this backbone, or a photo"
            )
        return F.cosine_similarity(features, self.reference.to(features)[None], dim=1)


@dataclass(frozen=True, eq=False)
class Similarity(Target):
    """A target that is bound to a backbone when it is used; see :func:`similarity_to`."""

    reference: Any = None  # a photo, or an embedding (C,)

    def of(self, backbone: Backbone) -> Target:
        reads: Reads = "features" if backbone.has_classes else "logits"
        found = self.reference
        if not isinstance(found, Tensor) or found.ndim != 1:
            found = embed(backbone, found)
        return Target(_Cosine(found), self.name, self.p, reads)


def similarity_to(photo_or_embedding: Any, name: str | None = None) -> Similarity:
    """Create a target: the cosine similarity, in [-1, 1], of the pooled features to those of another photo
    or to an embedding.

    Args:
        photo_or_embedding: a path, a PIL image or a tensor (3, H, W) in [0, 1]; or an embedding (C,).
        name: the name in tables; by default a text such as ``"similarity to other.jpg"``.

    Raises:
        ValueError: if a tensor has the wrong shape, or an embedding is zero or not finite.

    Example:
        >>> import torch, xattn
        >>> from xattn import similarity_to
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> image = torch.rand(1, 3, 64, 64)
        >>> method = xattn.create_explainer("gradcam", net)
        >>> method.attribute(image, target=similarity_to(image[0])).shape
        torch.Size([1, 1, 2, 2])
    """
    given = photo_or_embedding
    if isinstance(given, str | Path):
        name = name or f"similarity to {Path(given).name}"
    elif not isinstance(given, Image.Image):
        given = torch.as_tensor(given, device="cpu").detach().float()
        if given.ndim not in (1, 3) or not bool(given.isfinite().all()) or not bool(given.any()):
            raise ValueError(
                f"photo_or_embedding: got shape {tuple(given.shape)}, or a tensor that is zero or not "
                f"finite; give a photo, (3, H, W) in [0, 1], or one embedding (C,)"
            )
        if given.ndim == 1:
            name = name or "similarity to an embedding"
    return Similarity(_not_bound, name or "similarity to a photo", reference=given)


def _not_bound(outputs: Tensor) -> Tensor:
    raise ValueError("target: a similarity needs a backbone; use scored(backbone, target)")


@torch.no_grad()
def embed(backbone: Backbone, photo: Any) -> Tensor:
    """Compute the pooled features (C,) of one photo: a path, a PIL image, or a tensor (3, H, W) in [0, 1].

    For a backbone without classes, the result is its output."""
    if isinstance(photo, Tensor):
        pixels = photo
    else:
        pixels, _ = prepare(load_image(photo), backbone.preprocessing)
    image = pixels[None].to(backbone.device, backbone.mean.dtype)
    if not backbone.has_classes:
        return backbone.logits(image)[0]
    view = Scored(backbone, Target(lambda features: features[:, 0], reads="features"))
    return view.outputs_normalized(backbone.normalize(image)).logits[0]
