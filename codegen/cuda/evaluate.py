"""Values of CUDA kernels: writes the CUDA C of one element of an IR value at an index, operands first.

As in the loop kernels of CPUs nothing is stored between operations, and what an index does not vary with is written
outside of the loop that varies. Scope 0 is the block: what is written there is the same for all its threads, so that they
can fold a row together. In any other scope each thread is on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tilewright.codegen import reads as rd
from tilewright.codegen.index import Atom, Floor, Index, Mod, Poly, Size, Var, at_most, bounds, less, nonnegative
from tilewright.codegen.index_shapes import linear, size
from tilewright.ir import CodegenError, Dim, DType, Op, Value, ops, product

T = TypeVar("T")


@dataclass(frozen=True)
class Val:
    """A C expression without side effects, of an element type that kernels compute in."""

    text: str
    dtype: str

    def to(self, dtype: str) -> Val:
        """The number converted; a bool is true for what is not 0."""
        if dtype == self.dtype:
            return self
        return Val(f"({self.text} != 0)" if dtype == "bool" else f"({dtype}){self.text}", dtype)


@dataclass
class Scope:
    """A block of C under construction, and the values that it has in variables."""

    lines: list[str] = field(default_factory=list)
    known: dict[Any, Any] = field(default_factory=dict)


def compute_dtype(dtype: DType) -> str:
    """The element type that kernels compute in: narrow floats widen to f32, integers of four bits or fewer take eight."""
    if dtype in (DType.bf16, DType.f16) or dtype.is_narrow_float:
        return "f32"
    return f"{dtype.value[0]}8" if dtype.bits < 8 else dtype.value


def stored_dtype(dtype: DType) -> str:
    """The C type of a tensor in memory."""
    return "u8" if dtype.bits < 8 or dtype.is_narrow_float else dtype.value


def literal(value: float | int | bool, dtype: str) -> Val:
    """A constant."""
    if dtype in ("f32", "f64"):
        number = float(value)
        if number != number:
            text = "__int_as_float(0x7fc00000)"
        elif abs(number) == float("inf"):
            text = "TW_INF" if number > 0 else "(-TW_INF)"
        else:
            text = f"{number!r}{'f' if dtype == 'f32' else ''}"
        return Val(f"({text})" if text.startswith("-") else text, dtype)
    if dtype == "bool":
        return Val("true" if value else "false", dtype)
    return Val(f"(({dtype}){int(value)}ll)", dtype)


class Writer:
    """Scopes of C, loops in them, and index arithmetic as C."""

    def __init__(self) -> None:
        self.scopes = [Scope()]
        self.barrier = 0
        """Nothing moves out of the conditional block at this level."""
        self._names = 0

    @property
    def lines(self) -> list[str]:
        return self.scopes[-1].lines

    def name(self, prefix: str = "v") -> str:
        self._names += 1
        return f"{prefix}{self._names}_"  # no dim is called so, no type either

    def put(self, line: str) -> None:
        self.lines.append(line)

    def memo(self, key: Any, depth: int, make: Callable[[], T]) -> T:
        """The value of ``key``, made in the scope ``depth`` when it is not known yet."""
        place = max(depth, self.barrier)
        for scope in self.scopes[depth : place + 1]:
            if key in scope.known:
                found: T = scope.known[key]
                return found
        inner, self.scopes = self.scopes, self.scopes[: place + 1]
        try:
            self.scopes[-1].known[key] = value = make()
        finally:
            self.scopes = inner
        return value

    def keep(self, val: Val) -> Val:
        """``val`` in a variable of the current scope."""
        name = self.name()
        self.put(f"const {val.dtype} {name} = {val.text};")
        return Val(name, val.dtype)

    def keep_number(self, text: str) -> str:
        """An i64 in a variable of the current scope."""
        return self.keep(Val(text, "i64")).text

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """``head { ... }`` with a scope of its own."""
        self.scopes = [*self.scopes, Scope()]
        try:
            yield
        finally:
            inner = self.scopes[-1]
            self.scopes = self.scopes[:-1]
        self.lines.extend([f"{head} {{", *(f"  {line}" for line in inner.lines), "}"])

    def fenced(self, head: str, build: Callable[[], None]) -> None:
        """A conditional block: what is written in there stays in there."""
        outer, self.barrier = self.barrier, len(self.scopes)
        try:
            with self.block(head):
                build()
        finally:
            self.barrier = outer

    def variable(self, low: Poly | int, high: Poly | int, text: str) -> Poly:
        """A fresh variable of the current scope, with the C expression ``text`` and ``low <= value <= high``."""
        return Poly.of(Var(self.name("x"), Poly.of(low), Poly.of(high), len(self.scopes) - 1, text))

    @contextmanager
    def loop(self, count: Poly, start: str = "0", step: str = "1") -> Iterator[Poly]:
        """``for (i = start; i < count; i += step)``; gives i."""
        name = self.name("i")
        with self.block(f"for (i64 {name} = {start}; {name} < {self.number(count)}; {name} += {step})"):
            yield self.variable(0, count - 1, name)

    def number(self, poly: Poly) -> str:
        """A polynomial as a C expression of type i64."""
        if poly.constant is not None:
            return str(poly.constant)
        parts = []
        for atoms, factor in poly.terms:
            factors = [self._atom(a) for a in atoms]
            parts.append(" * ".join(factors if factor == 1 and factors else [*factors, str(factor)]))
        return f"({' + '.join(parts)})"

    def _atom(self, atom: Atom) -> str:
        if isinstance(atom, Var):
            return str(atom.val)
        if isinstance(atom, Size):
            return self._size(atom)
        assert isinstance(atom, (Floor, Mod))
        return self.memo(("atom", atom), atom.depth, lambda: self._quotient(atom))

    def _quotient(self, atom: Floor | Mod) -> str:
        num, den = self.number(atom.num), self.number(atom.den)
        if nonnegative(bounds(atom.num)[0]):
            return self.keep_number(f"{num} {'/' if isinstance(atom, Floor) else '%'} {den}")
        return self.keep_number(f"tw_{'floordiv' if isinstance(atom, Floor) else 'mod<i64>'}({num}, {den})")

    def _size(self, atom: Size) -> str:
        if not atom.parts:
            return atom.key
        total, *others = map(self.number, atom.parts)
        for other in others:
            total = f"tw_{'max' if atom.key.startswith('max') else 'min'}({total}, {other})"
        return total


class Evaluator(Writer):
    """``value(v, index)`` writes what computes one element of ``v``.

    ``pointers`` are the C names of what lies in memory; ``made`` gives elements that the kernel has computed otherwise.
    """

    def __init__(self, pointers: Mapping[Value, str],
                 made: Mapping[Value, Callable[[Index], Val]] | None = None) -> None:  # fmt: skip
        super().__init__()
        self.pointers, self.made = pointers, made or {}
        self.alone: list[Op] = []
        """Folds that threads do on their own, each the whole row."""

    def value(self, v: Value, index: Index) -> Val:
        """``v[index]`` in its compute type."""
        if v in self.made:
            return self.made[v](index)
        depth = max((i.depth for i in index), default=0)
        return self.memo((v, index), depth, lambda: self.keep(self._make(v, index)))

    def _make(self, v: Value, index: Index) -> Val:
        if v in self.pointers:
            return self._load(v, index)
        op = v.owner
        if op is None:
            raise CodegenError(f"{v!r} is no argument of the kernel")
        if isinstance(op, ops.Quantize):
            return self._quantized(v, op, index)
        if rd.is_plain(op):
            values = [self.value(*place) for place in rd.reads(op, index, self.pick)]
            if isinstance(op, rd.DECODING):
                return decoded(op, values).to(compute_dtype(v.dtype))
            return values[0] if rd.is_move(op) else arithmetic(op, values)
        dtype = compute_dtype(v.dtype)
        match op:
            case ops.Full():
                return literal(op.value, dtype)
            case ops.SizeOf():
                return Val(self.number(size(op.value)), "i64").to(dtype)
            case ops.Iota():
                return Val(self.number(size(op.start) + index[0] * op.step), "i64").to(dtype)
            case ops.Concat():
                return self._concat(rd.concat_pieces(op, index), index[op.axis], dtype)
            case ops.Pad():
                return self._pad(op, index, dtype)
            case ops.Rope():
                return self._rope(op, index)
        return self._row_value(op, index)

    # --- memory -----------------------------------------------------------------------------------------------------

    def _load(self, v: Value, index: Index) -> Val:
        dtype, place = compute_dtype(v.dtype), self.number(linear(index, v.shape))
        pointer, bits = self.pointers[v], v.dtype.bits
        if bits >= 8 and not v.dtype.is_narrow_float:
            return Val(f"tw_load({pointer} + {place})", dtype)
        if bits == 3:
            code = f"tw_code3({pointer}, {place}, {self.number(size(product(v.shape)))})"
        else:
            code = f"{pointer}[{place}]" if bits == 8 else f"tw_code<{bits}>({pointer}, {place})"
        if v.dtype.is_narrow_float:
            return Val(f"tw_{v.dtype.value}({code})", "f32")
        return Val(f"({dtype}){code}" if v.dtype.value.startswith("u") else f"({dtype})tw_signed<{bits}>({code})", dtype)

    def store(self, v: Value, pointer: str, index: Index) -> None:
        """Write ``v[index]`` to a tensor of its shape."""
        self.put(f"tw_store({pointer} + {self.number(linear(index, v.shape))}, {self.value(v, index).text});")

    def pick(self, indices: Value, index: Index, dim: Dim) -> Poly:
        """The index that ``indices`` hold, made safe."""
        n = size(dim)
        depth = max((i.depth for i in index), default=0)

        def make() -> Poly:
            raw = self.value(indices, index).to("i64").text
            return self.variable(0, n - 1, self.keep_number(f"tw_pick({raw}, {self.number(n)})"))

        return self.memo(("pick", indices, index, n), depth, make)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def either(self, condition: str, yes: Callable[[], Val], no: Callable[[], Val], dtype: str) -> Val:
        """One of two values, of which only one is computed."""
        name = self.name("b")
        self.put(f"{dtype} {name};")
        for head, side in ((f"if ({condition})", yes), ("else", no)):
            self.fenced(head, lambda side=side: self.put(f"{name} = {side().text};"))  # type: ignore[misc]
        return Val(name, dtype)

    def _concat(self, pieces: list[tuple[Poly, Poly, rd.Read]], at: Poly, dtype: str) -> Val:
        pieces = [p for p in pieces if not (less(at, p[0]) or at_most(p[1], at))]
        (_, stop, place), *others = pieces
        if not others:
            return self.value(*place)
        inside = f"{self.number(at)} < {self.number(stop)}"
        return self.either(inside, lambda: self.value(*place), lambda: self._concat(others, at, dtype), dtype)

    def _pad(self, op: ops.Pad, index: Index, dtype: str) -> Val:
        filler, conditions = literal(op.value, dtype), []
        for i, first, last in rd.pad_ranges(op, index):
            if less(i, first) or at_most(last, i):
                return filler
            if not (at_most(first, i) and less(i, last)):
                conditions += [f"{self.number(i)} >= {self.number(first)}", f"{self.number(i)} < {self.number(last)}"]
        if not conditions:
            return self.value(*rd.pad_read(op, index))
        return self.either(" && ".join(conditions), lambda: self.value(*rd.pad_read(op, index)), lambda: filler, dtype)

    # --- rope -------------------------------------------------------------------------------------------------------

    def _rope(self, op: ops.Rope, index: Index) -> Val:
        d, turned = index[3], Poly.of(rd.rotated(op))
        if at_most(turned, d):
            return self.value(op.x, index)
        if less(d, turned):
            return self._turn(op, index)
        inside = f"{self.number(d)} < {self.number(turned)}"
        return self.either(inside, lambda: self._turn(op, index), lambda: self.value(op.x, index), "f32")

    def _turn(self, op: ops.Rope, index: Index) -> Val:
        """x * cos + (the signed partner of x) * sin."""
        low = f"{self.number(index[3])} < {rd.rotated(op) // 2}"
        if op.style != "half":
            low = f"{self.number(index[3])} % 2 == 0"

        def partner(first: bool) -> Val:
            *place, at = rd.rope_partner(op, index, low=first)
            least, most = 0, rd.rotated(op) - 1
            if op.style == "half":
                least, most = (most // 2 + 1, most) if first else (0, most // 2)
            other = self.value(op.x, (*place, self.variable(least, most, self.keep_number(self.number(at)))))
            return Val(f"(-{other.text})" if first else other.text, other.dtype)

        x, other = self.value(op.x, index), self.either(low, lambda: partner(True), lambda: partner(False), "f32")
        cos, sin = (self.value(v, rd.rope_angle(op, index)).text for v in (op.cos, op.sin))
        return Val(f"{x.text} * {cos} + {other.text} * {sin}", x.dtype)

    # --- folds ------------------------------------------------------------------------------------------------------

    def fold(self, fn: str, dtype: str, start: str, extents: Sequence[Dim], row: Index, element: Callable[[Index], str]
             ) -> str:  # fmt: skip
        """All elements of a row combined by the functor ``fn``: by the block's threads together where the row is theirs."""
        from tilewright.codegen.index_shapes import delinear

        together = max((i.depth for i in row), default=0) == 0 and self.barrier == 0
        total, count = self.name("t"), size(product(extents))
        self.put(f"{dtype} {total} = {start};")
        with self.loop(count, *(("threadIdx.x", "blockDim.x") if together else ())) as i:
            self.put(f"{total} = {fn}()({total}, {element(delinear(i, extents))});")
        if together:
            self.put(f"{total} = tw_block<{fn}>({total});")
        return total

    def _statistic(self, op: Op, name: str, row: Index, make: Callable[[], Val]) -> Val:
        depth = max((i.depth for i in row), default=0)
        if depth or self.barrier:
            self.alone.append(op)
        return self.memo((op, name, row), depth, lambda: self.keep(make()))

    def _total(self, op: Op, fn: str, row: Index, dtype: str, element: Callable[[Val], str]) -> Val:
        """The fold ``fn`` over one row of ``element(x)``."""
        start = identity(fn, dtype)

        def one(at: Index) -> str:
            return element(self.value(op.operands[0], rd.row_element(op, row, at)))

        return Val(self.fold(fn, dtype, start.text, rd.fold_extents(op), row, one), dtype)

    def _count(self, op: Op, dtype: str) -> str:
        return Val(self.number(size(product(rd.fold_extents(op)))), "i64").to(dtype).text

    def _row_value(self, op: Op, index: Index) -> Val:
        """One element of a reduction or a normalisation."""
        row = rd.row_of(op, index)
        match op:
            case ops.Reduce():
                return self._statistic(op, op.fn, row, lambda: self._reduced(op, row))
            case ops.ArgMax():
                return self._statistic(op, "argmax", row, lambda: self._argmax(op, row))
            case ops.Softmax():
                return self._softmax(op, index, row)
            case ops.RmsNorm():
                return self._rms_norm(op, index, row)
            case ops.LayerNorm() | ops.GroupNorm():
                return self._layer_norm(op, index, row)
        raise CodegenError(f"{op.name} has no form as a CUDA loop", op.loc)

    def _reduced(self, op: ops.Reduce, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)
        if op.fn in ("any", "all") or dtype == "bool":
            fn = "tw_any" if op.fn in ("any", "max", "sum", "mean") else "tw_all"
            return self._total(op, fn, row, "bool", lambda x: x.to("bool").text).to(compute_dtype(op.result.dtype))
        if op.fn == "mean" and not op.x.dtype.is_float:
            total = self._total(op, "tw_sum", row, "i64", lambda x: x.to("i64").text)
            return Val(f"({dtype})((f64){total.text} / {self._count(op, 'f64')})", dtype)
        fn = {"sum": "tw_sum", "mean": "tw_sum", "prod": "tw_prod", "max": "tw_most", "min": "tw_least"}[op.fn]
        found = self._total(op, fn, row, dtype, lambda x: x.text)
        return Val(f"{found.text} / {self._count(op, dtype)}", dtype) if op.fn == "mean" else found

    def _argmax(self, op: ops.ArgMax, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)
        dtype = "u8" if dtype == "bool" else dtype
        kind = f"tw_place<{dtype}>"

        def one(at: Index) -> str:
            x = self.value(op.x, rd.row_element(op, row, at)).to(dtype).text
            return f"{kind}{{{x}, (i32){self.number(at[0])}}}"

        start = f"{kind}{{{identity('tw_most', dtype).text}, 0x7fffffff}}"
        return Val(f"(i64){self.fold('tw_first', kind, start, rd.fold_extents(op), row, one)}.at", "i64")

    def _rms_norm(self, op: ops.RmsNorm, index: Index, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)

        def scale() -> Val:
            total = self._total(op, "tw_sum", row, dtype, lambda x: f"{x.text} * {x.text}").text
            return Val(f"tw_rsqrt({total} / {self._count(op, dtype)} + {literal(op.eps, dtype).text})", dtype)

        y = f"{self.value(op.x, index).text} * {self._statistic(op, 'scale', row, scale).text}"
        for place in rd.row_weights(op, index):
            weight = self.value(*place).text
            y = f"{y} * " + (f"({weight} + {literal(op.offset, dtype).text})" if op.offset else weight)
        return Val(y, dtype)

    def _layer_norm(self, op: ops.LayerNorm | ops.GroupNorm, index: Index, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)

        def mean() -> Val:
            total = self._total(op, "tw_sum", row, dtype, lambda x: x.text).text
            return Val(f"{total} / {self._count(op, dtype)}", dtype)

        def scale() -> Val:  # the mean first: the difference of squares would cancel
            centre = self._statistic(op, "mean", row, mean).text
            total = self._total(op, "tw_sum", row, dtype, lambda x: f"({x.text} - {centre}) * ({x.text} - {centre})").text
            return Val(f"tw_rsqrt({total} / {self._count(op, dtype)} + {literal(op.eps, dtype).text})", dtype)

        factor, centre = self._statistic(op, "scale", row, scale), self._statistic(op, "mean", row, mean)
        y = f"({self.value(op.x, index).text} - {centre.text}) * {factor.text}"
        weights = rd.row_weights(op, index)
        if op.weight is not None:
            y = f"{y} * {self.value(*weights[0]).text}"
        return Val(y if op.bias is None else f"{y} + {self.value(*weights[-1]).text}", dtype)

    def _softmax(self, op: ops.Softmax, index: Index, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)

        def top() -> Val:
            highest = self._total(op, "tw_most", row, dtype, lambda x: x.text).text
            return Val(f"tw_abs({highest}) < TW_INF ? {highest} : 0", dtype)

        def shifted(x: Val) -> str:
            return f"tw_exp({x.text} - {self._statistic(op, 'top', row, top).text})"

        def scale() -> Val:
            total = self._total(op, "tw_sum", row, dtype, shifted).text
            return Val(f"1 / ({total} == 0 ? 1 : {total})", dtype)

        factor = self._statistic(op, "scale", row, scale)
        return Val(f"{shifted(self.value(op.x, index))} * {factor.text}", dtype)

    def _quantized(self, v: Value, op: ops.Quantize, index: Index) -> Val:
        """A code or a scale: ``v`` is one of the results."""
        *lead, at = index
        row, group = tuple(lead), at if v is op.results[1] else rd.quantize_group(op, at)
        scale = self._group_scale(op, row, group)
        if v is op.results[1]:
            return scale
        x = self.value(op.x, index).to("f32").text
        return Val(f"(i8)fmaxf(-127.0f, fminf(127.0f, rintf({x} / {scale.text})))", "i8")

    def _group_scale(self, op: ops.Quantize, row: Index, group: Poly) -> Val:
        where = row if not op.group else (*row, group)

        def make() -> Val:
            def one(at: Index) -> str:
                return f"fabsf({self.value(op.x, (*row, group * op.group + at[0])).to('f32').text})"

            top = self.fold("tw_most", "f32", "0.0f", [op.group or op.x.shape[-1]], where, one)
            return Val(f"{top} > 0 ? {top} / 127.0f : 1.0f", "f32")

        return self._statistic(op, "scale", where, make)


