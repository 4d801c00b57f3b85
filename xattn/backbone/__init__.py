"""Frozen classifiers whose logits and feature maps come out of one hook-free pass."""

from xattn.backbone.backbone import Backbone
from xattn.backbone.conversion import converted, load_conversion
from xattn.backbone.fingerprint import sha256, state_sha256
from xattn.backbone.loading import load_backbone, load_segmenter
from xattn.backbone.resizing import resized
from xattn.backbone.taps import PRE_NORM_BLOCKS, TapModule, Taps
from xattn.photos.classes import Task, read_classes
from xattn.photos.preprocessing import Preprocessing

__all__ = [
    "PRE_NORM_BLOCKS",
    "Backbone",
    "Preprocessing",
    "TapModule",
    "Taps",
    "Task",
    "converted",
    "load_backbone",
    "load_conversion",
    "load_segmenter",
    "read_classes",
    "resized",
    "sha256",
    "state_sha256",
]
