"""``head.attribute(images, target)``: a head explains the backbone that it was made for."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from torch import Tensor

from xattn.backbone import Backbone


class MadeFor:
    """The backbone of a head, no part of its weights: copies share it, pickles leave it out."""

    def __init__(self, backbone: Backbone | None = None) -> None:
        self.backbone = backbone

    def __deepcopy__(self, memo: dict[int, Any]) -> MadeFor:
        return self

    def __reduce__(self) -> Any:
        return MadeFor, ()


class Attribution:
    """Mixin of heads: Captum's call."""

    name: ClassVar[str]
    made_for: MadeFor

    def attribute(self, inputs: Any, target: Any) -> Tensor:
        """Raw maps (B, 1, h, w) of one class per image, as the explainer ``head`` gives them for the
        backbone that the head was made for; see :meth:`xattn.explainers.Explainer.attribute`.

        Raises:
            ValueError: bad inputs or targets, or the head comes from a pickle, which keeps no backbone.
        """
        backbone = self.made_for.backbone
        if backbone is None:
            raise ValueError(
                f"head: {self.name!r} comes from a pickle, without its backbone; give "
                f"create_explainer('head', backbone, head)"
            )
        # By name, because explainers are built on heads.
        explainers: Any = importlib.import_module("xattn.explainers")
        maps: Tensor = explainers.create_explainer("head", backbone, self).attribute(inputs, target)
        return maps
