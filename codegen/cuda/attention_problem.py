"""The C of what one attention kernel has of its own: where operands come from, what a row sees, and what a score becomes.

It is a struct ``tw_problem`` that holds the kernel's parameters, under the names that `Source` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tilewright.codegen import reads as rd
from tilewright.codegen.cuda.attention_operands import CacheOperand, Operand, tensor_operand, variables
from tilewright.codegen.cuda.attention_schedule import Tiling
from tilewright.codegen.cuda.cache import CudaCacheLayout
from tilewright.codegen.cuda.cache_codes import CodeRows
from tilewright.codegen.cuda.cache_places import Places
from tilewright.codegen.cuda.evaluate import Evaluator, literal, stored_dtype
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.index_shapes import delinear, size
from tilewright.ir import Dim, Value, ops

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Sight:
    """What an operation's queries see, both kinds alike; ``length`` keys there are."""

    length: Dim
    causal: bool
    window: int
    window_right: int
    chunk: int
    mask: Value | None
    padding: Value | None


def sight_of(op: ops.Attention | ops.Attend) -> Sight:
    if isinstance(op, ops.Attend):
        return Sight(op.cache.cache.length, True, op.window, -1, op.chunk, None, None)
    return Sight(op.k.shape[1], op.causal, op.window, op.window_right, op.chunk, op.mask, op.padding)


def library(form: str, codes: bool) -> str:
    """The C of a form, which the struct goes into; ``codes``: for caches of codes."""
    files = ["attention.cuh", f"attention_{form}.cuh"]
    if codes:
        files = ["linear.cuh", *files, "attention_codes.cuh", *["attention_codes_mma.cuh"] * (form == "mma")]
    return "".join(Path(__file__).with_name(name).read_text() for name in files)


