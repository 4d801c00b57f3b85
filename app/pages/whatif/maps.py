"""Maps on the page: the pack's over the photo, and a fresh one of the changed photo."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from xattn.app import models
from xattn.app.models import ModelError
from xattn.backbone import sha256
from xattn.explainers import create_explainer
from xattn.photos.view import View
from xattn.pictures.overlay import data_url, overlay
from xattn.pictures.scales import own_scale
from xattn.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.explainers import Explainer
    from xattn.heads import Head
    from xattn.packs.explanation import Explanation
    from xattn.packs.reader import Pack

MOST_PASSES = 200  # of a method that explains while somebody waits


def picture(pixels: Tensor) -> Image.Image:
    """An input (3, H, W) in [0, 1] as a picture."""
    return Image.fromarray((pixels.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())


def photo_url(pixels: Tensor) -> str:
    """An input as a URL for the browser."""
    return data_url(picture(pixels), quality=92, subsampling=0)


def map_url(pixels: Tensor, explanation: Explanation) -> str:
    """A map over the input that it belongs to, as a URL for the browser."""
    photo, scale = picture(pixels), own_scale(explanation)
    size = (photo.height, photo.width)
    values = View("whole", size, size, (0, 0, *size), size).to_photo(scale(explanation.map))
    return data_url(overlay(photo, values, cmap=scale.cmap), quality=88, subsampling=0)


def explained(pack: Pack, entry_id: str, pixels: Tensor, backbone: Backbone) -> Explanation:
    """The map of changed pixels (3, H, W) for the class and by the method of an entry.

    Raises:
        ModelError: the head is gone. ValueError: the method cannot be run again, or not while one waits.
    """
    entry = pack.explanation(entry_id)
    with models.turn():
        method = _method(pack.provenance(entry_id), backbone)
        passes = method.total_forwards or 1
        if passes > MOST_PASSES:
            raise ValueError(
                f"{entry.method} takes {passes:,} passes of the network; choose a method that takes at "
                f"most {MOST_PASSES}."
            )
        images = pixels[None].to(backbone.device, backbone.mean.dtype)
        try:
            maps = method.attribute(images, torch.tensor([entry.target], device=backbone.device))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(f"There is not enough memory to explain by {entry.method}.") from error
    return replace(entry, map=maps[0, 0].float().cpu().numpy())


def _method(made: dict[str, Any], backbone: Backbone) -> Explainer:
    """The explainer that made a map, by its provenance."""
    name, seed = made["protocol"].get("explainer"), made["protocol"].get("seed")
    head = None
    if made["head"] is not None:
        backbone, head = _head(made["head"], backbone)
    else:
        taps = (made["backbone"] or {}).get("taps")
        if isinstance(taps, list) and tuple(taps) != tuple(backbone.taps):
            backbone = backbone.with_taps(taps)
    return create_explainer(str(name), backbone, head, seed=seed if type(seed) is int else 0)


def _head(record: dict[str, Any], backbone: Backbone) -> tuple[Backbone, Head]:
    """The head of a record, which its weights tell, and the network with the taps that it reads."""
    own = getattr(backbone, "probe", None)
    if own is not None and sha256(own) == record.get("sha256"):
        return backbone, own
    for key in models.heads(backbone.name):
        try:
            network, head = models.with_head(backbone.name, key)
        except ModelError:
            continue  # of other weights
        if sha256(head) == record.get("sha256") and network.fingerprint == backbone.fingerprint:
            return network, head
    raise ModelError(
        f"The head {record.get('name')} that made this map is not among the heads at hand; put its "
        f"folder below the root."
    )
