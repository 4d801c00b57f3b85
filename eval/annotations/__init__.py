"""Annotations of where objects are in photos: masks, boxes and COCO's category names."""

from xattn.eval.annotations.detections import DetectedObjects
from xattn.eval.annotations.objects import (
    Annotation,
    Annotations,
    Boxes,
    MaskFolder,
    annotations_of_classes,
    load_annotations,
)

__all__ = [
    "Annotation",
    "Annotations",
    "Boxes",
    "DetectedObjects",
    "MaskFolder",
    "annotations_of_classes",
    "load_annotations",
]
