"""Attention mechanisms, one file each, behind one operator interface; see :func:`create_attention`."""

from xattn.attention import comrope, mechanisms  # noqa: F401  (they register themselves)
from xattn.attention.base import (
    Entry,
    Mechanism,
    create_mechanism,
    list_attention,
    mechanism_class,
    register_attention,
)
from xattn.attention.inputs import Inputs
from xattn.attention.mechanisms.controls import fit_static
from xattn.attention.mechanisms.routing import fit_centroids
from xattn.attention.model.convert import conversion, convert, converted_copy, revert
from xattn.attention.model.folding import folded
from xattn.attention.model.layer import Attention, create_attention
from xattn.attention.model.parallel import ParallelCrossAttention, stream_shares, token_maps
from xattn.attention.model.spec import Conversion
from xattn.attention.operators.algebra import (
    ColumnsOperator,
    GatedOperator,
    LowRankOperator,
    PoolOperator,
    ProductOperator,
    SumOperator,
    pool,
)
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.causal_low_rank import CausalLowRankOperator
from xattn.attention.operators.local_linear import LocalLinearOperator
from xattn.attention.operators.lowering import attend
from xattn.attention.operators.patterns import Pattern, pattern_operator
from xattn.attention.operators.segments import SegmentsOperator
from xattn.attention.operators.softplus import SoftplusOperator
from xattn.attention.operators.subsets import SubsetsOperator
from xattn.attention.operators.taylor import TaylorOperator
from xattn.attention.order import Order, tile_order, z_order
from xattn.attention.positions import (
    AxialRotation,
    GridRotation,
    Rotation,
    create_rotation,
    list_rotations,
    register_rotation,
)
from xattn.attention.record import Call, record
from xattn.attention.selection import Blocks, Rule, Segment, select, visible_blocks

__all__ = [
    "Attention",
    "AxialRotation",
    "Blocks",
    "Call",
    "CausalLowRankOperator",
    "ColumnsOperator",
    "Conversion",
    "Entry",
    "GatedOperator",
    "GridRotation",
    "Inputs",
    "LocalLinearOperator",
    "LowRankOperator",
    "Mechanism",
    "Operator",
    "Order",
    "ParallelCrossAttention",
    "Pattern",
    "PoolOperator",
    "ProductOperator",
    "Rotation",
    "Rule",
    "Segment",
    "SegmentsOperator",
    "SoftmaxOperator",
    "SoftplusOperator",
    "SubsetsOperator",
    "SumOperator",
    "TaylorOperator",
    "attend",
    "conversion",
    "convert",
    "converted_copy",
    "create_attention",
    "create_mechanism",
    "create_rotation",
    "fit_centroids",
    "fit_static",
    "folded",
    "list_attention",
    "list_rotations",
    "mechanism_class",
    "pattern_operator",
    "pool",
    "record",
    "register_attention",
    "register_rotation",
    "revert",
    "select",
    "stream_shares",
    "tile_order",
    "token_maps",
    "visible_blocks",
    "z_order",
]
