"""Explanation heads: small trainable modules that read a frozen backbone's taps."""

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
from xattn.heads.csa import Csa
from xattn.heads.evidence import Evidence
from xattn.heads.linear import Linear
from xattn.heads.pointer import Pointer
from xattn.heads.probing.abmilp import AbMilp
from xattn.heads.probing.aim import Aim
from xattn.heads.probing.cae import Cae
from xattn.heads.probing.cait import Cait
from xattn.heads.probing.cbam import Cbam
from xattn.heads.probing.clip_pool import ClipPool
from xattn.heads.probing.coca import Coca
from xattn.heads.probing.delf import Delf
from xattn.heads.probing.dino_block import DinoBlock
from xattn.heads.probing.efficient_probe import EfficientProbe
from xattn.heads.probing.gap import Gap
from xattn.heads.probing.gem import Gem
from xattn.heads.probing.hyperzzw import HyperZZW
from xattn.heads.probing.lama import Lama
from xattn.heads.probing.memetector import MemeTector
from xattn.heads.probing.siglip_map import SiglipMap
from xattn.heads.probing.simpool import SimPool
from xattn.heads.probing.v_jepa import VJepa
from xattn.heads.random_feature import RandomFeature
from xattn.heads.ttame import LCam, TTame
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