def identity(fn: str, dtype: str) -> Val:
    """What a fold leaves unchanged."""
    if fn in ("tw_sum", "tw_any", "tw_prod", "tw_all"):
        return literal(fn in ("tw_prod", "tw_all"), dtype)
    if dtype in ("f32", "f64"):
        return literal(float("-inf") if fn == "tw_most" else float("inf"), dtype)
    bits = int(dtype[1:])
    low, high = (0, 255) if dtype == "u8" else (-(1 << bits - 1), (1 << bits - 1) - 1)
    return Val("(-9223372036854775807ll - 1)", dtype) if low < -(1 << 62) and fn == "tw_most" else literal(
        low if fn == "tw_most" else high, dtype
    )


def arithmetic(op: Op, values: Sequence[Val]) -> Val:
    """An elementwise operation; the prelude has a function of its name."""
    dtype = compute_dtype(op.result.dtype)
    if isinstance(op, ops.Cast):
        return values[0].to(dtype)
    if dtype == values[0].dtype == "bool" and isinstance(op, (ops.Maximum, ops.Minimum, ops.Mul)):
        return Val(f"({values[0].text} {'||' if isinstance(op, ops.Maximum) else '&&'} {values[1].text})", dtype)
    return Val(f"tw_{op.name.split('.')[1]}({', '.join(v.text for v in values)})", dtype)


def decoded(op: Op, values: Sequence[Val]) -> Val:
    """What a decoding operation makes of codes (or of what they are looked up as), scale and zero or offset."""
    number, *rest = values
    if isinstance(op, ops.Lookup):
        return Val(f"{number.text} * {rest[0].text}", "f32") if rest else number
    assert isinstance(op, (ops.Dequantize, ops.Expand))
    text = number.text
    scale, *shift = rest
    if op.zero is not None:
        text = f"((i32){text} - (i32){shift[0].text})"
    if isinstance(op, ops.Expand):
        return Val(f"(i8)tw_max(tw_min((i32){text} * (i32){scale.text}, 127), -128)", "i8")
    total = f"(f32){text} * {scale.text}"
    return Val(total if op.offset is None else f"{total} + {shift[0].text}", "f32")
