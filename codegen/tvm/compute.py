"""IR operations as tensor expressions: one function an operation, over tensors in their arithmetic types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import te, tirx
from tvm.ir import prim

from tilewright.codegen.tvm.dims import computed, size
from tilewright.ir import Op, ops

Names = Mapping[str, Any]
Build = Callable[[Any, Sequence[Any], Names], Sequence[Any]]
TABLE: dict[type[Op], Build] = {}


def lowers(kind: type[Op]) -> Callable[[Build], Build]:
    """Register the tensor expression of an operation."""

    def register(build: Build) -> Build:
        TABLE[kind] = build
        return build

    return register


def shape_of(op: Op, names: Names, result: int = 0) -> list[Any]:
    return [size(d, names) for d in op.results[result].shape]


def const(value: float, dtype: str = "float32") -> Any:
    return tirx.const(value, dtype)


def int64(value: int) -> Any:
    return tirx.const(value, "int64")


def over(name: str, extent: Any) -> Any:
    return te.reduce_axis((int64(0), extent if not isinstance(extent, int) else int64(extent)), name)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "relu": lambda x: te.max(x, const(0.0)),
    "silu": lambda x: x / (const(1.0) + te.exp(-x)),
    "gelu": lambda x: const(0.5) * x * (const(1.0) + te.erf(x * const(math.sqrt(0.5)))),
    "gelu_tanh": lambda x: const(0.5) * x * (
        const(1.0) + te.tanh(const(math.sqrt(2 / math.pi)) * (x + const(0.044715) * x * x * x))
    ),
}  # fmt: skip


@lowers(ops.Matmul)
def matmul(op: ops.Matmul, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    a, b = tensors
    k = over("k", size(op.a.shape[-1], names))

    def lead(value: Any, index: Sequence[Any]) -> list[Any]:
        own = value.shape[:-2]
        return [int64(0) if d == 1 else i for d, i in zip(own, index[len(index) - len(own) :])]

    def at(*i: Any) -> Any:
        *outer, m, n = i
        return te.sum(a(*lead(op.a, outer), m, k) * b(*lead(op.b, outer), k, n), axis=k)

    return [te.compute(shape_of(op, names), at, name="matmul")]


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are written the same."""
    return bool(prim.expr_deep_equal(a, b))


def padded(x: Any, low: Sequence[int], extent: Sequence[Any], fill: float) -> Any:
    """x with ``low`` elements of ``fill`` before each spatial axis, read as if ``extent`` long."""
    if not any(low) and fill == 0.0 and all(map(same_size, extent, x.shape[2:])):
        return x
    spatial = x.shape[2:]

    def at(n: Any, c: Any, *s: Any) -> Any:
        inside = tirx.all(*[t for i, p, d in zip(s, low, spatial) for t in (i >= p, i - p < d)])
        value = x(n, c, *(i - p for i, p in zip(s, low)))
        return tirx.if_then_else(inside, value, tirx.const(fill, x.dtype))

    return te.compute([*x.shape[:2], *extent], at, name="padded")


def windows(op: Any, names: Names, kernel: Sequence[int], dilation: Sequence[int]) -> list[Any]:
    """How far the windows of ``op`` reach into the padded input, an axis each."""
    out = shape_of(op, names)[2:]
    return [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out, op.stride, kernel, dilation)]


