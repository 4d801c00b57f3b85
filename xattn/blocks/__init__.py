"""Blocks that mix tokens, one per file, behind one interface; see :func:`create_block`."""

from xattn.blocks.base import (
    Block,
    BlockEntry,
    block_class,
    create_block,
    list_blocks,
    register_block,
)

__all__ = [
    "Block",
    "BlockEntry",
    "block_class",
    "create_block",
    "list_blocks",
    "register_block",
]
