"""Turn blocks of x and of packed weights into what the fastest micro-kernel eats, when many rows will share them."""

from __future__ import annotations

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.linear_floats import WidenFeed
from tilewright.codegen.mlir.microkernel import Feed
from tilewright.codegen.mlir.value import Val, constant


def core_feed(kernel: Kernel, feed: Feed | WidenFeed) -> Feed:
    """The feed worth converting blocks to: bf16 pairs where they multiply exactly, else f32."""
    exact = feed.in_bf16 if isinstance(feed, WidenFeed) else feed.w_dtype == "bf16"
    if kernel.target.has_bf16_dot and feed.x_dtype == "bf16" and exact:
        return Feed("bf16", "bf16", feed.panel, feed.lanes, dot=True)
    return Feed("f32", "f32", feed.panel, feed.lanes, dot=False)


def widen_weights(kernel: Kernel, feed: Feed | WidenFeed, core: Feed, w: Buffer, count: Val, block: Buffer) -> None:
    """``count`` k's of the panel at ``w``, stored for ``feed``, into ``block`` for ``core``; an odd pair ends in zero."""
    step = max(feed.step, core.pair)
    whole = count // step * step
    with kernel.loop(0, whole, step) as loop:
        for column in range(0, feed.panel, feed.lanes):
            rows = _weights(feed, w, loop.index, column, step)
            store_weights(core, block, loop.index, column, rows)
    with kernel.when((count - whole).ne(0)):
        for column in range(0, feed.panel, feed.lanes):
            rows = _weights(feed, w, whole, column, step, tail=True)
            rows += [constant(0.0, "f32", feed.lanes)] * (len(rows) % core.pair)
            store_weights(core, block, whole, column, rows)


def _weights(feed: Feed | WidenFeed, w: Buffer, k: Val, column: int, step: int, tail: bool = False) -> list[Val]:
    """The f32 weights of ``step`` k's, or of those that K has beyond whole steps."""
    if isinstance(feed, WidenFeed):
        return feed.weights(w, k // step * feed.stride + 4 * column, tail)
    if feed.pair == 2:
        return feed.weights(w, k * feed.panel + 2 * column)[:1 if tail else 2]
    return [w.load((k + i) * feed.panel + column, feed.lanes).to("f32") for i in range(1 if tail else step)]


def store_weights(core: Feed, block: Buffer, k: Val, column: int, rows: list[Val]) -> None:
    """f32 weights of a vector of features from ``column`` on, a k after the other, as ``core`` reads them."""
    for i in range(0, len(rows), core.pair):
        place = (k + i) * core.panel + core.pair * column
        if core.pair == 2:
            # A bf16 holds each of them, whole numbers below 256 too: their upper halves are all there is.
            low, high = (row.bitcast("i32") for row in rows[i:i + 2])
            block.store((low.shift_right_logical(16) | (high & -0x10000)).bitcast("bf16"), place)
        else:
            block.store(rows[i], place)


def widen_inputs(kernel: Kernel, x: Buffer, stride: int, rows: Val, count: Val, block: Buffer, block_stride: int) -> None:
    """``count`` k's of ``rows`` rows of x, as f32 rows of ``block``."""
    lanes = kernel.lanes
    whole = count // lanes * lanes
    with kernel.loop(0, rows) as row:
        source, target = row.index * stride, row.index * block_stride
        with kernel.loop(0, whole, lanes) as loop:
            block.store(x.load(source + loop.index, lanes).to("f32"), target + loop.index)
        with kernel.loop(whole, count) as loop:
            block.store(x.load(source + loop.index).to("f32"), target + loop.index)
