"""Find the factors of a group's error, as `ir.ops.kv_residual` defines them, and write them behind its codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_residual import ResidualLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_codes_write import Scale, held
from tilewright.codegen.mlir.kv_outliers_write import OutlierWriter
from tilewright.codegen.mlir.value import Val, constant, iota
from tilewright.ir.ops.kv_residual import LEAST, STEPS, starts


class ResidualWriter:
    """Of one group of keys, or of values, which are staged as f32 rows of ``stride`` elements."""

    def __init__(self, kernel: Kernel, cache: CodeLayout, layout: ResidualLayout, staged: Buffer, stride: int) -> None:
        self.kernel, self.cache, self.layout, self.staged, self.stride = kernel, cache, layout, staged, stride
        self.lanes, self.ranks = kernel.lanes, range(layout.rank)
        self.a = kernel.scratch(max(layout.rank, 1) * layout.group, "f32")  # [rank][group]
        self.b = kernel.scratch(max(layout.rank, 1) * stride, "f32")  # [rank][stride]
        self.outliers = OutlierWriter(kernel, cache, layout, staged, stride) if layout.outliers else None

    def limits_of_token(self, row: Val) -> tuple[Val, Val] | None:
        """Find the outliers of a staged row; the least and the greatest of the others, None where all make the scale."""
        return None if self.outliers is None else self.outliers.of_token(row)

    def leave(self, row: Val, scale: Callable[[int], Scale]) -> None:
        """The numbers of a row become the error of their codes under the scales of components from a place on."""
        for start in range(0, self.stride, self.lanes):
            place = row * self.stride + start
            error = scale(start).error(self.staged.load(place, self.lanes))
            self.staged.store((iota(self.lanes) < self.layout.size - start).select(error, 0.0), place)

    def write(self, memory: Buffer, slot: Val) -> None:
        """Of the staged errors what is kept, into the run at ``memory``, whose slots from ``slot`` on the group has."""
        if self.outliers is not None:
            self.outliers.take()
        if self.layout.rank:
            self._begin()
            with self.kernel.loop(0, STEPS):
                self._project()
                self._make_orthonormal()
                self._collect()
            self._store(memory, slot)
        if self.outliers is not None:
            self.outliers.write(self.a, self.b, memory, slot)

    def _begin(self) -> None:
        """The components' factors that iteration begins with."""
        wide = np.zeros((self.layout.rank, self.stride), np.float32)
        wide[:, : self.layout.size] = starts(self.layout.size, self.layout.rank).T
        table = self.kernel.table(f"starts{self.layout.size}of{self.stride}", wide.view(np.uint8).ravel().tolist())
        with self.kernel.loop(0, wide.size, self.lanes) as loop:
            self.b.store(table.load(loop.index * 4, 4 * self.lanes).bitcast("f32"), loop.index)

    def _project(self) -> None:
        """The products of all tokens' errors with the factors of components."""
        none = [constant(0.0, "f32", self.lanes) for _ in self.ranks]
        with self.kernel.loop(0, self.layout.group) as tokens:
            with self.kernel.loop(0, self.stride, self.lanes, none) as parts:
                error = self.staged.load(tokens.index * self.stride + parts.index, self.lanes)
                columns = (self.b.load(parts.index + j * self.stride, self.lanes) for j in self.ranks)
                parts.next(*(error.fma(column, total) for column, total in zip(columns, parts.values)))
            for j, total in zip(self.ranks, parts.results):
                self.a.store(total.reduce("sum"), tokens.index + j * self.layout.group)

    def _collect(self) -> None:
        """The products of all components' errors with the factors of tokens."""
        none = [constant(0.0, "f32", self.lanes) for _ in self.ranks]
        with self.kernel.loop(0, self.stride, self.lanes) as parts:
            with self.kernel.loop(0, self.layout.group, carry=none) as tokens:
                error = self.staged.load(tokens.index * self.stride + parts.index, self.lanes)
                factors = (self.a.load(tokens.index + j * self.layout.group).splat(self.lanes) for j in self.ranks)
                tokens.next(*(error.fma(factor, total) for factor, total in zip(factors, tokens.values)))
            for j, total in zip(self.ranks, tokens.results):
                self.b.store(total, parts.index + j * self.stride)

    def _make_orthonormal(self) -> None:
        """Gram and Schmidt."""
        for j in self.ranks:
            before = self._product(j, j)
            for i in range(j):
                self._combine(j, i, -self._product(j, i))
            after = self._product(j, j)
            kept = after > before * LEAST
            self._scale(j, kept.select(1.0 / kept.select(after, 1.0).sqrt(), 0.0))

    def _product(self, i: int, j: int) -> Val:
        group = self.layout.group
        with self.kernel.loop(0, group, self.lanes, [constant(0.0, "f32", self.lanes)]) as loop:
            x, y = (self.a.load(loop.index + k * group, self.lanes) for k in (i, j))
            loop.next(x.fma(y, loop.values[0]))
        return loop.results[0].reduce("sum")

    def _combine(self, j: int, i: int, factor: Val) -> None:
        group = self.layout.group
        with self.kernel.loop(0, group, self.lanes) as loop:
            x, y = (self.a.load(loop.index + k * group, self.lanes) for k in (i, j))
            self.a.store(x.fma(factor.splat(self.lanes), y), loop.index + j * group)

    def _scale(self, j: int, factor: Val) -> None:
        group = self.layout.group
        with self.kernel.loop(0, group, self.lanes) as loop:
            place = loop.index + j * group
            self.a.store(self.a.load(place, self.lanes) * factor.splat(self.lanes), place)

    def _store(self, memory: Buffer, slot: Val) -> None:
        """Factors as they will be read back, here and there."""
        layout, size = self.layout, self.layout.stored.itemsize
        for j in self.ranks:
            with self.kernel.loop(0, layout.group, self.lanes) as loop:
                place = slot + loop.index + j * layout.run
                self._keep(self.a, loop.index + j * layout.group, memory, place * size + layout.start)
            first = (slot // layout.group * layout.rank + j) * layout.row
            with self.kernel.loop(0, layout.row, self.lanes) as loop:
                self._keep(self.b, loop.index + j * self.stride, memory, (first + loop.index) * size + layout.components)

    def _keep(self, numbers: Buffer, place: Val, memory: Buffer, at: Val) -> None:
        number = held(self.cache, numbers.load(place, self.lanes))
        numbers.store(number, place)
        memory.store(number.to(self.cache.scales).bitcast("u8"), at)
