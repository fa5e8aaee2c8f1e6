"""What operations of a loop kernel cost: which rows are worth keeping, and how many tasks are a thread's worth."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from tilewright.codegen import reads as rd
from tilewright.codegen.mlir.loops_quant import keeps_row
from tilewright.codegen.mlir.loops_rows import fits_stack, keeps_exponentials
from tilewright.ir import Dim, Function, Op, Value, ops, product

_DEAR = {
    ops.Exp: 8, ops.Log: 8, ops.Log1p: 12, ops.Sin: 10, ops.Cos: 10, ops.Tanh: 12, ops.Sigmoid: 10, ops.Silu: 10,
    ops.Erf: 14, ops.Gelu: 14, ops.GeluTanh: 12, ops.Softplus: 20, ops.Pow: 30, ops.Div: 2, ops.Sqrt: 2, ops.Rsqrt: 4,
    ops.Mod: 20, ops.FloorDiv: 20, ops.Softmax: 14, ops.LayerNorm: 4, ops.RmsNorm: 3, ops.GroupNorm: 4, ops.Rope: 2,
    ops.Quantize: 4, ops.Dequantize: 3, ops.Lookup: 8, ops.Expand: 4,
}  # fmt: skip
_DEARER_THAN_A_LOAD = 8


def op_weight(op: Op) -> int:
    """Rough cost of one element, in additions."""
    return 0 if isinstance(op, rd.CREATION) else _DEAR.get(type(op), 1)


@dataclass
class _Passes:
    """In which loops each value of a kernel is computed, and how dear one element of it is."""

    kernel: Function
    loops: dict[Value, set[object]] = field(default_factory=dict)
    weights: dict[Value, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for op in self.kernel.body[:-1]:
            for result in op.results:
                self.weights[result] = self.weight(op)

    def weight(self, op: Op) -> int:
        if isinstance(op, ops.Reduce) and not rd.is_trailing(op):
            return 50
        if isinstance(op, rd.FOLDS):
            return 0
        last = op.results[0].shape[-1:]
        varying = [v for v in op.operands if v.shape[-1:] == last and last != (1,)] if last else []
        if isinstance(op, (ops.Reshape, ops.Transpose)):
            varying = op.operands
        return op_weight(op) + sum(self.weights.get(v, 0) for v in varying)

    def run(self, op: Op, mine: set[object]) -> set[object]:
        """The loops in which the operands are read, when the results are needed in the loops ``mine``."""
        if isinstance(op, rd.FOLDS):
            return {(op, 0)}
        if isinstance(op, ops.Quantize):
            return {(op, 0), *(() if keeps_row(op) else mine)}
        if isinstance(op, ops.RmsNorm):
            return {(op, 0), *mine}
        if isinstance(op, (ops.LayerNorm, ops.GroupNorm)):
            return {(op, 0), (op, 1), *mine}
        if isinstance(op, ops.Softmax):
            return {(op, 0), (op, 1), *(() if keeps_exponentials(op) else mine)}
        return mine


def result_sets(kernel: Function) -> list[list[int]]:
    """Results by their number of elements; those of equal number share a nest."""
    sets: dict[Dim, list[int]] = {}
    for i, value in enumerate(kernel.returns):
        sets.setdefault(sympy.expand(product(value.shape)), []).append(i)
    return list(sets.values())


def rows_on_stack(kernel: Function) -> tuple[frozenset[Value], str | None]:
    """Values whose rows are kept because several loops need them and they are dear; and why one cannot be kept."""
    passes = _Passes(kernel)
    nests = result_sets(kernel)
    for i, value in enumerate(kernel.returns):
        passes.loops.setdefault(value, set()).add("results" if len(nests) == 1 else i)
    kept: set[Value] = set()
    for op in reversed(kernel.body[:-1]):
        result = op.results[0]
        loops = set().union(*(passes.loops.get(r, set()) for r in op.results))
        again = len(loops) > 1 and not isinstance(op, ops.Quantize)
        if again and passes.weights[result] >= _DEARER_THAN_A_LOAD:
            if not fits_stack(result):
                return frozenset(), f"{op.name} is needed in {len(loops)} loops, and its row does not fit the stack"
            kept.add(result)
            passes.loops[result] = {(result, "row")}
        for value in op.operands:
            passes.loops.setdefault(value, set()).update(passes.run(op, loops))
    return frozenset(kept), None


_PICOSECONDS = 25
_PICOSECONDS_A_BYTE = 30
_CHUNK = 3_000_000


def grain(kernel: Function, tasks: Dim) -> Dim:
    """Tasks that take about three microseconds."""
    work = [
        (product((op.operands[0] if isinstance(op, (*rd.FOLDS, *rd.ROWS)) else op.results[0]).shape),
         op_weight(op) * _PICOSECONDS)
        for op in kernel.body[:-1]
        if not _is_table(op.results[0])
    ]  # fmt: skip
    values = (*kernel.returns, *(a for a in kernel.args if not _is_table(a)))
    work += [(product(v.shape), v.dtype.bits * _PICOSECONDS_A_BYTE // 8) for v in values]
    if not isinstance(tasks, int):
        work = [(n, cost) for n, cost in work if not isinstance(n, int)]  # small beside what grows with the tasks
    total = sum((n * cost for n, cost in work), start=sympy.Integer(1) * 0)
    if total == 0:
        return 1
    count = sympy.cancel(_CHUNK * sympy.sympify(tasks) / total)
    return 1 + (int(count) if count.is_Rational else sympy.floor(count))


def _is_table(value: Value) -> bool:
    """Only some rows are read."""
    decoding = (ops.Dequantize, ops.Lookup)
    return any(value in rd.tables(user) or (isinstance(user, decoding) and _is_table(user.result)) for user in value.users)
