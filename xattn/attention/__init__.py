"""Attention mechanisms, one file each, behind one operator interface; see :func:`create_attention`."""

from xattn.attention import (  # noqa: F401  (they register themselves)
    act,
    agent,
    based,
    comrope,
    controls,
    dma,
    flow,
    freeswim,
    gna,
    hedgehog,
    hip,
    infllm_v2,
    landmark,
    lla,
    llsa,
    localist,
    lssa,
    moh,
    nsa,
    routing,
    softmax,
    spatten,
)
from xattn.attention.algebra import (
    ColumnsOperator,
    GatedOperator,
    LowRankOperator,
    PoolOperator,
    ProductOperator,
    SumOperator,
    pool,
)
from xattn.attention.base import (
    Entry,
    Mechanism,
    create_mechanism,
    list_attention,
    mechanism_class,
    register_attention,
)
from xattn.attention.causal_low_rank import CausalLowRankOperator
from xattn.attention.centroids import fit_centroids
from xattn.attention.controls import fit_static
from xattn.attention.conversion import Conversion
from xattn.attention.convert import conversion, convert, converted_copy, revert
from xattn.attention.folding import folded
from xattn.attention.inputs import Inputs
from xattn.attention.layer import Attention, create_attention
from xattn.attention.local_linear import LocalLinearOperator
from xattn.attention.lowering import attend
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.order import Order, tile_order, z_order
from xattn.attention.parallel import ParallelCrossAttention, stream_shares, token_maps
from xattn.attention.patterns import Pattern, pattern_operator
from xattn.attention.positions import (
    AxialRotation,
    GridRotation,
    Rotation,
    create_rotation,
    list_rotations,
    register_rotation,
)
from xattn.attention.record import Call, record
from xattn.attention.segments import Blocks, Rule, Segment, select, visible_blocks
from xattn.attention.segments_operator import SegmentsOperator
from xattn.attention.softplus_operator import SoftplusOperator
from xattn.attention.subsets import SubsetsOperator
from xattn.attention.taylor_operator import TaylorOperator

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
