"""Which module of a network a CAM method reads: the default, or the one of a dotted name."""

from __future__ import annotations

from torch import nn

from xattn.backbone import Backbone
from xattn.runtime.copies import copies_of
from xattn.runtime.names import near_names


def default_layer(backbone: Backbone, method: str) -> nn.Module:
    """The last map before the classifier; of a network that classifies a token, what the last attention
    to it reads.

    Raises:
        ValueError: an adapter that does not name its layer.
    """
    layer = backbone.cam_layer
    if layer is None and backbone.adapter:
        layer = getattr(backbone.model, "gradcam_layer", None)
    if layer is None and backbone.adapter:
        raise ValueError(
            f"layer: {backbone.name} is not a timm model, so {method} does not know its last map; "
            f"give layer=<the module whose output is (B, C, h, w), or its dotted name>"
        )
    if layer is not None:
        return layer
    if backbone.is_vit:
        return backbone.model.blocks[-1].norm1  # type: ignore[index,union-attr,return-value]
    model = backbone.model
    if getattr(model, "global_pool", None) == "token" and not hasattr(model, "post_network"):
        # MViT, TNT, CoaT, PiT: nothing leads from their final patches to the logits.
        norms = [m for n, m in model.named_modules() if n.endswith((".norm1", ".norm_out"))]
        return norms[-1] if norms else backbone.head_point
    return backbone.head_point


def find_layer(backbone: Backbone, layer: nn.Module | str) -> nn.Module:
    """The module of ``backbone`` that ``layer`` is or names.

    Raises:
        ValueError: no such module, with near matches.
    """
    point_of = getattr(backbone.model, "point_of", lambda layer: None)  # of a traced module
    if isinstance(layer, nn.Module):
        inside = set(backbone.modules())
        for one in (layer, *copies_of(layer)):
            point = point_of(one)
            if point is not None or one in inside:
                return point or one
        raise ValueError(
            f"layer: {type(layer).__name__} is not a module of {backbone.name}; give one of the network "
            f"that it was loaded from, or its dotted name"
        )
    if not isinstance(layer, str):
        raise ValueError(
            f"layer: got a {type(layer).__name__}; give a module or its dotted name, of several "
            f"layers=(...)"
        )
    point = point_of(layer)
    if point is not None:
        return point
    modules = {name: module for name, module in backbone.named_modules() if name}
    for prefix in ("model.", "", "model.graph.", "model.net."):
        if prefix + layer in modules:
            return modules[prefix + layer]
    names = {
        name.removeprefix("model.").removeprefix("graph."): module
        for name, module in modules.items()
    }
    inner = [name for name in names if name.endswith(f".{layer}")]  # within an adapter
    if len(inner) == 1:
        return names[inner[0]]
    near = inner or near_names(layer, names, 4)
    near = near or [name for name, _ in backbone.model.named_children()]
    raise ValueError(
        f"layer: {backbone.name} has no module {layer!r}; near matches: {', '.join(near[:4])}"
    )
