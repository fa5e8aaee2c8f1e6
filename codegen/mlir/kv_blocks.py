"""Pack plain keys and values into the blocks that attention reads (see `CacheLayout`), through registers."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.cache import value_panels
from tilewright.codegen.cache_slots import VALUE_STEP, round_up
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import Val, constant, shuffle


@dataclass(frozen=True)
class Rows:
    """Plain rows of ``size`` elements: token t starts at ``place + t * stride``."""

    memory: Buffer
    place: Val
    stride: int
    size: int


def pack_keys(kernel: Kernel, source: Rows, count: Val, panel: int, block: Buffer) -> None:
    """The first ``count`` tokens of ``source`` into ``block``; the slots that fill up a vector get copies."""
    lanes, dtype = kernel.lanes, block.dtype
    pair = 2 if dtype == "bf16" else 1
    size = round_up(source.size, pair)
    last = count - 1
    with kernel.loop(0, count, lanes) as loop:
        first = loop.index // panel * (panel * size) + loop.index % panel * pair
        tokens = [(loop.index + i).min(last) for i in range(lanes)]
        for start in range(0, size, lanes * pair):
            rows = [_load(kernel, source, token, start, lanes * pair, dtype).bitcast("i32") for token in tokens]
            for step, column in enumerate(transpose(rows)):
                if start + step * pair < size:
                    place = first + (start + step * pair) * panel
                    block.store(column.bitcast(dtype), place)


def pack_values(kernel: Kernel, source: Rows, count: Val, panel: int, slots: int, block: Buffer) -> None:
    """The first ``count`` tokens of ``source`` into ``block`` of ``slots``; the second of an odd last pair is zero."""
    pair = 2 if block.dtype == "bf16" else 1
    with kernel.loop(0, count, pair) as loop:
        following = loop.index + 1 < count
        for start, width in value_panels(round_up(source.size, VALUE_STEP), panel):
            for column in range(0, width, kernel.lanes):
                value = _load(kernel, source, loop.index, start + column, kernel.lanes, block.dtype)
                if pair == 2:
                    second = _load(kernel, source, (loop.index + 1).min(count - 1), start + column, kernel.lanes, "bf16")
                    value = interleave(value, following.select(second, constant(0, "bf16", kernel.lanes)))
                block.store(value, loop.index * width + (start * slots + column * pair))


def _load(kernel: Kernel, source: Rows, token: Val, start: int, lanes: int, dtype: str) -> Val:
    left = source.size - start
    if left <= 0:
        return constant(0, dtype, lanes)
    mask = None if left >= lanes else kernel.mask(constant(left), lanes)
    return source.memory.load(source.place + (token * source.stride + start), lanes, mask).to(dtype)


def interleave(a: Val, b: Val) -> Val:
    """a0 b0 a1 b1 ..."""
    return shuffle(a, b, [i // 2 + i % 2 * a.lanes for i in range(2 * a.lanes)])


def transpose(rows: Sequence[Val]) -> list[Val]:
    """The square of lanes transposed: one exchange of off-diagonal halves for each bit of the lane number."""
    rows, lanes = list(rows), len(rows)
    bit = 1
    while bit < lanes:
        first = [lane if not lane & bit else lanes + lane - bit for lane in range(lanes)]
        second = [lane + bit if not lane & bit else lanes + lane for lane in range(lanes)]
        for i in range(lanes):
            if not i & bit:
                a, b = rows[i], rows[i + bit]
                rows[i], rows[i + bit] = shuffle(a, b, first), shuffle(a, b, second)
        bit *= 2
    return rows
