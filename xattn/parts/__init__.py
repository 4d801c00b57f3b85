"""Parts of images: finding evidence, the largest crop without it, and images with drawn text."""

from xattn.parts.cutting import Crop, Parts, cut_parts, largest_crop, rectangles
from xattn.parts.evidence import (
    BoxFile,
    DetectorText,
    Masks,
    MserText,
    evidence_mask,
    open_evidence,
)
from xattn.parts.macros import Lettered, draw_macro, draw_text, write_lettered

__all__ = [
    "BoxFile",
    "Crop",
    "DetectorText",
    "Lettered",
    "Masks",
    "MserText",
    "Parts",
    "cut_parts",
    "draw_macro",
    "draw_text",
    "evidence_mask",
    "largest_crop",
    "open_evidence",
    "rectangles",
    "write_lettered",
]
