"""Clip classifiers of Hugging Face ``transformers``: VideoMAE, TimeSformer, ViViT, V-JEPA 2.

    model = AutoModelForVideoClassification.from_pretrained(NAME)
    backbone = load_backbone(model, processor=AutoImageProcessor.from_pretrained(NAME))

They run unchanged, with hooks. In transformers, clips are (B, T, C, H, W), with frames before channels;
here they are (B, C, T, H, W) for every network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from xattn.backbone.families.hooked import HookedClassifier, from_hooks
from xattn.backbone.families.transformers_networks import TransformersLogits, pair_of
from xattn.photos.preprocessing import ClipPreprocessing, Preprocessing

KIND = "ForVideoClassification"
TIME_LAST = ("timesformer",)  # time varies fastest in their token order


class TransformersClips(TransformersLogits):
    """The logits of ``network`` for clips (B, C, T, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        frames = {self.network.main_input_name: x.transpose(1, 2)}
        return self.network(**frames)[0]  # type: ignore[no-any-return]


def clip_classifier(
    network: Any,
    preprocessing: Preprocessing | None,
    taps: Sequence[str] | None,
    input_size: tuple[int, int] | None,
    frames: int | None,
) -> HookedClassifier:
    """Prepare a clip classifier for ``load_backbone``.

    Args:
        preprocessing: taken from its processor; None means ImageNet's, which is then marked as assumed.
        taps: see :func:`~xattn.backbone.families.hooked.from_hooks`.
        input_size, frames: by default from ``preprocessing`` and the network's config.
    """
    config = getattr(network.config, "vision_config", network.config)
    count = next(
        (int(n) for key in ("num_frames", "frames_per_clip") if (n := getattr(config, key, None))),
        16,
    )
    count, size = frames or count, input_size
    if preprocessing is not None:
        preprocessing = ClipPreprocessing(**asdict(preprocessing), frames=count)
    else:
        own = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
        size = size or (None if own is None else pair_of(own))
    made = from_hooks(
        TransformersClips(network, preprocessing),
        taps,
        input_size=size,
        frames=count,
        kind=type(network).__name__,
        time_last=network.config.model_type in TIME_LAST,
    )
    lists = [m for m in made.net.modules() if isinstance(m, nn.ModuleList)]
    if lists:  # V-JEPA 2 attends in its encoder and its pooler, and does not run its predictor
        blocks = [block for layers in lists for block in layers if block in made.called]
        vars(made)["blocks"] = nn.ModuleList(blocks)  # which the network has registered
    return made
