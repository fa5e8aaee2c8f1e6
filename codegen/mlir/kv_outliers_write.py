"""Find a group's outliers, as `ir.ops.kv_residual` defines them, and write what they lack behind its codes."""

from __future__ import annotations

from collections.abc import Callable

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_residual import ResidualLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_codes_write import held
from tilewright.codegen.mlir.value import Val, constant, iota

Found = tuple[Val, Val]
"""A number of each lane and its place."""


class OutlierWriter:
    """Of one group of keys, or of values, which are staged as f32 rows of ``stride`` elements."""

    def __init__(self, kernel: Kernel, cache: CodeLayout, layout: ResidualLayout, staged: Buffer, stride: int) -> None:
        self.kernel, self.cache, self.layout, self.staged, self.stride = kernel, cache, layout, staged, stride
        self.lanes, self.both = kernel.lanes, 2 * layout.outliers
        self.line = stride if layout.channels else layout.group  # numbers with outliers of their own
        self.places = kernel.scratch(self.both * self.line, "i32")
        self.lack = kernel.scratch(self.both * self.line, "f32")

    # --- which they are -----------------------------------------------------------------------------------------------

    def of_channels(self, start: int) -> tuple[Val, Val]:
        """Find those of a vector of channels; the least and the greatest of the other numbers of each."""

        def token(index: Val) -> Found:
            return self.staged.load(index * self.stride + start, self.lanes), index.to("i32").splat(self.lanes)

        def pick(greatest: bool, after: Found | None) -> Found:
            return self._scan(token, self.layout.group, 1, greatest, after)

        def keep(number: int, found: Found) -> None:
            self.places.store(found[1], start + number * self.line)

        return self._limits(pick, keep)

    def of_token(self, row: Val) -> tuple[Val, Val]:
        """As `of_channels`, of the components of a staged row; scalars."""

        def part(index: Val) -> Found:
            numbers = index.to("i32").splat(self.lanes) + iota(self.lanes)
            return self.staged.load(row * self.stride + index, self.lanes), numbers

        def pick(greatest: bool, after: Found | None) -> Found:
            number, place = self._scan(part, self.layout.size, self.lanes, greatest, after)
            best = number.reduce("max" if greatest else "min").splat(self.lanes)
            first = number.eq(best).select(place, self.layout.size if greatest else -1)
            return best, first.reduce("min" if greatest else "max").splat(self.lanes)

        def keep(number: int, found: Found) -> None:
            self.places.store(found[1].lane(0), row + number * self.line)

        low, high = self._limits(pick, keep)
        return low.lane(0), high.lane(0)

    def _limits(self, pick: Callable[[bool, Found | None], Found], keep: Callable[[int, Found], None]) -> tuple[Val, Val]:
        limits = []
        for greatest in (False, True):
            found = None
            for number in range(self.layout.outliers):
                found = pick(greatest, found)
                keep(number if greatest else self.both - 1 - number, found)
            limits.append(pick(greatest, found)[0])
        return limits[0], limits[1]

    def _scan(self, load: Callable[[Val], Found], count: int, step: int, greatest: bool, after: Found | None) -> Found:
        """For each lane the greatest (or the least) number that comes after one found before; the first of equal ones
        counts as the greatest, and the last as the least."""
        worst = constant(float("-inf" if greatest else "inf"), "f32", self.lanes)
        with self.kernel.loop(0, count, step, [worst, constant(0, "i32", self.lanes)]) as loop:
            (x, place), (best, at) = load(loop.index), loop.values
            better = x > best if greatest else x <= best
            if count % step:
                better = better & (place < count)
            if after is not None:
                follows = place > after[1] if greatest else place < after[1]
                better = better & ((x < after[0] if greatest else x > after[0]) | (x.eq(after[0]) & follows))
            loop.next(better.select(x, best), better.select(place, at))
        return loop.results[0], loop.results[1]

    # --- what they lack -----------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Their errors, which were staged, are set aside."""

        def move(place: Val, token: Val, component: Val) -> None:
            at = token * self.stride + component
            self.lack.store(self.staged.load(at), place)
            self.staged.store(constant(0.0, "f32"), at)

        self._each(move)

    def write(self, a: Buffer, b: Buffer, memory: Buffer, slot: Val) -> None:
        """Places, and errors less what the factors make, into the run at ``memory``; see `ResidualWriter`."""
        layout, size = self.layout, self.layout.stored.itemsize

        def reduce(place: Val, token: Val, component: Val) -> None:
            left = self.lack.load(place)
            for j in range(layout.rank):
                left = left - a.load(token + j * layout.group) * b.load(component + j * self.stride)
            self.lack.store(left, place)

        if layout.rank:
            self._each(reduce)
        for number in range(self.both):
            line, inside = (slot // layout.group, 0) if layout.channels else (constant(0), slot)
            first = (line * self.both + number) * layout.line + inside
            with self.kernel.loop(0, layout.row if layout.channels else layout.group, self.lanes) as loop:
                at, place = loop.index + number * self.line, first + loop.index
                memory.store(self.places.load(at, self.lanes).to("u8"), place + layout.places)
                lack = held(self.cache, self.lack.load(at, self.lanes))
                memory.store(lack.to(self.cache.scales).bitcast("u8"), place * size + layout.lack)

    def _each(self, do: Callable[[Val, Val, Val], None]) -> None:
        """``do(place, token, component)`` for all outliers."""
        with self.kernel.loop(0, self.line) as loop:
            for number in range(self.both):
                place = loop.index + number * self.line
                other = self.places.load(place).to("index")
                token, component = (other, loop.index) if self.layout.channels else (loop.index, other)
                do(place, token, component)