class Problem:
    """Writes the struct for one operation."""

    def __init__(self, source: Source, op: ops.Attention | ops.Attend, tiling: Tiling, parts: Dim,
                 layout: CudaCacheLayout | None) -> None:  # fmt: skip
        self.source, self.op, self.tiling, self.parts, self.sight = source, op, tiling, parts, sight_of(op)
        self.tile = op.q.dtype.value if tiling.is_mma else "f32"
        self.room: str | None = None
        self.codes: CodeRows | None = None
        self.operands: list[Operand | CacheOperand] = [tensor_operand(source, "query", op.q)]
        if isinstance(op, ops.Attend):
            assert layout is not None
            self._read_cache(op, layout, Places.of(source, op))
        else:
            self.operands += [tensor_operand(source, "key", op.k), tensor_operand(source, "value", op.v)]

    def _read_cache(self, op: ops.Attend, layout: CudaCacheLayout, places: Places) -> None:
        parts = zip(("key", "value"), self.source.names(op.cache), (layout.keys, layout.values))
        self.operands += [CacheOperand(*part, places, op.q.shape[0]) for part in parts]
        self.room = places.room
        self.codes = layout.keys if isinstance(layout.keys, CodeRows) else None

    @property
    def text(self) -> str:
        result, vdim = self.op.result, self.tiling.heads.vdim
        wide = 16 // result.dtype.size
        constants = self.tiling.constants | {"RESULT_PIECE": wide if vdim % wide == 0 else 1}
        lines = [f"{parameter};" for parameter in self.source.parameters]
        lines += [f"static constexpr int {name} = {value};" for name, value in constants.items()]
        lines += [f"typedef {name} {what};" for what, name in self._types().items()]
        lines += [line for operand in self.operands for line in self._operand(operand)]
        lines += [*self._sizes(), *self._sees(), *self._scores(), *self._sinks()]
        return "\n".join(["struct tw_problem {", *(f"  {line}" for line in lines), "};"])

    def _types(self) -> dict[str, str]:
        """Element types: of tiles of queries and keys, of values, of what is brought, of scales, of the result.

        Values of codes are bf16 whatever the queries are: their scales go to the weights, which f16 may be too narrow for.
        """
        types = {"Tile": self.tile, "Values": self.tile, "Brought": self.tile}
        if self.codes:
            values = "bf16" if self.tiling.is_mma else "f32"
            types |= {"Values": values, "Brought": self.codes.stored, "Scale": self.codes.scales}
        return types | {"Result": stored_dtype(self.op.result.dtype)}

    def _operand(self, operand: Operand | CacheOperand) -> list[str]:
        tile = self._types()["Tile" if operand.name == "query" else "Brought"]
        return operand.function(tile, self.source.pointers)

    def _function(self, head: str, result: Callable[[Evaluator], str]) -> list[str]:
        w = Evaluator(self.source.pointers)
        text = result(w)
        return [f"TW_FN {head} const {{", *(f"  {line}" for line in w.lines), f"  return {text};", "}"]

    def _sizes(self) -> list[str]:
        batch, queries = self.op.q.shape[:2]
        sizes = {"batch": batch, "queries": queries, "rows": queries * self.tiling.heads.group, "parts": self.parts}
        scratch = "(float *)s0" if self.source.scratch else "nullptr"
        lines = [f"TW_FN float *scratch() const {{ return {scratch}; }}",
                 f"TW_FN Result *result() const {{ return {self.source.names(self.op.result)[0]}; }}"]  # fmt: skip
        for name, dim in sizes.items():
            lines += self._function(f"int {name}()", lambda w, dim=dim: w.number(size(dim)))  # type: ignore[misc]
        return lines + self._function("int keys()", lambda w: self.room or w.number(size(self.sight.length)))

    # --- what a row sees ----------------------------------------------------------------------------------------------

    def _sees(self) -> list[str]:
        """``origin(b)``, the position of query 0; keys ``low(at) <= key < high(at)`` are seen from a position."""
        sight, low, high = self.sight, ["0"], ["keys()"]
        if sight.window > 0:
            low.append(f"at - {sight.window - 1}")
        if sight.causal:
            high.append("at + 1")
        if sight.window_right > 0:
            high.append(f"at + {sight.window_right}")
        if sight.chunk > 0:
            start = f"at - (at % {sight.chunk} + {sight.chunk}) % {sight.chunk}"
            low.append(start)
            high.append(f"{start} + {sight.chunk}")
        return [*self._function("int origin(i64 b)", self._origin),
                f"TW_FN int low(int at) const {{ return {_fold('max', low)}; }}",
                f"TW_FN int high(int at) const {{ return {_fold('min', high)}; }}"]  # fmt: skip

    def _origin(self, w: Evaluator) -> str:
        if isinstance(self.op, ops.Attend):
            return w.value(self.op.start, variables(w, self.op.start.shape, "b")).text
        return w.number(size(self.op.k.shape[1]) - size(self.op.q.shape[1]))

    # --- what a score becomes -----------------------------------------------------------------------------------------

    def _scores(self) -> list[str]:
        """``score(x, b, h, s, t)`` of a product x, in units of UNIT; POWER makes a power of two of what e is raised to."""
        op, sight = self.op, self.sight
        folded = op.scale > 0 and op.softcap <= 0 and op.bias is None
        unit = op.scale if folded else 1.0
        numbers = {"UNIT": unit, "POWER": unit * _LOG2E}
        flags = {
            "SCORED": not folded or sight.mask is not None or sight.padding is not None,
            "BIASED": op.bias is not None, "SINKS": op.sinks is not None,
        }  # fmt: skip
        return [
            *(f"static constexpr float {name} = {literal(number, 'f32').text};" for name, number in numbers.items()),
            *(f"static constexpr bool {name} = {str(flag).lower()};" for name, flag in flags.items()),
            *self._function("float score(float x, i64 b, i64 h, i64 s, i64 t)", lambda w: self._score(w, folded)),
        ]

    def _score(self, w: Evaluator, folded: bool) -> str:
        op, sight, x = self.op, self.sight, "x"
        shape = (*(op.q.shape[n] for n in (0, 2, 1)), sight.length)
        index = variables(w, shape, "bhst")
        if not folded:
            x = f"{x} * {literal(op.scale, 'f32').text}"
        if op.softcap > 0:
            tanh = "tw_quick_tanh" if self.tiling.is_mma else "tw_tanh"
            x = f"{literal(op.softcap, 'f32').text} * {tanh}({x} * {literal(1 / op.softcap, 'f32').text})"
        if op.bias is not None:
            x = f"{x} + {w.value(op.bias, rd.broadcast_index(index, op.bias.shape)).text}"
        seen = []
        if sight.mask is not None:
            seen.append(w.value(sight.mask, rd.broadcast_index(index, sight.mask.shape)).text)
        if sight.padding is not None:
            seen.append(w.value(sight.padding, (index[0], index[3])).text)
        return f"{' && '.join(seen)} ? {x} : -TW_INF" if seen else x

    def _sinks(self) -> list[str]:
        sinks, heads = self.op.sinks, self.op.q.shape[2]
        if sinks is None:
            return ["TW_FN float sink(i64 h) const { return 0.0f; }"]

        def sink(w: Evaluator) -> str:
            return w.value(sinks, delinear(*variables(w, (heads,), "h"), sinks.shape)).text

        return self._function("float sink(i64 h)", sink)


def _fold(fn: str, terms: list[str]) -> str:
    """C: the least or greatest of ``terms``."""
    text = terms[0]
    for term in terms[1:]:
        text = f"{fn}({text}, {term})"
    return text
