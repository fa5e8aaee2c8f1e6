"""Random modules: a DAG of operations over symbolic shapes, with odd names, attributes and locations."""

from collections.abc import Callable
from typing import Any

import sympy
from hypothesis import strategies as st

from tilewright.ir import (
    Builder,
    Dim,
    DType,
    Function,
    KVType,
    Loc,
    Module,
    Return,
    TensorType,
    Value,
    as_dim,
    dim_text,
    parse_dim,
    sym,
)
from tilewright.ir import ops as o
from tilewright.ir.kv_layouts import Ring, parse_layout

SYMBOLS = ("B", "S", "T", "LONG_1")
names = st.one_of(
    st.sampled_from(["x", "layers.0.up", "0", "none", "a b", '"', "%", "@w", "//", "é\n\t\\", ""]), st.text()
)
locations = st.builds(
    lambda module, place: Loc(module, *place), st.text(max_size=8), st.tuples() | st.tuples(names, st.integers(1, 9999))
)
_LEAF = st.sampled_from([sym(s) for s in SYMBOLS]) | st.integers(1, 9).map(sympy.Integer)


def _combine(inner: Any) -> Any:
    forms: list[Callable[[Any, Any], Any]] = [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        sympy.Max,
        sympy.Min,
    ]
    # sums as divisors are left out: no model has them
    divisor = _LEAF | st.builds(lambda a, b: a * b, _LEAF, _LEAF)
    divided = st.builds(lambda f, a, b: f(a, b), st.sampled_from([lambda a, b: a // b, sympy.Mod]), inner, divisor)
    return st.builds(lambda f, a, b: f(a, b), st.sampled_from(forms), inner, inner) | divided


expressions = st.recursive(_LEAF, _combine, max_leaves=6)
sizes = st.sampled_from([sym(s) for s in SYMBOLS]) | st.integers(0, 9)
# SymPy simplifies an expression further when it is built anew: types here are as the parser would build them
dims = sizes | expressions.map(lambda e: parse_dim(dim_text(as_dim(e)))).filter(
    lambda d: not isinstance(d, int) or d >= 0
)
floats = st.floats(width=32)


@st.composite
def modules(draw: st.DrawFn) -> Module:
    """A valid module with one or two functions and perhaps a cache and a kernel."""
    module = Module(draw(names))
    for s in SYMBOLS:
        low = draw(st.integers(1, 4))
        module.dims[s] = (low, low + draw(st.integers(0, 2**40)))
    module.meta.update(draw(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=2)))
    if draw(st.booleans()):
        _kernel(draw, module)
    _function(draw, module)
    return module


def _type(draw: st.DrawFn, rank: int) -> TensorType:
    dtype = draw(st.sampled_from([DType.f32, DType.bf16, DType.f64]))
    return TensorType(tuple(draw(st.lists(dims, min_size=rank, max_size=rank))), dtype)


def _fresh(draw: st.DrawFn, taken: Any) -> str:
    return draw(names.filter(lambda n: n not in taken))


def _kernel(draw: st.DrawFn, module: Module) -> None:
    f = module.add(Function(_fresh(draw, module.functions), kind="kernel"))
    x = f.arg("a", _type(draw, 2))
    b = Builder(f, loc=draw(locations))
    b.insert(Return([b.add(o.Exp(x)), x]))


def _function(draw: st.DrawFn, module: Module) -> None:
    f = module.add(Function(_fresh(draw, module.functions)))
    b = Builder(f)
    pool: list[Value] = [_argument(draw, f, i) for i in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 8))):
        b.loc = draw(locations)
        step = draw(st.sampled_from(STEPS))
        pool += step(draw, module, b, draw(st.sampled_from(pool)))
    if draw(st.booleans()):
        pool += _cache(draw, module, b)
    b.insert(Return(draw(st.lists(st.sampled_from(pool), max_size=3)), loc=draw(locations)))