@lowers(ops.Conv)
def conv(op: ops.Conv, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    x, w, bias = tensors
    kernel = [int(k) for k in op.weight.shape[2:]]
    channels, groups = int(op.weight.shape[1]), op.groups
    if op.transposed:
        y = transposed_conv(op, x, w, names, kernel)
    else:
        x = padded(x, op.padding, windows(op, names, kernel, op.dilation), 0.0)
        per_group = int(op.weight.shape[0]) // groups
        axes = [over("c", channels), *(over(f"k{i}", k) for i, k in enumerate(kernel))]

        def at(n: Any, o: Any, *s: Any) -> Any:
            c, *ks = axes
            place = [i * st + k * d for i, st, k, d in zip(s, op.stride, ks, op.dilation)]
            base = c if groups == 1 else te.floordiv(o, per_group) * channels + c
            return te.sum(x(n, base, *place) * w(o, c, *ks), axis=axes)

        y = te.compute(shape_of(op, names), at, name="conv")
    return [y if bias is None else te.compute(y.shape, lambda n, o, *s: y(n, o, *s) + bias(o), name="biased")]


def transposed_conv(op: ops.Conv, x: Any, w: Any, names: Names, kernel: Sequence[int]) -> Any:
    """Each output gathers the inputs whose window reaches it."""
    inputs, outputs, groups = int(op.weight.shape[0]), int(op.weight.shape[1]), op.groups
    axes = [over("c", inputs // groups), *(over(f"k{i}", k) for i, k in enumerate(kernel))]

    def at(n: Any, o: Any, *s: Any) -> Any:
        c, *ks = axes
        reach = [i + p - k * d for i, p, k, d in zip(s, op.padding, ks, op.dilation)]
        place = [te.floordiv(r, st) for r, st in zip(reach, op.stride)]
        tests = [t for r, st, i, d in zip(reach, op.stride, place, x.shape[2:])
                 for t in (te.floormod(r, st) == 0, i >= 0, i < d)]  # fmt: skip
        channel = te.floordiv(o, outputs) * (inputs // groups) + c
        weight = w(channel, te.floormod(o, outputs), *ks)
        return te.sum(tirx.if_then_else(tirx.all(*tests), x(n, channel, *place) * weight, const(0.0, x.dtype)), axis=axes)

    return te.compute(shape_of(op, names), at, name="conv")


@lowers(ops.MaxPool)
def max_pool(op: ops.MaxPool, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    (x,) = tensors
    x = padded(x, op.padding, windows(op, names, op.kernel, op.dilation), -math.inf)
    axes = [over(f"k{i}", k) for i, k in enumerate(op.kernel)]

    def at(n: Any, c: Any, *s: Any) -> Any:
        return te.max(x(n, c, *(i * st + k * d for i, st, k, d in zip(s, op.stride, axes, op.dilation))), axis=axes)

    return [te.compute(shape_of(op, names), at, name="pool")]


@lowers(ops.AvgPool)
def avg_pool(op: ops.AvgPool, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    (source,) = tensors
    once = [1] * len(op.kernel)
    x = padded(source, op.padding, windows(op, names, op.kernel, once), 0.0)
    axes = [over(f"k{i}", k) for i, k in enumerate(op.kernel)]
    total = te.compute(
        shape_of(op, names),
        lambda n, c, *s: te.sum(x(n, c, *(i * st + k for i, st, k in zip(s, op.stride, axes))), axis=axes),
        name="pool",
    )

    def count(*s: Any) -> Any:
        if op.count_include_pad:
            return const(float(math.prod(op.kernel)))
        product = const(1.0)
        for i, st, p, k, d in zip(s, op.stride, op.padding, op.kernel, source.shape[2:]):
            first = i * st - p
            product = product * (te.min(first + k, d) - te.max(first, int64(0))).astype("float32")
        return product

    return [te.compute(total.shape, lambda n, c, *s: total(n, c, *s) / count(*s), name="mean")]


@lowers(ops.AdaptiveAvgPool)
def adaptive_avg_pool(op: ops.AdaptiveAvgPool, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    (x,) = tensors
    spatial = x.shape[2:]
    # A window is at most ceil(n / size) + 1 long; elements past its end count as nothing.
    axes = [over(f"k{i}", te.floordiv(n + s - 1, s) + 1) for i, (n, s) in enumerate(zip(spatial, op.size))]

    def bounds(i: Any, n: Any, s: int) -> tuple[Any, Any]:
        return te.floordiv(i * n, s), te.floordiv((i + 1) * n + s - 1, s)

    def at(n: Any, c: Any, *s: Any) -> Any:
        ranges = [bounds(i, d, z) for i, d, z in zip(s, spatial, op.size)]
        inside = tirx.all(*[low + k < high for (low, high), k in zip(ranges, axes)])
        value = x(n, c, *(low + k for (low, _), k in zip(ranges, axes)))
        return te.sum(tirx.if_then_else(inside, value, const(0.0, x.dtype)), axis=axes)

    total = te.compute(shape_of(op, names), at, name="pool")

    def mean(n: Any, c: Any, *s: Any) -> Any:
        count = const(1.0)
        for i, d, z in zip(s, spatial, op.size):
            low, high = bounds(i, d, z)
            count = count * (high - low).astype("float32")
        return total(n, c, *s) / count

    return [te.compute(total.shape, mean, name="mean")]


@lowers(ops.Resize)
def resize(op: ops.Resize, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    (y,) = tensors
    for axis, out in enumerate(op.size, 2):
        y = resize_axis(op, y, axis, out)
    return [y]


def resize_axis(op: ops.Resize, x: Any, axis: int, out: int) -> Any:
    n = x.shape[axis]
    last = n - 1

    def pick(index: tuple[Any, ...], i: Any) -> Any:
        return x(*index[:axis], i, *index[axis + 1 :])

    def nearest(*index: Any) -> Any:
        return pick(index, te.min(te.floordiv(index[axis] * n, out), last))

    def linear(*index: Any) -> Any:
        i, half, zero = index[axis].astype("float64"), const(0.5, "float64"), const(0.0, "float64")
        if op.align_corners:
            at = i * (last.astype("float64") / const(float(max(out - 1, 1)), "float64"))
        else:
            at = (i + half) * (n.astype("float64") / const(float(out), "float64")) - half
            at = te.min(te.max(at, zero), last.astype("float64"))
        low = te.floor(at).astype("int64")
        part = (at - low.astype("float64")).astype("float32")
        return pick(index, low) * (const(1.0) - part) + pick(index, te.min(low + 1, last)) * part

    shape = [*x.shape[:axis], int64(out), *x.shape[axis + 1 :]]
    return te.compute(shape, nearest if op.mode == "nearest" else linear, name=f"resize{axis}")


@lowers(ops.CumSum)
def cumsum(op: ops.CumSum, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    (x,) = tensors
    k = over("k", x.shape[op.axis])

    def at(*i: Any) -> Any:
        value = x(*i[: op.axis], k, *i[op.axis + 1 :])
        return te.sum(tirx.if_then_else(k <= i[op.axis], value, const(0, x.dtype)), axis=k)

    return [te.compute(x.shape, at, name="cumsum")]


def ranked(x: Any, axis: int, descending: bool) -> Any:
    """The place of each element in a stable sort along ``axis``."""
    j = over("j", x.shape[axis])

    def at(*i: Any) -> Any:
        mine, other = x(*i), x(*i[:axis], j, *i[axis + 1 :])
        before = other > mine if descending else other < mine
        tie = tirx.all(other == mine, j < i[axis])
        return te.sum(tirx.any(before, tie).astype("int64"), axis=j)

    return te.compute(x.shape, at, name="rank")


def by_rank(op: Any, x: Any, axis: int, descending: bool, names: Names) -> Sequence[Any]:
    """Values and indices in sorted order: output p takes the element whose rank is p."""
    rank = ranked(x, axis, descending)
    shape = shape_of(op, names)
    k = over("k", x.shape[axis])

    def index_at(*i: Any) -> Any:
        hit = rank(*i[:axis], k, *i[axis + 1 :]) == i[axis]
        return te.sum(tirx.if_then_else(hit, k, int64(0)), axis=k)

    index = te.compute(shape, index_at, name="index")
    values = te.compute(shape, lambda *i: x(*i[:axis], index(*i), *i[axis + 1 :]), name="values")
    return [values, index]


@lowers(ops.Sort)
def sort(op: ops.Sort, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    return by_rank(op, tensors[0], op.axis, op.descending, names)


@lowers(ops.TopK)
def top_k(op: ops.TopK, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    return by_rank(op, tensors[0], op.axis, op.largest, names)


@lowers(ops.Experts)
def experts(op: ops.Experts, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    x, indices, weights, up, down, up_bias, down_bias = tensors
    tokens, chosen = (size(d, names) for d in op.indices.shape)
    hidden, inner = int(op.gate_up.shape[2]), int(op.gate_up.shape[1])
    width = inner // 2 if op.gated else inner
    h, i = over("h", hidden), over("i", width)
    first = te.compute(
        [tokens, chosen, int64(inner)],
        lambda t, j, f: te.sum(x(t, h) * up(indices(t, j), f, h), axis=h),
        name="up",
    )

    def inner_at(t: Any, j: Any, f: Any) -> Any:
        def row(c: Any) -> Any:
            return first(t, j, c) if up_bias is None else first(t, j, c) + up_bias(indices(t, j), c)

        act = ACTIVATIONS[op.act]
        value = act(row(f)) * row(f + width) if op.gated else act(row(f))
        return value * weights(t, j)

    middle = te.compute([tokens, chosen, int64(width)], inner_at, name="middle")
    j = over("j", chosen)
    y = te.compute(
        [tokens, int64(hidden)],
        lambda t, o: te.sum(middle(t, j, i) * down(indices(t, j), o, i), axis=[j, i]),
        name="down",
    )
    if down_bias is None:
        return [y]
    j2 = over("j2", chosen)
    bias = te.compute(y.shape, lambda t, o: te.sum(weights(t, j2) * down_bias(indices(t, j2), o), axis=j2), name="bias")
    return [te.compute(y.shape, lambda t, o: y(t, o) + bias(t, o), name="sum")]


@lowers(ops.ScatterND)
def scatter_nd(op: ops.ScatterND, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    """Output-centred: each element looks for the last update that hits it, or adds all that do."""
    x, *indices, updates = tensors
    lead = len(indices)
    rank = max(len(v.shape) for v in op.indices)
    extent = [max((v.shape[a - rank + len(v.shape)] for v in op.indices if a - rank + len(v.shape) >= 0), key=str)
              for a in range(rank)]  # fmt: skip
    axes = [over(f"u{a}", size(d, names)) for a, d in enumerate(extent)]

    def index_at(n: int) -> Any:
        own = op.indices[n].shape
        picked = [int64(0) if d == 1 else a for d, a in zip(own, axes[rank - len(own) :])]
        return indices[n](*picked) if own else indices[n](int64(0))

    def update_at(rest: Sequence[Any], at: Sequence[Any]) -> Any:
        full = [*at, *rest]
        own = op.updates.shape
        return updates(*([int64(0) if d == 1 else i for d, i in zip(own, full[len(full) - len(own) :])] or [int64(0)]))

    def hits(i: Sequence[Any]) -> Any:
        return tirx.all(*[index_at(n) == i[n] for n in range(lead)])

    if op.accumulate:
        def added(*i: Any) -> Any:
            return te.sum(tirx.if_then_else(hits(i), update_at(i[lead:], axes), const(0, x.dtype)), axis=axes)

        total = te.compute(x.shape, added, name="added")
        return [te.compute(x.shape, lambda *i: x(*i) + total(*i), name="scattered")]
    flat: Any = int64(0)
    for a, d in zip(axes, extent):
        flat = flat * size(d, names) + a
    last = te.compute(
        x.shape, lambda *i: te.max(tirx.if_then_else(hits(i), flat, int64(-1)), axis=axes), name="last"
    )

    def unflatten(p: Any) -> list[Any]:
        out: list[Any] = []
        for d in reversed(extent):
            out.insert(0, te.floormod(p, size(d, names)))
            p = te.floordiv(p, size(d, names))
        return out

    def at(*i: Any) -> Any:
        found = last(*i)
        return tirx.if_then_else(found >= 0, update_at(i[lead:], unflatten(te.max(found, int64(0)))), x(*i))

    return [te.compute(x.shape, at, name="scattered")]


@lowers(ops.ScatterAlong)
def scatter_along(op: ops.ScatterAlong, tensors: Sequence[Any], names: Names) -> Sequence[Any]:
    """Output-centred, as :func:`scatter_nd`; other axes of indices may be shorter than those of x."""
    x, indices, src = tensors
    j = over("j", size(op.indices.shape[op.axis], names))

    def inside(i: Sequence[Any]) -> list[Any]:
        return [i[a] < d for a, d in enumerate(indices.shape) if a != op.axis]

    def swap(i: Sequence[Any], p: Any) -> list[Any]:
        return [*i[: op.axis], p, *i[op.axis + 1 :]]

    def last_at(*i: Any) -> Any:
        there = tirx.all(*inside(i), tirx.const(True, "bool"))
        hit = tirx.if_then_else(there, indices(*swap(i, j)) == i[op.axis], tirx.const(False, "bool"))
        return te.max(tirx.if_then_else(hit, j, int64(-1)), axis=j)

    last = te.compute(x.shape, last_at, name="last")

    def at(*i: Any) -> Any:
        found = last(*i)
        return tirx.if_then_else(found >= 0, src(*swap(i, te.max(found, int64(0)))), x(*i))

    return [te.compute(x.shape, at, name="scattered")]


def supported_dtype(op: Op) -> str | None:
    """Why the element types of ``op`` have no tensor expression, or None."""
    kinds = {v.dtype for v in (*op.operands, *op.results)}
    return f"no bool in {op.name}" if any(computed(d) == "int8" and d.value == "bool" for d in kinds) else None
