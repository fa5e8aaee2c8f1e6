"""``sparse.linear`` -> kernels: few weights in each row, the vectors of features that share a panel a column at a time.

A task is a few panels of features for as many rows as a vector has lanes. A handful of rows gather what they need of x; for
more, x is turned so that a column of all rows is a vector, which one weight after the other multiplies. What was made of x
stays for the next tasks of the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from tilewright.codegen.features import log2
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.elementwise import dim_value
from tilewright.codegen.mlir.lower import compile_kernel
from tilewright.codegen.mlir.value import Val, constant, fma, shuffle
from tilewright.codegen.packing import Packing
from tilewright.codegen.schedule import Schedule, Space, knob
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Argument, CodegenError, Dim, Function, as_dim, eval_dim, ops, product

_FLOATS = ("f32", "bf16", "f16")
_FEW = 4  # rows up to which gathering beats turning x


@dataclass(frozen=True)
class SparseSchedule(Schedule):
    """``panels`` of features, each as many as a vector has lanes, are one task."""

    name: ClassVar[str] = "sparse"
    panels: int = knob(8, (2, 4, 8, 16, 32, 64, 128))


@dataclass(frozen=True)
class Sizes:
    """Of one kernel: N features of R weights over K inputs, M rows."""

    n: int
    k: int
    r: int
    m: Dim
    lanes: int

    @property
    def panels(self) -> int:
        return -(-self.n // self.lanes)

    def tasks(self, schedule: SparseSchedule) -> Dim:
        return as_dim(-(-self.m // self.lanes) * -(-self.panels // schedule.panels))


class SparseEmitter:
    """Sparse linear layers with as many weights in each row."""

    name: ClassVar[str] = "mlir.sparse"

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        found = [op for op in kernel.body if isinstance(op, ops.SparseLinear)]
        if len(found) != 1 or len(kernel.body) != 2:
            return "not one sparse linear layer alone"
        (op,) = found
        if not all(isinstance(v, Argument) for v in op.operands):
            return "an operand of the sparse layer is computed in the kernel"
        static = all(isinstance(d, int) for d in (*op.values.shape, op.x.shape[-1]))
        if not static or any(v.dtype.value not in _FLOATS for v in (op.x, op.values)):
            return f"a sparse layer of {op.x.type} and {op.values.type}"
        return None

    def default_schedule(self, kernel: Function, target: CpuTarget) -> SparseSchedule:
        return SparseSchedule.default(target)

    def space(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]) -> Space:
        return Space(SparseSchedule, target, self.default_schedule(kernel, target))

    def layouts(self, kernel: Function, target: CpuTarget) -> Callable[[Schedule], Mapping[int, str]]:
        op, sizes = layer(kernel, target)
        args: list[object] = list(kernel.args)
        weights = (op.values, op.columns)
        texts = {args.index(v): Packing(v.dtype.value, sizes.n, sizes.r, target.lanes, 1).text for v in weights}
        return lambda schedule: texts

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        _, found = layer(kernel, target)
        rows = eval_dim(found.m, sizes)
        fixed = {"rows": log2(rows), "n": log2(found.n), "k": log2(found.k), "weights": log2(found.r)}

        def describe(schedule: Schedule) -> dict[str, float]:
            assert isinstance(schedule, SparseSchedule)
            return {**fixed, "tasks": float(eval_dim(found.tasks(schedule), sizes))}

        return describe

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        if (reason := self.match(kernel, target)) or not isinstance(schedule, SparseSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {reason}")
        schedule.validate(target)
        op, sizes = layer(kernel, target)
        dims = tuple(kernel.symbols())
        specs = [(f"a{i}", arg.dtype.value) for i, arg in enumerate(kernel.args)]
        with Kernel(symbol, target, dims, [*specs, ("y", op.x.dtype.value)]) as built:
            by_value = dict(zip(kernel.args, built.buffers))
            x, values, columns = (by_value[v] for v in op.operands)  # type: ignore[index]
            _Sparse(built, sizes, schedule, x, values, columns, built.buffers[-1]).emit(dim_value(sizes.m, built.dims))
        layouts = dict(self.layouts(kernel, target)(schedule))
        return KernelCode(symbol, compile_kernel(built), dims, sizes.tasks(schedule), packing=layouts)


def layer(kernel: Function, target: CpuTarget) -> tuple[ops.SparseLinear, Sizes]:
    """The layer of a kernel that ``match`` accepts."""
    op = next(op for op in kernel.body if isinstance(op, ops.SparseLinear))
    n, r = map(int, op.values.shape)
    return op, Sizes(n, int(op.x.shape[-1]), r, as_dim(product(op.x.shape[:-1])), target.lanes)


@dataclass(frozen=True)
class _Sparse:
    """One emission."""

    kernel: Kernel
    sizes: Sizes
    schedule: SparseSchedule
    x: Buffer
    values: Buffer
    columns: Buffer
    y: Buffer

    def emit(self, m: Val) -> None:
        kernel, lanes, most = self.kernel, self.kernel.lanes, self.sizes.panels
        blocks = -(-most // self.schedule.panels)
        wide = kernel.scratch(self.stride * lanes, "f32")
        square = kernel.scratch(lanes * lanes, "f32")
        with kernel.loop(kernel.begin, kernel.end, carry=[m]) as tasks:
            row, first = tasks.index // blocks * lanes, tasks.index % blocks * self.schedule.panels
            last = (first + self.schedule.panels).min(constant(most))
            rows = (m - row).min(constant(lanes))
            few, fresh = rows <= _FEW, row.ne(tasks.values[0])
            with kernel.when(fresh & few):
                self._widen(row, rows, wide)
            with kernel.when(fresh & ~few):
                self._turn(row, rows, wide)
            with kernel.loop(first, last) as panels:
                with kernel.when(few), kernel.loop(0, rows) as loop:
                    self._gather(panels.index, row, loop.index, wide)
                with kernel.when(~few):
                    self._multiply(panels.index, row, rows, wide, square)
            tasks.next(row)

    @property
    def stride(self) -> int:
        """From one row of x to the next where they are kept in f32."""
        return -(-self.sizes.k // self.kernel.lanes) * self.kernel.lanes

    def _inside(self, panel: Val) -> Val | None:
        """Which features of a panel there are; None for all of every panel."""
        n, lanes = self.sizes.n, self.kernel.lanes
        return None if n % lanes == 0 else self.kernel.mask(n - panel * lanes, lanes)

    def _load(self, row: Val, k: Val) -> Val:
        """A vector of x as f32, with zeros past its end."""
        lanes = self.kernel.lanes
        whole = self.sizes.k % lanes == 0
        mask = None if whole else self.kernel.mask(self.sizes.k - k, lanes)
        return self.x.load(row * self.sizes.k + k, lanes, mask).to("f32")

    # --- few rows -----------------------------------------------------------------------------------------------------

    def _widen(self, row: Val, rows: Val, wide: Buffer) -> None:
        lanes = self.kernel.lanes
        with self.kernel.loop(0, rows) as each, self.kernel.loop(0, self.sizes.k, lanes) as loop:
            wide.store(self._load(row + each.index, loop.index), each.index * self.stride + loop.index)

    def _gather(self, panel: Val, first: Val, row: Val, wide: Buffer) -> None:
        kernel, lanes, n = self.kernel, self.kernel.lanes, self.sizes.n
        start, x = panel * (self.sizes.r * lanes), wide.at(row * self.stride)
        with kernel.loop(0, self.sizes.r, carry=[constant(0.0, "f32", lanes)]) as loop:
            place = start + loop.index * lanes
            picked = x.gather(self.columns.load(place, lanes).to("i32"))
            loop.next(fma(picked, self.values.load(place, lanes).to("f32"), loop.values[0]))
        (total,) = loop.results
        self.y.store(total.to(self.y.dtype), (first + row) * n + panel * lanes, self._inside(panel))

    # --- many rows ----------------------------------------------------------------------------------------------------

    def _turn(self, row: Val, rows: Val, wide: Buffer) -> None:
        """Columns of all rows side by side; rows past the end are those of the last row again."""
        lanes = self.kernel.lanes
        with self.kernel.loop(0, self.sizes.k, lanes) as loop:
            vectors = [self._load(row + (rows - 1).min(constant(i)), loop.index) for i in range(lanes)]
            for i, vector in enumerate(transposed(vectors)):
                wide.store(vector, (loop.index + i) * lanes)

    def _multiply(self, panel: Val, row: Val, rows: Val, wide: Buffer, square: Buffer) -> None:
        kernel, lanes, n = self.kernel, self.kernel.lanes, self.sizes.n
        start = panel * (self.sizes.r * lanes)
        with kernel.loop(0, self.sizes.r, carry=[constant(0.0, "f32", lanes)] * lanes) as loop:
            place = start + loop.index * lanes
            totals = []
            for i, total in enumerate(loop.values):
                column = self.columns.load(place + i).to("index")
                weight = self.values.load(place + i).to("f32").splat(lanes)
                totals.append(fma(wide.load(column * lanes, lanes), weight, total))
            loop.next(*totals)
        for i, vector in enumerate(transposed(loop.results)):
            square.store(vector, i * lanes)
        mask = self._inside(panel)
        with kernel.loop(0, rows) as loop:
            value = square.load(loop.index * lanes, lanes).to(self.y.dtype)
            self.y.store(value, (row + loop.index) * n + panel * lanes, mask)


def transposed(rows: list[Val]) -> list[Val]:
    """As many vectors as they have lanes, turned: exchanges of ever larger blocks (Eklundh 1972)."""
    lanes, out = len(rows), list(rows)
    step = 1
    while step < lanes:
        low = [i - step + lanes if i & step else i for i in range(lanes)]
        high = [i + lanes if i & step else i + step for i in range(lanes)]
        for i in (i for i in range(lanes) if not i & step):
            a, b = out[i], out[i + step]
            out[i], out[i + step] = shuffle(a, b, low), shuffle(a, b, high)
        step *= 2
    return out
