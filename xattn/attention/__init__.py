"""Attention mechanisms, one file each, behind one operator interface; see :func:`create_attention`."""

from xattn.attention import agent, dma, gna, softmax  # noqa: F401  (they register themselves)
from xattn.attention.base import (
    Attention,
    Entry,
    Mechanism,
    create_attention,
    create_mechanism,
    list_attention,
    mechanism_class,
    register,
)
from xattn.attention.convert import convert, converted_copy, revert
from xattn.attention.operator import (
    LowRankOperator,
    Operator,
    ProductOperator,
    SoftmaxOperator,
)
from xattn.attention.order import Order, tile_order, z_order
from xattn.attention.record import Call, record
from xattn.attention.segments import (
    Blocks,
    Rule,
    Segment,
    SegmentsOperator,
    attend,
    pool,
    select,
    visible_blocks,
)

__all__ = [
    "Attention",
    "Blocks",
    "Call",
    "Entry",
    "LowRankOperator",
    "Mechanism",
    "Operator",
    "Order",
    "ProductOperator",
    "Rule",
    "Segment",
    "SegmentsOperator",
    "SoftmaxOperator",
    "attend",
    "convert",
    "converted_copy",
    "create_attention",
    "create_mechanism",
    "list_attention",
    "mechanism_class",
    "pool",
    "record",
    "register",
    "revert",
    "select",
    "tile_order",
    "visible_blocks",
    "z_order",
]
