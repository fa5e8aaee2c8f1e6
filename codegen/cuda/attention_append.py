"""``kv.append``: a warp for each token and head writes its key and its value to the cache."""

from __future__ import annotations

from tilewright.codegen.cuda.cache import CudaCacheLayout
from tilewright.codegen.cuda.evaluate import Evaluator
from tilewright.codegen.cuda.loops import take_apart
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.index import floor_div
from tilewright.codegen.index_shapes import as_dim, size
from tilewright.ir import Value, ops, product

_WARPS = 4


def emit_append(source: Source, op: ops.Append, layout: CudaCacheLayout) -> None:
    """The kernel; a token for which the cache has no slot is skipped."""
    w = Evaluator(source.pointers)
    shape = tuple(op.k.shape[:3])
    count = size(product(shape))
    at = w.variable(0, count - 1, w.keep_number(f"(i64)blockIdx.x * {_WARPS} + threadIdx.x / 32"))
    w.put(f"if ({w.number(at)} >= {w.number(count)}) return;")
    b, s, head = take_apart(w, at, shape)
    start = w.value(op.start, (b,)).text
    slot = w.keep_number(f"{start} + {w.number(s)}")
    w.put(f"if ({slot} < 0 || {slot} >= {layout.length}) return;")

    def write(value: Value, pointer: str, width: int) -> None:
        row = layout.row(pointer, width, w.number(b), w.number(head), slot)
        name = w.name("p")
        w.put(f"{layout.dtype} *{name} = {row};")
        with w.loop(size(width), "threadIdx.x % 32", "32") as d:
            w.put(f"tw_store({name} + {w.number(d)}, {w.value(value, (b, s, head, d)).text});")

    keys, values = source.names(op.cache)
    write(op.k, keys, layout.dim)
    write(op.v, values, layout.vdim)
    source.function(w.lines, 32 * _WARPS, (as_dim(floor_div(count + (_WARPS - 1), _WARPS)), 1, 1))
