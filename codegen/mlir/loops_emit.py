"""The loop nest of a planned loop kernel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tilewright.codegen import reads as rd
from tilewright.codegen.index import MOST_KNOWN, Index, Poly, Var
from tilewright.codegen.index_shapes import delinear, linear
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.loops_eval import Evaluator
from tilewright.codegen.mlir.loops_plan import TILE, Group, Plan
from tilewright.codegen.mlir.loops_quant import stored
from tilewright.codegen.mlir.value import Val
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Function, Value

if TYPE_CHECKING:
    from tilewright.codegen.mlir.loops import LoopsSchedule


def build(kernel: Function, plan: Plan, schedule: LoopsSchedule, target: CpuTarget, symbol: str) -> Kernel:
    """The kernel in MLIR, ready to compile."""
    values = [*kernel.args, *kernel.returns]
    specs = [(f"b{i}", stored(value.dtype)) for i, value in enumerate(values)]
    with Kernel(symbol, target, tuple(kernel.symbols()), specs) as k:
        arguments = dict(zip(kernel.args, k.buffers))
        outputs = dict(zip(kernel.returns, k.buffers[len(kernel.args):]))
        lanes = target.lanes * schedule.width
        evaluator = Evaluator(k, arguments, outputs, plan.buffered, lanes, schedule.streams, rd.only_moves(kernel))
        _Writer(evaluator, kernel, plan, schedule.unroll).write()
    return k


class _Writer:
    def __init__(self, evaluator: Evaluator, kernel: Function, plan: Plan, unroll: int) -> None:
        self.ev, self.plan, self.unroll = evaluator, plan, unroll
        self.results: tuple[Value, ...] = kernel.returns
        self.outputs = evaluator.kernel.buffers[len(kernel.args):]
        self.spaces = [(*plan.lead, *g.dims) for g in plan.groups]

    def write(self) -> None:
        k, plan = self.ev.kernel, self.plan
        if plan.block and not plan.lead:
            self._flat()
            return
        with self.ev.loop(k.begin, k.end) as loop:
            outer = self._outer(loop.index)
            for group, space in zip(plan.groups, self.spaces):
                self._group(group, space, outer)

    def _flat(self) -> None:
        """One axis: a range of tasks is a range of elements."""
        k, (group,) = self.ev.kernel, self.plan.groups
        count = group.dims[0]
        block = self.plan.block
        last = (k.end * block).min(self.ev.number(count))
        start = Poly.of(self.ev.variable(0, count, k.begin * block, multiple=math.gcd(block, MOST_KNOWN)))
        stop = Poly.of(self.ev.variable(0, count, last))
        self._vectors(group, self.spaces[0], (), group.order, {}, start, stop)

    def _outer(self, task: Val) -> Index:
        """The task's number taken apart into a variable an outer axis."""
        rest, out = task, []
        for axis in reversed(range(len(self.plan.outer))):
            n = self.plan.outer[axis]
            value = rest
            if axis:
                number = self.ev.number(n)
                value, rest = rest % number, rest // number
            out.append(Poly.of(self.ev.variable(0, n - 1, value)))
        return tuple(reversed(out))

    def _group(self, group: Group, space: tuple[Poly, ...], outer: Index) -> None:
        if not self.plan.block:
            self._loops(group, space, outer, group.order, {})
            return
        *lead, block = outer
        start = block * self.plan.block
        stop = self.ev.number(start + self.plan.block).min(self.ev.number(group.dims[0]))
        end = Poly.of(self.ev.variable(0, group.dims[0], stop))
        self._vectors(group, space, tuple(lead), group.order, {}, start, end)

    def _loops(self, group: Group, space: tuple[Poly, ...], outer: Index, order: tuple[int, ...],
               at: dict[int, Poly]) -> None:
        if not order:
            self._leaf(group, space, outer, tuple(at[axis] for axis in range(len(group.dims))))
            return
        axis, *rest = order
        if axis == group.vector:
            ends = (0, *group.cuts)
            for start, stop in zip(ends, (*map(Poly.of, group.cuts), group.dims[axis])):
                self._vectors(group, space, outer, order, at, Poly.of(start), stop)
            return

        def body(i: Var, carry: list[Val]) -> list[Val]:
            self._loops(group, space, outer, tuple(rest), at | {axis: Poly.of(i)})
            return []

        self.ev.each(Poly(), group.dims[axis], body, [])

    def _leaf(self, group: Group, space: tuple[Poly, ...], outer: Index, inner: Index) -> None:
        tiled = self.plan.tiled
        if tiled is None:
            self._store(group, space, (*outer, *inner))
            return
        start, n = outer[tiled] * TILE, space[tiled]
        stop = self.ev.number(start + TILE).min(self.ev.number(n))

        def body(i: Var, carry: list[Val]) -> list[Val]:
            place = Poly.of(self.ev.variable(0, n - 1, i.val))
            self._store(group, space, (*outer[:tiled], place, *outer[tiled + 1:], *inner))
            return []

        self.ev.each(start, Poly.of(self.ev.variable(0, n, stop)), body, [])

    def _vectors(self, group: Group, space: tuple[Poly, ...], outer: Index, order: tuple[int, ...],
                 at: dict[int, Poly], start: Poly, stop: Poly) -> None:
        axis, *rest = order

        def body(i: Var, carry: list[Val]) -> list[Val]:
            self._loops(group, space, outer, tuple(rest), at | {axis: Poly.of(i)})
            return []

        count = (stop - start).constant
        unroll = self.unroll
        while count is not None and unroll > 1 and count < unroll * self.ev.lanes:
            unroll //= 2
        exact = start.constant is not None
        span = (start, stop - 1) if exact else (Poly(), group.dims[axis] - 1)
        self.ev.sweep(start, stop, body, [[]] * unroll, span)

    def _store(self, group: Group, space: tuple[Poly, ...], index: Index) -> None:
        place = linear(index, space)
        var = place.lane
        values = []
        for i in group.results:
            result = self.results[i]
            value = self.ev.value(result, delinear(place, result.shape))
            values.append((i, value.splat(var.lanes if var else 0).to(result.dtype.value)))
        for i, value in values:
            self.outputs[i].store(value, self.ev.number(place), None if var is None else var.mask)