def _argument(draw: st.DrawFn, f: Function, index: int) -> Value:
    taken = {a.name or f"arg{i}" for i, a in enumerate(f.args)} | {f"arg{index}", ""}
    return f.arg(_fresh(draw, taken), _type(draw, draw(st.integers(1, 3))))


def _cache(draw: st.DrawFn, module: Module, b: Builder) -> list[Value]:
    layout = parse_layout(draw(st.sampled_from(["contiguous", "paged<32>", "ring<9, 4>", "ring<9, 4, 2>"])))
    codes = {"dtype": DType.i4, "scales": DType.f32} if draw(st.booleans()) else {"dtype": DType.bf16}
    kv = KVType(2, 4, draw(st.integers(1, 8)), draw(st.integers(1, 99)), layout=layout, **codes)
    state = module.state(_fresh(draw, {**module.weights, **module.states}), kv)
    f, n, s = b.function, sym("B"), sym("S")
    q, k, v = (
        f.arg(f"kv.{i}", TensorType((n, s, h, d), DType.f32)) for i, h, d in [(0, 4, 4), (1, 2, 4), (2, 2, kv.vdim)]
    )
    start = f.arg("kv.3", TensorType((n,), DType.i64))
    table = f.arg("kv.4", TensorType((n, sym("T")), DType.i32)) if kv.page else None
    cache = b.add(o.Append(state, k, v, start, table))
    window = draw(st.integers(1 if isinstance(layout, Ring) else -1, 9))
    more = {"table": table, "q_sinks": q if kv.sinks else None}
    return [b.add(o.Attend(q, cache, start, None, None, draw(floats), window, **more))]


def _unary(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    return [b.add(draw(st.sampled_from([o.Exp, o.Neg, o.Silu, o.Round]))(x))]


def _binary(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    y = b.full(draw(floats), like=x) if draw(st.booleans()) else x
    return [b.add(draw(st.sampled_from([o.Add, o.Mul, o.Lt]))(x, y))][: 1 if x.dtype is not DType.bool else 0]


def _full(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    shape = tuple(draw(st.lists(dims, max_size=3)))
    value = draw(floats | st.integers(-(2**31), 2**31) | st.booleans())
    return [b.add(o.Full(shape, value, DType.f32)), b.add(o.Iota(draw(dims), DType.i64, draw(dims), -2))]


def _size(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    return [b.add(o.SizeOf(draw(dims)))]


def _cast(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    return [b.add(o.Cast(x, draw(st.sampled_from(list(DType)))))]


def _move(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    axes = draw(st.permutations(range(x.tensor.rank)))
    flat: Dim = x.tensor.elements
    return [b.add(o.Transpose(x, axes)), b.add(o.Reshape(x, (1, flat))), b.add(o.Concat([x, x], axes[0]))]


def _reduce(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    axis, keep = draw(st.integers(0, x.tensor.rank - 1)), draw(st.booleans())
    found = [b.add(o.Reduce(x, "max", (axis,), keep)), b.add(o.Softmax(x, axis))]
    return found + list(b.add_all(o.Sort(x, axis, keep)))


def _linear(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    taken = {**module.weights, **module.states}
    w = module.weight(_fresh(draw, taken), TensorType((draw(sizes), x.shape[-1]), x.dtype))
    if x.dtype is DType.i8:
        return []
    return [b.add(o.Linear(x, w)), b.add(o.RmsNorm(x, None, draw(floats)))]


def _call(draw: st.DrawFn, module: Module, b: Builder, x: Value) -> list[Value]:
    found: list[Value] = []
    for kernel in module.kernels():
        y = b.add(o.Full(kernel.args[0].shape, 0, kernel.args[0].dtype))
        found += b.add_all(o.Call([y], kernel.name, [v.type for v in kernel.returns]))
    return found


def _ranked(step: Any) -> Any:
    """``step`` for values that have an axis."""
    return lambda draw, module, b, x: step(draw, module, b, x) if x.tensor.rank else []


STEPS = [_unary, _binary, _full, _size, _cast, _ranked(_move), _ranked(_reduce), _ranked(_linear), _call]
