"""D-RISE: S_t(u) = sum_i w_ti m_i(u), w_ti = max_j IoU(b_t, b_j) cos(P_t, P_j) O_j on the image x o m_i.

Petsiuk et al., CVPR 2021, arXiv 2006.03204. The masks are those of RISE, with 16 x 16 cells; all
detections in a photo share the masks and the passes. The sum is divided by N p, which does not change
the order of a map's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from xattn.detection.detector import require_detections
from xattn.explainers.base import register_explainer
from xattn.explainers.masking.rise import Rise
from xattn.runtime.option_checks import Count


@register_explainer("d_rise", title="D-RISE", networks=("detector",), cases=({"masks": 6},))
@dataclass(kw_only=True, eq=False, repr=False)
class DRise(Rise):
    """D-RISE, for a view whose classes are detections (:class:`~xattn.detection.Detections`).

    The weights w are the view's probabilities, so they depend on the view's ``score``. The standard
    error of a map falls as 1 / sqrt(masks).

    Args:
        masks: N; the default is the paper's number.
        cells: number of cells along a side; the default is the paper's number.
        keep, fill: see :class:`~xattn.explainers.masking.rise.Rise`; the paper fills with black.

    Raises:
        ValueError: the backbone has no detections.

    Example:
        >>> import torch, xattn
        >>> from xattn.detection import Detections
        >>> def squares(images):
        ...     return [([[8.0, 8, 24, 24]], [1], [0.9]) for _ in images]
        >>> detector = xattn.load_detector(squares, class_names=["cat", "dog"], input_size=32)
        >>> photo = torch.rand(3, 32, 32)
        >>> view = Detections(detector, detector.detect(photo))
        >>> method = xattn.create_explainer("d_rise", view, masks=20)
        >>> method.attribute(photo[None], target=0).shape
        torch.Size([1, 1, 32, 32])
    """

    per_class = True
    clips = False

    masks: Count = 5000
    cells: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_detections(self.backbone, self.name)
