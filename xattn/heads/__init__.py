"""Explanation heads: small trainable modules that read a frozen backbone's taps."""

from xattn.heads.attentive import AttentiveHead, ClassMaps, Tokens, overlap
from xattn.heads.base import (
    Head,
    create_head,
    list_heads,
    load_head,
    parse_options,
    read_config,
    register_head,
    save_head,
    shipped_heads,
)
from xattn.heads.efficient_probe import EfficientProbe
from xattn.heads.ttame import LCam, TTame

__all__ = [
    "AttentiveHead",
    "ClassMaps",
    "EfficientProbe",
    "Head",
    "LCam",
    "Tokens",
    "TTame",
    "create_head",
    "list_heads",
    "load_head",
    "overlap",
    "parse_options",
    "read_config",
    "register_head",
    "save_head",
    "shipped_heads",
]
