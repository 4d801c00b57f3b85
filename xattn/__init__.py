"""xattn: train small explanation heads on frozen image classifiers and measure what they explain.

The public names below are imported on first use, so that ``import xattn`` and ``xattn --help`` stay
fast: torch and timm load with the first call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xattn.runtime.version import __version__

_EXPORTS = {
    "Backbone": "xattn.backbone",
    "Preprocessing": "xattn.backbone",
    "Taps": "xattn.backbone",
    "TapModule": "xattn.backbone",
    "load_backbone": "xattn.backbone",
    "load_segmenter": "xattn.backbone",
    "load_clip": "xattn.backbone.families.clip",
    "Target": "xattn.backbone.targets",
    "at_mask": "xattn.backbone.targets",
    "at_point": "xattn.backbone.targets",
    "at_query": "xattn.backbone.targets",
    "segment_targets": "xattn.explaining.segments",
    "similarity_to": "xattn.backbone.similarity",
    "Head": "xattn.heads",
    "create_head": "xattn.heads",
    "list_heads": "xattn.heads",
    "load_head": "xattn.heads",
    "save_head": "xattn.heads",
    "fit": "xattn.training",
    "TrainConfig": "xattn.config",
    "ProbeConfig": "xattn.config",
    "cache_features": "xattn.training.features",
    "probe": "xattn.training.probe",
    "as_explainer": "xattn.explainers",
    "create_explainer": "xattn.explainers",
    "list_explainers": "xattn.explainers",
    "distill": "xattn.training.distilling",
    "DistillConfig": "xattn.config",
    "prune": "xattn.training.pruning_run",
    "PruneConfig": "xattn.config",
    "load_conversion": "xattn.backbone",
    "explain": "xattn.explaining.photos",
    "explain_clip": "xattn.explaining.clip_maps",
    "explain_detections": "xattn.explaining.detections",
    "explain_inputs": "xattn.explaining.inputs",
    "explain_video": "xattn.explaining.clips",
    "explain_tokens": "xattn.vlm.explain",
    "load_detector": "xattn.detection",
    "load_vlm": "xattn.vlm.loading",
    "export": "xattn.explaining.exporting",
    "Explanation": "xattn.packs.explanation",
    "load_pack": "xattn.packs.reader",
    "save_pack": "xattn.packs.writer",
    "evaluate": "xattn.eval",
    "open_photos": "xattn.photos.sources",
    "open_viewer": "xattn.app.serving.session",
    "register_attention": "xattn.attention",
    "register_block": "xattn.blocks",
    "register_explainer": "xattn.explainers",
    "register_head": "xattn.heads",
    "register_metric": "xattn.eval",
    "create_token_explainer": "xattn.vlm.explainers.base",
    "list_token_explainers": "xattn.vlm.explainers.base",
    "register_token_explainer": "xattn.vlm.explainers.base",
}

__all__ = [
    "Backbone",
    "DistillConfig",
    "Explanation",
    "Head",
    "Preprocessing",
    "ProbeConfig",
    "PruneConfig",
    "TapModule",
    "Taps",
    "Target",
    "TrainConfig",
    "__version__",
    "as_explainer",
    "at_mask",
    "at_point",
    "at_query",
    "cache_features",
    "create_explainer",
    "create_head",
    "create_token_explainer",
    "distill",
    "evaluate",
    "explain",
    "explain_clip",
    "explain_detections",
    "explain_inputs",
    "explain_tokens",
    "explain_video",
    "export",
    "fit",
    "list_explainers",
    "list_heads",
    "list_token_explainers",
    "load_backbone",
    "load_clip",
    "load_conversion",
    "load_detector",
    "load_head",
    "load_pack",
    "load_segmenter",
    "load_vlm",
    "open_photos",
    "open_viewer",
    "probe",
    "prune",
    "register_attention",
    "register_block",
    "register_explainer",
    "register_head",
    "register_metric",
    "register_token_explainer",
    "save_head",
    "save_pack",
    "segment_targets",
    "similarity_to",
]

if TYPE_CHECKING:
    from xattn.app.serving.session import open_viewer
    from xattn.attention import register_attention
    from xattn.backbone import (
        Backbone,
        Preprocessing,
        TapModule,
        Taps,
        load_backbone,
        load_conversion,
        load_segmenter,
    )
    from xattn.backbone.families.clip import load_clip
    from xattn.backbone.similarity import similarity_to
    from xattn.backbone.targets import Target, at_mask, at_point, at_query
    from xattn.blocks import register_block
    from xattn.config import DistillConfig, ProbeConfig, PruneConfig
    from xattn.detection import load_detector
    from xattn.eval import evaluate, register_metric
    from xattn.explainers import as_explainer, create_explainer, list_explainers, register_explainer
    from xattn.explaining.clip_maps import explain_clip
    from xattn.explaining.clips import explain_video
    from xattn.explaining.detections import explain_detections
    from xattn.explaining.exporting import export
    from xattn.explaining.inputs import explain_inputs
    from xattn.explaining.photos import explain
    from xattn.explaining.segments import segment_targets
    from xattn.heads import Head, create_head, list_heads, load_head, register_head, save_head
    from xattn.packs.explanation import Explanation
    from xattn.packs.reader import load_pack
    from xattn.packs.writer import save_pack
    from xattn.photos.sources import open_photos
    from xattn.training import TrainConfig, fit
    from xattn.training.distilling import distill
    from xattn.training.features import cache_features
    from xattn.training.probe import probe
    from xattn.training.pruning_run import prune
    from xattn.vlm.explain import explain_tokens
    from xattn.vlm.explainers.base import (
        create_token_explainer,
        list_token_explainers,
        register_token_explainer,
    )
    from xattn.vlm.loading import load_vlm


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'xattn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
