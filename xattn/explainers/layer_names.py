"""Which module of a network a CAM method reads: the default, or the one of a dotted name."""

from __future__ import annotations

from torch import nn

from xattn.backbone import Backbone
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
    point_of = getattr(backbone.model, "point_of", None)  # of a traced module
    point = None if point_of is None else point_of(layer)
    if point is not None:
        return point
    if isinstance(layer, nn.Module):
        if any(layer is m for m in backbone.modules()):
            return layer
        raise ValueError(
            f"layer: {type(layer).__name__} is not a module of {backbone.name}; give one of "
            f"backbone.model, or its dotted name"
        )
    if not isinstance(layer, str):
        raise ValueError(
            f"layer: got a {type(layer).__name__}; give a module or its dotted name, of several "
            f"layers=(...)"
        )
    modules = {name: module for name, module in backbone.named_modules() if name}
    names = {
        name.removeprefix("model.").removeprefix("graph."): module
        for name, module in modules.items()
    }
    if layer in names or layer in modules:
        return names.get(layer) or modules[layer]
    inner = [name for name in names if name.endswith(f".{layer}")]  # within an adapter
    if len(inner) == 1:
        return names[inner[0]]
    near = inner or near_names(layer, names, 4)
    near = near or [name for name, _ in backbone.model.named_children()]
    raise ValueError(
        f"layer: {backbone.name} has no module {layer!r}; near matches: {', '.join(near[:4])}"
    )
