"""TVM kernels: one IR operation -> tensor expression -> schedule by rule -> TIR with our calling convention -> object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import sympy

from tilewright.codegen.features import log2
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.schedule import Schedule, Space, constraint, knob, registers
from tilewright.codegen.target import CpuTarget
from tilewright.ir import CodegenError, Dim, Function, Op, Return, as_dim, eval_dim, product, sym

_LONGEST_SORT = 8192


@dataclass(frozen=True)
class TvmSchedule(Schedule):
    """``inner``: how many trailing axes of the result stay inside one task; the others are split over threads.

    Of a reduction, ``tile`` elements of the last axis by ``rows`` of the one before are summed at once, where these divide
    the axes; 0 is the whole axis. Loops of up to ``unroll`` steps are written out.
    """

    name: ClassVar[str] = "tvm"
    inner: int = knob(1, (1, 2, 3))
    tile: int = knob(0, (0, 8, 16, 32, 64, 128))
    rows: int = knob(1, (1, 2, 4, 7, 8))
    unroll: int = knob(0, (0, 16, 64, 256))

    @constraint
    def fits_registers(self, target: CpuTarget) -> str | None:
        vectors = self.rows * -(-self.tile // target.lanes)
        return f"a tile of {vectors} vectors" if vectors > registers(target) else None

    @constraint
    def rows_have_a_tile(self, target: CpuTarget) -> str | None:
        return "rows of whole axes" if self.rows > 1 and not self.tile else None


class TvmEmitter:
    """The long tail: convolution, pooling, resizing, sorting, scatter, experts, batched matmul."""

    name: ClassVar[str] = "tvm"

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        from tilewright.codegen.tvm.compute import TABLE, supported_dtype
        from tilewright.ir import ops

        body = [op for op in kernel.body if not isinstance(op, Return)]
        if len(body) != 1:
            return f"{len(body)} operations in one kernel; there is a tensor expression only for one"
        op = body[0]
        if type(op) not in TABLE:
            return f"{op.name} has no tensor expression"
        if isinstance(op, (ops.Sort, ops.TopK)):
            n = op.x.shape[op.axis]
            if not isinstance(n, int) or n > _LONGEST_SORT:
                return f"sorting {n} elements (at most {_LONGEST_SORT}, known when compiling)"
        return supported_dtype(op)

    def default_schedule(self, kernel: Function, target: CpuTarget) -> Schedule:
        return TvmSchedule()

    def space(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]) -> Space:
        """Tiles are those that divide the axes of a reduction's result."""
        shape = kernel.body[0].results[0].shape
        narrow: dict[str, Sequence[int]] = {"inner": range(1, max(len(shape), 2))}
        for key, axis in (("tile", 1), ("rows", 2)):
            size = shape[-axis] if len(shape) > axis and _reduces(kernel.body[0]) else 1
            narrow[key] = [n for n in TvmSchedule.domains()[key] if n and divides(n, size)]
        return Space(TvmSchedule, target, TvmSchedule(), narrow)

    def layouts(self, kernel: Function, target: CpuTarget) -> Callable[[Schedule], Mapping[int, str]]:
        return lambda schedule: {}

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        op = kernel.body[0]
        shape = [eval_dim(d, sizes) for d in op.results[0].shape]
        total, flops = max(product(shape), 1), eval_dim(op.flops(), sizes)
        last = {f"axis{i}": log2(d) for i, d in enumerate(reversed((1, 1, 1, 1, *shape)[-4:]), 1)}

        def describe(schedule: Schedule) -> dict[str, float]:
            assert isinstance(schedule, TvmSchedule)
            tasks = float(product(shape[: split_axes(op.results[0].shape, schedule.inner)]))
            vectors = schedule.rows * -(-(schedule.tile or shape[-1] if shape else 1) // target.lanes)
            own = {"tasks": tasks, "vectors": float(vectors), "task_elements": log2(total / max(tasks, 1))}
            return {f"op.{op.name}": 1.0, **last, "work": log2(flops / total), **own}

        return describe

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        if not isinstance(schedule, TvmSchedule):
            raise CodegenError(f"{self.name} takes a tvm schedule, not {schedule}")
        op = kernel.body[0]
        dims = tuple(kernel.symbols())
        outer = split_axes(op.results[0].shape, schedule.inner)
        function = scheduled(*expressed(kernel), outer, schedule)
        scratch = tuple(buffer_bytes(b) for b in function.body.block.alloc_buffers)
        function = with_tasks(function, dims)
        tasks: Dim = as_dim(product(op.results[0].shape[:outer]))
        return KernelCode(symbol, compile_tir(function, symbol, target), dims, tasks, scratch=scratch)


def _reduces(op: Op) -> bool:
    """Whether elements of the result are sums over some axis."""
    return op.flops() != 0


def split_axes(shape: Sequence[Dim], inner: int) -> int:
    """How many leading axes of the result the tasks run over.

    Fusing an axis whose size is not known when compiling would make indices that TVM cannot analyse: such an axis may
    only come first.
    """
    count = 1
    while count < len(shape) - inner and isinstance(shape[count], int):
        count += 1
    return count


def expressed(kernel: Function) -> tuple[Any, list[str]]:
    """TIR of a kernel's one operation over buffers ``args..., results...``, and the names of the results' stages."""
    from tvm import te, tirx

    from tilewright.codegen.tvm.compute import TABLE
    from tilewright.codegen.tvm.dims import narrowed, placeholder, widened

    op = kernel.body[0]
    names = {d: tirx.Var(d, "int64") for d in kernel.symbols()}
    inputs = {v: placeholder(v, f"a{i}", names) for i, v in enumerate(kernel.args)}
    wide = {v: widened(t, v.dtype) for v, t in inputs.items()}
    results = TABLE[type(op)](op, [None if v is None else wide[v] for v in op.operand_slots()], names)
    outputs = [narrowed(t, r.dtype) for t, r in zip(results, op.results)]
    return te.create_prim_func([*inputs.values(), *outputs]), [t.op.name for t in outputs]


def scheduled(function: Any, outputs: Sequence[str], outer: int, schedule: TvmSchedule) -> Any:
    """One outer loop over tasks; in it, everything that leads to the outputs."""
    from tvm import s_tir

    sch = s_tir.Schedule(function)
    blocks = [b for b in blocks_of(sch) if sch.get(b).name_hint not in outputs]
    for block in blocks:
        if not is_reduction(sch, block):
            with suppress(s_tir.ScheduleError):  # what a block cannot take in stays a stage of its own
                sch.compute_inline(block)
    main = sch.get_sblock(outputs[-1])
    loops = sch.get_loops(main)
    tasks = sch.fuse(*loops[:outer]) if outer > 1 else loops[0]
    rest = [b for b in blocks_of(sch) if sch.get(b).name_hint != outputs[-1]]
    for block in reversed(rest):
        # Another output reads this one (values by their indices); everything else comes before it.
        place = sch.reverse_compute_at if sch.get(block).name_hint in outputs else sch.compute_at
        place(block, tasks, preserve_unit_loops=True)
    for block in blocks_of(sch):
        arrange(sch, block, tasks, schedule)
    return sch.mod["main"]


def blocks_of(sch: Any) -> list[Any]:
    """Blocks in order of execution."""
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def is_reduction(sch: Any, block: Any) -> bool:
    return any(v.iter_type == 2 for v in sch.get(block).iter_vars)


def arrange(sch: Any, block: Any, tasks: Any, schedule: TvmSchedule) -> None:
    """Put the last axis of the result innermost, below the reduction, so that it vectorises."""
    if not is_reduction(sch, block):
        return
    loops = sch.get_loops(block)
    at = [sch.get(x).loop_var for x in loops].index(sch.get(tasks).loop_var) + 1
    kinds = [v.iter_type for v in sch.get(block).iter_vars]
    below = loops[at:]
    reducing = sum(k == 2 for k in kinds)
    spatial, reduce = below[: len(below) - reducing], below[len(below) - reducing :]
    if not spatial or not reduce:
        return
    *outer, last = spatial
    rows = []
    if schedule.tile and divides(schedule.tile, extent_of(sch, last)):
        whole, last = sch.split(last, [None, schedule.tile])
        if outer and schedule.rows > 1 and divides(schedule.rows, extent_of(sch, outer[-1])):
            outer[-1], row = sch.split(outer[-1], [None, schedule.rows])
            rows = [row]
        outer.append(whole)
    sch.reorder(*outer, *reduce, *rows, last)
    for row in rows:
        sch.unroll(row)
    if schedule.unroll:
        sch.annotate(reduce[0], "pragma_auto_unroll_max_step", schedule.unroll)
        sch.annotate(reduce[0], "pragma_unroll_explicit", 1)
    sch.decompose_reduction(block, reduce[0])


def divides(part: int, size: Any) -> bool:
    """Whether ``size`` is known when compiling and ``part`` divides it."""
    return isinstance(size, int) and size % part == 0


def extent_of(sch: Any, loop: Any) -> Any:
    """Steps of a loop: an int when they are known."""
    extent = sch.get(loop).extent
    return int(extent) if type(extent).__name__ == "IntImm" else extent


def with_tasks(function: Any, dims: Sequence[str]) -> Any:
    """``function`` over raw pointers as `with_pointers` makes it, its outermost loop cut to ``[begin, end)``."""
    from tvm import tirx

    begin, end = tirx.Var("begin", "int64"), tirx.Var("end", "int64")
    loop = function.body.block.body
    cut = tirx.For(loop.loop_var, begin, end - begin, loop.kind, loop.body)
    return with_pointers(function, dims, [begin, end], cut).with_attr("calling_conv", 1)


def with_pointers(function: Any, dims: Sequence[str], first: Sequence[Any] = (), body: Any = None) -> Any:
    """``function`` with the parameters ``first``, ``dims`` and raw pointers ``p0``...; temporaries become parameters.

    TVM would take temporaries from its own runtime, which an artifact does without. ``body`` is what it does instead.
    """
    from tvm import ir, s_tir, tirx

    variables = {v.name: v for b in function.params for e in b.shape for v in variables_of(e)}
    names = [variables[d] if d in variables else tirx.Var(d, "int64") for d in dims]
    root = function.body.block
    block = s_tir.SBlock([], [], [], root.name_hint, root.body if body is None else body, None, [], [], {})
    buffers = [*function.params, *root.alloc_buffers]
    handles = [tirx.Var(f"p{i}", ir.PointerType(ir.PrimType(str(b.dtype)), "global")) for i, b in enumerate(buffers)]
    declared = [tirx.DeclBuffer(b, data=h) for b, h in zip(buffers, handles)]
    whole = s_tir.SBlockRealize([], tirx.const(True, "bool"), block)
    made = tirx.PrimFunc([*first, *names, *handles], tirx.SeqStmt([*declared, whole]), None, None)
    return made.with_attrs({"s_tir": True, "tirx.noalias": True})


def variables_of(expr: Any) -> list[Any]:
    """The variables in a TVM expression."""
    from tvm import tirx

    return [] if isinstance(expr, int) else list(tirx.analysis.undefined_vars(tirx.Evaluate(expr)))


def buffer_bytes(buffer: Any) -> Dim:
    """Size of a TVM buffer as an IR size."""
    import numpy as np

    return as_dim(product([from_tvm(e) for e in buffer.shape]) * np.dtype(str(buffer.dtype)).itemsize)


def from_tvm(expr: Any) -> Dim:
    """A TVM size as an IR size."""
    kind = type(expr).__name__
    if isinstance(expr, int) or kind == "IntImm":
        return int(expr)
    if kind == "Var":
        return sym(expr.name)
    a, b = from_tvm(expr.a), from_tvm(expr.b)
    combine = {"Add": lambda: a + b, "Sub": lambda: a - b, "Mul": lambda: a * b, "FloorDiv": lambda: a // b,
               "Max": lambda: sympy.Max(a, b), "Min": lambda: sympy.Min(a, b)}  # fmt: skip
    return as_dim(combine[kind]())


def compile_tir(function: Any, symbol: str, target: CpuTarget) -> bytes:
    """Object code of ``function`` under ``symbol`` for exactly the target's features."""
    import tempfile
    from pathlib import Path

    import tvm

    module = tvm.IRModule({symbol: function.with_attr("global_symbol", symbol)})
    built = tvm.compile(module, tvm_target(target))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        built.mod.write_to_file(str(path), "o")
        return path.read_bytes()


@cache
def tvm_target(target: CpuTarget) -> Any:
    import tvm

    features = [f"+{f}" for f in sorted(target.features)]
    return tvm.target.Target({"kind": "llvm", "mcpu": "x86-64", "mattr": features, "num-cores": 1})
