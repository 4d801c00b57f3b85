"""Explanation heads: small trainable modules that read a frozen backbone's taps."""

from xattn.heads.abmilp import AbMilp
from xattn.heads.aim import Aim
from xattn.heads.attended import Tokens
from xattn.heads.attentive import AttentiveHead, ClassMaps, overlap
from xattn.heads.base import (
    Head,
    HeadEntry,
    create_head,
    head_class,
    head_entry,
    head_folder,
    head_options,
    list_heads,
    load_head,
    parse_options,
    read_config,
    register_head,
    save_head,
)
from xattn.heads.cae import Cae
from xattn.heads.cait import Cait
from xattn.heads.cbam import Cbam
from xattn.heads.clip_pool import ClipPool
from xattn.heads.coca import Coca
from xattn.heads.csa import Csa
from xattn.heads.delf import Delf
from xattn.heads.dino_block import DinoBlock
from xattn.heads.efficient_probe import EfficientProbe
from xattn.heads.evidence import Evidence
from xattn.heads.gap import Gap
from xattn.heads.gem import Gem
from xattn.heads.hyperzzw import HyperZZW
from xattn.heads.lama import Lama
from xattn.heads.linear import Linear
from xattn.heads.memetector import MemeTector
from xattn.heads.pointer import Pointer
from xattn.heads.random_feature import RandomFeature
from xattn.heads.siglip_map import SiglipMap
from xattn.heads.simpool import SimPool
from xattn.heads.ttame import LCam, TTame
from xattn.heads.v_jepa import VJepa
from xattn.heads.words import WordHead
from xattn.runtime.head_files import shipped_heads

__all__ = [
    "AbMilp",
    "Aim",
    "AttentiveHead",
    "Cae",
    "Cait",
    "Cbam",
    "ClassMaps",
    "ClipPool",
    "Coca",
    "Csa",
    "Delf",
    "DinoBlock",
    "EfficientProbe",
    "Evidence",
    "Gap",
    "Gem",
    "Head",
    "HeadEntry",
    "HyperZZW",
    "LCam",
    "Lama",
    "Linear",
    "MemeTector",
    "Pointer",
    "RandomFeature",
    "SiglipMap",
    "SimPool",
    "TTame",
    "Tokens",
    "VJepa",
    "WordHead",
    "create_head",
    "head_class",
    "head_entry",
    "head_folder",
    "head_options",
    "list_heads",
    "load_head",
    "overlap",
    "parse_options",
    "read_config",
    "register_head",
    "save_head",
    "shipped_heads",
]
