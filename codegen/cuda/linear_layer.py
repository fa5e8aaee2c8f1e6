"""A linear layer as CUDA kernels see it: what tensor cores can make of its numbers, and the C struct of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen import reads as rd
from tilewright.codegen.cuda.evaluate import Evaluator, Val, stored_dtype
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.index import Index, Poly
from tilewright.codegen.index_shapes import delinear, size
from tilewright.codegen.linear_pattern import Pattern
from tilewright.ir import DType, Value, ops

_CODES = {
    **{f"i{bits}": f"tw_integers<{bits}, true>" for bits in (8, 4, 2)},
    **{f"u{bits}": f"tw_integers<{bits}, false>" for bits in (8, 4, 2)},
    "f8e4m3": "tw_floats<8, 3, 7>", "f8e5m2": "tw_floats<8, 2, 15>", "f4e2m1": "tw_floats<4, 1, 1>",
}  # fmt: skip
_PIECE = 16  # bytes that are copied at once, and must be aligned
_PRODUCT_BITS = 14  # of two codes of eight bits


@dataclass(frozen=True)
class Layer:
    """Sizes and number formats: ``x`` [M, k], and ``parts`` weights [n, k] of ``weight``, with ``groups`` scales a row.

    ``shifted``: codes have zero points or offsets. ``grouped``: scales belong inside of sums over k.
    """

    n: int
    k: int
    x: str
    weight: str
    parts: int
    groups: int
    scaled: bool
    shifted: bool

    @classmethod
    def of(cls, p: Pattern) -> Layer:
        weight = p.weights[0]
        shifted = weight.zero is not None or weight.offset is not None
        return cls(p.features, p.depth, p.x.data.dtype.value, weight.data.dtype.value, len(p.weights), weight.groups,
                   weight.scale is not None, shifted)  # fmt: skip

    @property
    def grouped(self) -> bool:
        return self.groups > 1 or self.shifted

    @property
    def group(self) -> int:
        """k's that share a scale."""
        return self.k // self.groups

    @property
    def x_bits(self) -> int:
        return DType(self.x).bits

    @property
    def bits(self) -> int:
        """Of a weight."""
        return DType(self.weight).bits

    @property
    def lane(self) -> int:
        """Bytes of x that a thread takes in a step: less where a step would reach beyond a group."""
        return 16 if self.groups == 1 or self.group % (4 * 128 // self.x_bits) == 0 else 8

    @property
    def step(self) -> int:
        """k's that the four threads of a row take in a step."""
        return 4 * 8 * self.lane // self.x_bits

    @property
    def least_k(self) -> int:
        """The fewest k's of a stage: a step, and whole pieces of both factors."""
        return max(self.step, 8 * _PIECE // min(self.bits, self.x_bits))

    @property
    def weight_bytes(self) -> int:
        return self.parts * self.n * self.k * self.bits // 8


def plain_reason(p: Pattern) -> str | None:
    """Why tensor cores cannot multiply exactly enough, or bring in the factors; None when they can."""
    layer, weight = Layer.of(p), p.weights[0]
    if layer.x == "f32":
        return "f32 has no exact products in tensor cores"
    if weight.table is not None or weight.step is not None:
        return "numbers out of a table, or of two levels"
    coded = layer.weight in _CODES and (layer.x != "i8" or not layer.weight.startswith("f"))
    if layer.weight != layer.x and not coded:
        return f"no products of {layer.x} and {layer.weight} in tensor cores"
    if layer.k * min(layer.bits, layer.x_bits) % (8 * _PIECE):
        return f"rows of {layer.k} elements are not aligned"
    if layer.groups > 1 and layer.group % layer.step:
        return f"groups of {layer.group} are not whole steps of {layer.step}"
    if layer.x == "i8" and layer.k >> (31 - _PRODUCT_BITS):
        return f"sums of {layer.k} products overflow"
    return None


def refusal(p: Pattern) -> str | None:
    """What of a pattern the CUDA kernels do not do."""
    if any(w.compressed for w in p.weights):
        return "compressed weights"
    if any(w.sparse for w in p.weights):
        return "sparse weights"
    if p.result.dtype.bits < 8 or p.result.dtype.is_narrow_float:
        return f"a result of {p.result.dtype.value}"
    after = {p.anchor.result}
    for op in p.tail:
        if after.isdisjoint(op.operands):
            if not (rd.is_plain(op) or isinstance(op, rd.CREATION)):
                return f"{op.name} does not run in the epilogue"
        elif isinstance(op, ops.Elementwise) and op.result.shape == p.anchor.result.shape:
            after.add(op.result)
        else:
            return f"{op.name} after the layer is not elementwise"
    return None if p.result in after else "the result is not the layer's"


class Struct:
    """Writes ``struct tw_layer``: the kernel's parameters, and where linear*.cuh find what they need."""

    def __init__(self, source: Source, pattern: Pattern, on_tensor_cores: bool) -> None:
        self.source, self.pattern, self.layer = source, pattern, Layer.of(pattern)
        self.on_tensor_cores = on_tensor_cores

    @property
    def text(self) -> str:
        layer = self.layer
        constants = {"N": layer.n, "K": layer.k, "PARTS": layer.parts}
        lines = [f"{parameter};" for parameter in self.source.parameters]
        if self.on_tensor_cores:
            constants |= {"GROUP": layer.group, "LANE": layer.lane}
            lines += self._operands()
        else:
            lines += self._elements()
        lines += [f"static constexpr int {name} = {value};" for name, value in constants.items()]
        scratch = "(f32 *)s0" if self.source.scratch else "nullptr"
        lines += [f"TW_FN i64 rows() const {{ return {Evaluator({}).number(size(self.pattern.rows))}; }}",
                  f"TW_FN f32 *scratch() const {{ return {scratch}; }}", *self._finish()]  # fmt: skip
        return "\n".join(["struct tw_layer {", *(f"  {line}" for line in lines), "};"])

    def _operands(self) -> list[str]:
        """Where tensor cores' factors lie."""
        weights, layer = self.pattern.weights, self.layer
        scale = weights[0].scale.dtype if weights[0].scale is not None else DType.f32
        number = "tw_f8e8m0(x)" if scale.is_narrow_float else "tw_load(&x)"
        flags = {"GROUPED": layer.grouped, "ZEROS": weights[0].zero is not None, "OFFSETS": weights[0].offset is not None}
        return [
            f"typedef {layer.x} X;",
            f"typedef {_CODES[layer.weight] if layer.scaled else 'tw_plain'} Code;",
            f"typedef {stored_dtype(scale)} Scale;",
            *(f"static constexpr bool {name} = {str(flag).lower()};" for name, flag in flags.items()),
            f"TW_FN const u8 *x() const {{ return (const u8 *){self._name(self.pattern.x.data)}; }}",
            *self._by_part("u8", "weight", [w.data for w in weights]),
            *self._by_part("Scale", "scale", [w.scale for w in weights]),
            *self._by_part("u8", "zero", [w.zero for w in weights]),
            *self._by_part("f32", "offset", [w.offset for w in weights]),
            f"static TW_FN f32 number(Scale x) {{ return {number}; }}",
        ]

    def _name(self, value: Value) -> str:
        return self.source.names(value)[0]

    def _by_part(self, kind: str, what: str, values: list[Value | None]) -> list[str]:
        names = [f"(const {kind} *){self._name(v)}" for v in values if v is not None]
        if not names:
            return []
        return [f"TW_FN const {kind} *{what}(int part) const {{ return {' : '.join(_choices(names))}; }}"]

    def _function(self, head: str, result: Callable[[Evaluator], str], made: Callable[[Index], Val] | None = None
                  ) -> list[str]:  # fmt: skip
        anchor = self.pattern.anchor.result
        w = Evaluator(self.source.pointers, {anchor: made} if made else {})
        text = result(w)
        return [f"TW_FN {head} const {{", *(f"  {line}" for line in w.lines), f"  {text};", "}"]

    def _row(self, w: Evaluator) -> Index:
        return delinear(w.variable(0, size(self.pattern.rows) - 1, "m"), self.pattern.anchor.x.shape[:-1])

    def _elements(self) -> list[str]:
        """Any element of x and of the weights."""
        anchor, k = self.pattern.anchor, self.layer.k
        factors = [anchor.weight] if isinstance(anchor, ops.Linear) else [anchor.gate, anchor.up]

        def x(w: Evaluator) -> str:
            return f"return {w.value(anchor.x, (*self._row(w), w.variable(0, k - 1, 'k'))).text}"

        def weight(value: Value) -> Callable[[Evaluator], str]:
            return lambda w: (
                f"return {w.value(value, (w.variable(0, self.layer.n - 1, 'n'), w.variable(0, k - 1, 'k'))).text}"
            )

        lines = self._function("f32 x_at(i64 m, i64 k)", x)
        for i, value in enumerate(factors):
            lines += self._function(f"f32 weight_{i}(i64 n, i64 k)", weight(value))
        calls = [f"weight_{i}(n, k)" for i in range(len(factors))]
        return [*lines, f"TW_FN f32 weight_at(int part, i64 n, i64 k) const {{ return {' : '.join(_choices(calls))}; }}"]

    # --- what becomes of sums -----------------------------------------------------------------------------------------

    def _finish(self) -> list[str]:
        """``finish(m, n, sums)`` scales, adds biases, activates, does what comes after the layer, and stores."""
        p = self.pattern

        def store(w: Evaluator) -> str:
            n = w.variable(0, self.layer.n - 1, "n")
            index = (*self._row(w), n)
            w.made = {p.anchor.result: lambda at: total}
            total = w.keep(Val(self._total(w, index), "f32"))
            w.store(p.result, self._name(p.result), index)
            return "return"

        return self._function("void finish(i64 m, i64 n, const f32 *sums)", store)

    def _total(self, w: Evaluator, index: Index) -> str:
        """The layer's result at ``index``."""
        p, n = self.pattern, index[-1]
        parts = []
        for i, weight in enumerate(p.weights):
            text = f"sums[{i}]"
            if self.on_tensor_cores:
                text = " * ".join([text, *self._scales(w, weight.scale, index)])
            if p.biases:
                text = f"({text} + {w.value(p.biases[i], (n,)).to('f32').text})"
            parts.append(text)
        if p.activation is not None:
            gate = parts[0] if p.activation == "none" else f"tw_{p.activation}({parts[0]})"
            return f"{gate} * {parts[1]}"
        return parts[0]

    def _scales(self, w: Evaluator, scale: Value | None, index: Index) -> list[str]:
        """Scales that a sum over a whole row of k's is multiplied by."""
        x, found = self.pattern.x.scale, []
        if scale is not None and not self.layer.grouped:
            found.append(w.value(scale, (index[-1], Poly())).text)
        if x is not None:
            found.append(w.value(x, (*index[:-1], Poly())).text)
        return found


def _choices(texts: list[str]) -> list[str]:
    """One text, or the sides of a conditional expression on ``part``."""
    return texts if len(texts) == 1 else [f"part == 0 ? {texts[0]}", texts[1]]
