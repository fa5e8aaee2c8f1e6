"""All operations, by family. Importing this package fills ``Op.registry``."""

from tilewright.ir.ops.attention import Attention
from tilewright.ir.ops.conv import AdaptiveAvgPool, AvgPool, Conv, MaxPool, Resize
from tilewright.ir.ops.core import ArgMax, CumSum, Full, Iota, Reduce, SizeOf, Sort, TopK
from tilewright.ir.ops.elementwise import *  # noqa: F403
from tilewright.ir.ops.elementwise import __all__ as _elementwise
from tilewright.ir.ops.kernel import Call
from tilewright.ir.ops.kv import Append, Attend
from tilewright.ir.ops.kv_choose import Choose
from tilewright.ir.ops.kv_retain import Retain
from tilewright.ir.ops.kv_select import Select
from tilewright.ir.ops.lossless import Decompress
from tilewright.ir.ops.moe import Experts
from tilewright.ir.ops.movement import (
    Broadcast,
    Concat,
    Gather,
    GatherND,
    Pad,
    Reshape,
    ScatterAlong,
    ScatterND,
    Slice,
    TakeAlong,
    Transpose,
)
from tilewright.ir.ops.nn import (
    Embedding,
    GatedLinear,
    GroupNorm,
    LayerNorm,
    Linear,
    Matmul,
    RmsNorm,
    Rope,
    Softmax,
)
from tilewright.ir.ops.quant import Dequantize, Expand, Lookup, Quantize
from tilewright.ir.ops.sparse import SparseLinear, Threshold
from tilewright.ir.ops.sparse_expand import SparseExpand

__all__ = [
    "AdaptiveAvgPool",
    "Append",
    "ArgMax",
    "Attend",
    "Attention",
    "AvgPool",
    "Broadcast",
    "Call",
    "Choose",
    "Concat",
    "Conv",
    "CumSum",
    "Decompress",
    "Dequantize",
    "Embedding",
    "Expand",
    "Experts",
    "Full",
    "GatedLinear",
    "Gather",
    "GatherND",
    "GroupNorm",
    "Iota",
    "LayerNorm",
    "Linear",
    "Lookup",
    "Matmul",
    "MaxPool",
    "Pad",
    "Quantize",
    "Reduce",
    "Reshape",
    "Resize",
    "Retain",
    "RmsNorm",
    "Rope",
    "ScatterAlong",
    "ScatterND",
    "Select",
    "SizeOf",
    "Slice",
    "Softmax",
    "Sort",
    "SparseExpand",
    "SparseLinear",
    "TakeAlong",
    "Threshold",
    "TopK",
    "Transpose",
    *_elementwise,
]
