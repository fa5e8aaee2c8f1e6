"""``kv.append``: a warp for each token and head writes its key and its value to the cache."""

from __future__ import annotations

from pathlib import Path

from tilewright.codegen.cuda.cache import CudaCacheLayout, FloatRows
from tilewright.codegen.cuda.cache_codes import CodeRows
from tilewright.codegen.cuda.cache_places import Places
from tilewright.codegen.cuda.evaluate import Evaluator
from tilewright.codegen.cuda.loops import take_apart
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.index import Index, floor_div
from tilewright.codegen.index_shapes import as_dim, size
from tilewright.ir import Value, ops, product

_WARPS = 4
_LANES = 32


def emit_append(source: Source, op: ops.Append, layout: CudaCacheLayout) -> None:
    """The kernel; a token for which the cache has no slot is skipped."""
    w, places = Evaluator(source.pointers), Places.of(source, op)
    shape = tuple(op.k.shape[:3])
    count = size(product(shape))
    at = w.variable(0, count - 1, w.keep_number(f"(i64)blockIdx.x * {_WARPS} + threadIdx.x / {_LANES}"))
    w.put(f"if ({w.number(at)} >= {w.number(count)}) return;")
    b, s, head = token = take_apart(w, at, shape)
    start = w.value(op.start, (b,)).text
    position = w.keep_number(f"{start} + {w.number(s)}")
    w.put(f"if ({position} < 0 || {position} >= {places.room}) return;")
    region, slot = map(w.keep_number, places.place(w.number(b), position))
    for value, pointer, rows in zip((op.k, op.v), source.names(op.cache), (layout.keys, layout.values)):
        place = pointer, region, w.number(head), slot
        if isinstance(rows, CodeRows):
            _encode(w, value, token, rows, place)
        else:
            _store(w, value, token, rows, place)
    if isinstance(layout.keys, CodeRows):
        source.parts.append(Path(__file__).with_name("append_codes.cuh").read_text())
    source.function(w.lines, _LANES * _WARPS, (as_dim(floor_div(count + (_WARPS - 1), _WARPS)), 1, 1))


def _store(w: Evaluator, value: Value, token: Index, rows: FloatRows, place: tuple[str, str, str, str]) -> None:
    """A row of floats."""
    name = w.name("p")
    w.put(f"{rows.stored} *{name} = {rows.address(*place)};")
    with w.loop(size(rows.size), f"threadIdx.x % {_LANES}", str(_LANES)) as d:
        w.put(f"tw_store({name} + {w.number(d)}, {w.value(value, (*token, d)).text});")


def _encode(w: Evaluator, value: Value, token: Index, rows: CodeRows, place: tuple[str, str, str, str]) -> None:
    """A row of codes; lanes behind the last element repeat it, which changes no scale."""
    name, n, last = w.name("p"), w.name("n"), rows.size - 1
    w.put(f"float {name}[{-(-rows.size // _LANES)}];")
    w.put("#pragma unroll")
    with w.block(f"for (int {n} = 0; {n} < {-(-rows.size // _LANES)}; {n}++)"):
        d = w.variable(0, last, w.keep_number(f"tw_min({n} * {_LANES} + threadIdx.x % {_LANES}, {last})"))
        w.put(f"{name}[{n}] = {w.value(value, (*token, d)).to('f32').text};")
    codes, scale = rows.address(*place), rows.scale_address(*place)
    w.put(f"tw_encode<{rows.bits}, {rows.size}>({codes}, ({rows.scales} *)({scale}), {name});")
