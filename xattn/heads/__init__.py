"""Explanation heads: small trainable modules that read a frozen backbone's taps."""

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
from xattn.heads.ttame import LCam, TTame

__all__ = [
    "Head",
    "LCam",
    "TTame",
    "create_head",
    "list_heads",
    "load_head",
    "parse_options",
    "read_config",
    "register_head",
    "save_head",
    "shipped_heads",
]
