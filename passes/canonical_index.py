"""``cumsum(full 1)`` -> ``iota``, ``add(iota, 3)`` -> ``iota {start=3}``: positions, however a model counts them."""

from __future__ import annotations

from typing import Any

from tilewright.ir import Dim, DType, Op, Pattern, Rewriter, Value, as_dim, ops
from tilewright.passes.match import is_scalar, made_by, replace, same_shape, scalar

_EXACT = {DType.f32: 2**24, DType.f64: 2**53}
"""Up to which magnitude every integer is a value of the type."""


def running_count(op: ops.CumSum, rw: Rewriter) -> None:
    """``cumsum(full 1)`` -> ``iota {start=1}``, repeated along the other axes."""
    if not is_scalar(op.x, 1):
        return
    length, dtype = op.x.shape[op.axis], op.x.dtype
    count: Op = ops.Iota(length, DType.i64 if dtype.is_float else dtype, 1)
    if not _fits(rw, count, dtype):
        return
    b = rw.before(op)
    row = b.add(ops.Cast(b.add(count), dtype)) if dtype.is_float else b.add(count)
    row = b.add(ops.Reshape(row, tuple(length if i == op.axis else 1 for i in range(len(op.x.shape)))))
    replace(rw, op, ops.Broadcast(row, op.x.shape))


def _largest(rw: Rewriter, dim: Dim) -> int:
    """An upper bound of the magnitude of ``dim``, with every symbol at its largest."""
    if isinstance(dim, int):
        return abs(dim)
    bounds = {s: rw.module.dims[str(s)][1] for s in dim.free_symbols}
    return sum(abs(int(t.subs(bounds))) for t in (dim.args if dim.is_Add else (dim,)))


def _fits(rw: Rewriter, op: Op, dtype: DType) -> bool:
    """Whether every element of an iota is an integer that ``dtype`` holds exactly."""
    if not isinstance(op, ops.Iota):
        return False
    top = _largest(rw, op.length) * abs(op.step) + _largest(rw, op.start)
    return not dtype.is_float or top <= _EXACT.get(dtype, 0)


def shifted(op: ops.Binary, rw: Rewriter) -> None:
    """``iota + 3`` -> ``iota {start=3}``, ``iota * 2`` -> ``iota {step=2}``, also behind an exact cast to float."""
    number = scalar(op.b)
    if not isinstance(op, (ops.Add, ops.Mul)) or number is None or not float(number).is_integer():
        return
    if not same_shape(op.a.shape, op.result.shape):
        return
    cast = made_by(op.a, ops.Cast)
    iota = made_by(cast.x if cast is not None else op.a, ops.Iota)
    if iota is None or (op.b.dtype.is_float and cast is None):
        return
    by = int(number)
    if isinstance(op, ops.Add):
        new = ops.Iota(iota.length, iota.dtype, as_dim(iota.start + by), iota.step)
    else:
        new = ops.Iota(iota.length, iota.dtype, as_dim(iota.start * by), iota.step * by)
    if not _fits(rw, iota, op.a.dtype) or not _fits(rw, new, op.a.dtype):
        return
    replace(rw, op, new if cast is None else ops.Cast(rw.before(op).add(new), cast.dtype))


def whole_again(op: ops.Cast, rw: Rewriter) -> None:
    """An iota cast to float and back -> the iota."""
    inner = made_by(op.x, ops.Cast)
    iota = made_by(inner.x, ops.Iota) if inner is not None else None
    if inner is not None and iota is not None and op.dtype.is_int and _fits(rw, iota, inner.dtype):
        replace(rw, op, ops.Cast(iota.result, op.dtype))


def sliced(op: ops.Slice, rw: Rewriter) -> None:
    """A slice of an iota, maybe with axes of size one -> a shorter iota."""
    reshape = made_by(op.x, ops.Reshape)
    iota = made_by(reshape.x if reshape is not None else op.x, ops.Iota)
    sizes = [i for i, d in enumerate(op.x.shape) if d != 1]
    if iota is None or len(sizes) != 1:
        return
    axis = sizes[0]
    start, step, length = op.starts[axis], op.steps[axis], op.result.shape[axis]
    new: Value = rw.before(op).add(ops.Iota(length, iota.dtype, as_dim(iota.start + start * iota.step), iota.step * step))
    replace(rw, op, ops.Reshape(new, op.result.shape))


def single(op: ops.Iota, rw: Rewriter) -> None:
    """An iota of one element -> a constant."""
    if isinstance(op.length, int) and op.length == 1 and isinstance(op.start, int):
        replace(rw, op, ops.Full((1,), op.start, op.dtype))


def late_rows(op: ops.Embedding | ops.Gather, rw: Rewriter) -> None:
    """Rows picked by repeated or regrouped indices -> the rows, repeated or regrouped."""
    source: Any = op.indices.owner
    if isinstance(op, ops.Gather) and op.axis != 0:
        return
    b, indices = rw.before(op), op.indices
    if isinstance(source, ops.Full) and source.shape:
        indices = b.add(ops.Full((), source.value, source.dtype))
    elif isinstance(source, (ops.Broadcast, ops.Reshape)):
        indices = source.x
    if indices is op.indices:
        return
    rows = b.insert(op.clone({op.indices: indices})).result
    regroup = ops.Reshape if isinstance(source, ops.Reshape) else ops.Broadcast
    replace(rw, op, regroup(rows, op.result.shape))


def constant_index(op: ops.Gather, rw: Rewriter) -> None:
    """``gather(x, full 2)`` and ``gather(x, iota)`` of static size -> a slice."""
    index, axis, shape = op.indices, op.axis, op.x.shape
    number, iota = scalar(index), made_by(index, ops.Iota)
    start, size, step = number, 1, 1
    if iota is not None and isinstance(iota.length, int) and isinstance(iota.start, int) and iota.step > 0:
        start, size, step = iota.start, iota.length, iota.step
    last = start + (size - 1) * step if isinstance(start, int) else -1
    if not isinstance(start, int) or start < 0 or not isinstance(shape[axis], int) or last >= shape[axis]:
        return
    if iota is None and not all(d == 1 for d in index.shape):
        return
    starts = tuple(start if i == axis else 0 for i in range(len(shape)))
    stops = tuple(last + 1 if i == axis else d for i, d in enumerate(shape))
    steps = tuple(step if i == axis else 1 for i in range(len(shape)))
    part = rw.before(op).add(ops.Slice(op.x, starts, stops, steps))
    replace(rw, op, ops.Reshape(part, op.result.shape))


def known_rows(op: ops.TakeAlong | ops.Gather | ops.GatherND, rw: Rewriter) -> None:
    """Elements picked from equal ones -> as many of them."""
    number = scalar(op.x)
    if number is not None:
        replace(rw, op, ops.Full(op.result.shape, number, op.result.dtype))


PATTERNS: tuple[Pattern, ...] = (running_count, shifted, whole_again, sliced, single, late_rows, constant_index, known_rows)
