"""Inputs for a kernel of which only the text is known: what each argument is for follows from the operations it reaches.

Numbers are random with a fixed seed and scaled so that results are of about one: errors then say something. An index is
within its table, a position leaves room in its cache, codes take their whole range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.codegen.cache import CacheLayout, cache_layout
from tilewright.codegen.cuda.cache import CudaCacheLayout
from tilewright.codegen.target import Target
from tilewright.ir import (
    CONTIGUOUS,
    DType,
    Function,
    KVType,
    Module,
    Op,
    TensorType,
    Value,
    dim_symbols,
    eval_dim,
    ops,
    parse_module,
)
from tilewright.ir.caches import origin
from tilewright.ir.ops.kv_codes import rounded
from tilewright.measuring_recent import Held
from tilewright.measuring_sparse import masks, starts

Array = np.ndarray[Any, Any]
Operand = Any
"""An array, or the pair (K, V) of a cache, each ``[B, length, heads, size]``."""

PERIOD = 1048583
"""Elements after which large arrays repeat themselves: a prime, so that no two rows are equal."""
_BELOW = 8  # of integers that nothing bounds
CACHED = (ops.Append, ops.Attend, ops.Select, ops.Choose)
"""Operations that look into a cache."""
_MOVES = (ops.Reshape, ops.Broadcast, ops.Transpose, ops.Slice, ops.Concat, ops.Cast)
_POSITIVE = (ops.Log, ops.Log1p, ops.Sqrt, ops.Rsqrt, ops.Reciprocal)
_DIVIDES = (ops.Div, ops.FloorDiv, ops.Mod)
_WEIGHTS = ("weight", "bias", "gate", "up", "table", "gate_up", "down", "gate_bias", "up_bias", "gate_up_bias", "down_bias")
_FAN_IN = ("weight", "gate", "up", "gate_up", "down")
_CODES = {
    **{d: (0, 1 << d.bits) for d in (DType.u8, DType.u4, DType.u3, DType.u2)},
    **{d: (-(1 << d.bits - 1), 1 << d.bits - 1) for d in (DType.i4, DType.i3, DType.i2)},
    DType.i8: (-127, 128),
}
_DECODING = (ops.Dequantize, ops.Lookup, ops.Expand, ops.SparseExpand)
_MOST_STEP = 16  # of codes that expand to i8


@dataclass(frozen=True)
class Subject:
    """A kernel at one size."""

    module: Module
    kernel: Function
    dims: Mapping[str, int]
    target: Target

    @classmethod
    def parse(cls, text: str, sizes: Mapping[str, int], target: Target) -> Subject:
        """From the text of a module with one kernel. Raises ParseError, and ValueError when there is not just one."""
        module = parse_module(text)
        (kernel,) = module.functions.values()
        return cls(module, kernel, dict(sizes), target)

    def shape(self, value: Value) -> tuple[int, ...]:
        return tuple(eval_dim(d, self.dims) for d in value.shape)

    def layout(self, value: Value) -> CacheLayout | CudaCacheLayout:
        return cache_layout(value.cache, self.target)

    def batch(self, cache: Value) -> int:
        """Sequences that a cache is for: as many as positions are given with it."""
        op = next(op for op in cache.users if isinstance(op, CACHED))
        return self.shape(op.start)[0]

    def regions(self, cache: Value) -> int:
        """Sequences that a cache is for, or pages of a pool that has all of theirs."""
        kind = cache.cache
        return self.batch(cache) * (kind.pages if kind.page else 1)

    def changed(self) -> dict[int, int]:
        """The caches that the kernel changes in place: index of the result -> of the argument."""
        kernel = self.kernel
        caches = {i: origin(self.module, v) for i, v in enumerate(kernel.returns) if isinstance(v.type, KVType)}
        return {i: next(at for at, arg in enumerate(kernel.args) if arg is value) for i, value in caches.items()}

    def cache_before(self, index: int, inputs: Sequence[Operand]) -> tuple[Array, ...]:
        """The memory of the cache that is argument ``index``, with what ``inputs`` say."""
        cache = self.kernel.args[index]
        layout = self.layout(cache)
        if not cache.cache.keeps_recent:
            return layout.write(*inputs[index])
        return self.held(cache, inputs).written(layout, inputs[index])

    def cache_after(self, index: int, inputs: Sequence[Operand], result: Operand) -> tuple[Array, ...]:
        """The memory of the cache that is argument ``index``, changed so that it holds ``result``."""
        cache = self.kernel.args[index]
        layout = self.layout(cache)
        if not cache.cache.keeps_recent:
            return layout.write(*result)
        return self.held(cache, inputs, after=True).written(layout, result, self.cache_before(index, inputs))

    def held(self, cache: Value, inputs: Sequence[Operand], after: bool = False) -> Held:
        """The tokens of a cache before a call; those that it appends itself are there ``after`` it."""
        op = next(op for op in cache.users if isinstance(op, CACHED))
        given = dict(zip(self.kernel.args, inputs))
        new = self.shape(op.k if isinstance(op, ops.Append) else op.q)[1]
        known = after or not isinstance(op, ops.Append)
        return Held(cache.cache, given[op.start] + new * known, None if op.table is None else given[op.table])

    def bytes_moved(self) -> int:
        """Bytes of all arguments and results."""
        total = 0
        for value in (*self.kernel.args, *self.kernel.returns):
            if isinstance(value.type, TensorType):
                total += eval_dim(value.type.bytes, self.dims)
            elif value in self.kernel.args:
                layout = self.layout(value)
                total += self.regions(value) * (layout.k_bytes + layout.v_bytes)
        return total

    def flops(self) -> int:
        """Floating-point operations of a call."""
        return sum(eval_dim(op.flops(), self.dims) for op in self.kernel.body)

    def is_constant(self, index: int) -> bool:
        """Whether an argument is taken for a weight, which each layer of a model has its own of.

        In a kernel with symbolic sizes those are the arguments without any: what depends on tokens has their number among
        its sizes. Where all sizes are fixed it is what an operation calls a weight, a bias or a table.
        """
        arg = self.kernel.args[index]
        if isinstance(arg.type, KVType):
            return False
        if self.kernel.symbols():
            return not dim_symbols(arg.shape)
        return any(role.field in _WEIGHTS for role in roles(arg))


@dataclass(frozen=True)
class Role:
    """An operand that a value reaches, perhaps after moves: the field of an operation."""

    op: Op
    field: str
    place: int


def roles(value: Value) -> Iterator[Role]:
    """What a value is used for. Codes and scales are also what their product is used for."""
    for op in value.users:
        for field in (f for f in op.fields if f.is_operand):
            given = getattr(op, field.name)
            for at, operand in enumerate(given if isinstance(given, tuple) else (given,)):
                if operand is value:
                    yield Role(op, field.name, at)
                    if isinstance(op, (*_MOVES, *_DECODING)):
                        yield from roles(op.result)


def make_inputs(subject: Subject, seed: int = 0) -> list[Operand]:
    """An operand for each argument. Caches are empty behind the tokens that their kernel is given positions for."""
    rng = np.random.default_rng(seed)
    made = {arg: _make(subject, arg, rng) for arg in subject.kernel.args}
    for cache, op in ((op.cache, op) for op in subject.kernel.body if isinstance(op, CACHED)):
        if cache.cache.keeps_recent:
            made[cache] = subject.held(cache, list(made.values())).decoded(made[cache])
        if cache.cache.layout != CONTIGUOUS:
            continue
        tokens = subject.shape(op.k if isinstance(op, ops.Append) else op.q)[1]
        for part in made.get(cache, ()) if op.start in made else ():
            for sequence, start in zip(part, made[op.start]):
                sequence[start + tokens :] = 0
    return list(made.values())


def _make(subject: Subject, arg: Value, rng: np.random.Generator) -> Operand:
    if isinstance(arg.type, KVType):
        sizes = (subject.regions(arg), arg.type.page or arg.type.slots, arg.type.heads)
        numbers = tuple(normal(rng, (*sizes, size), arg.type.held) for size in (arg.type.dim, arg.type.own_vdim))
        return numbers if arg.type.keeps_recent else rounded(arg.type, *numbers)
    shape, found = subject.shape(arg), list(roles(arg))
    for role in found:
        if isinstance(role.op, ops.SparseExpand) and role.field != "values":
            return masks(role.op, rng) if role.field == "mask" else starts(role.op)
    if arg.dtype is DType.bool:
        share = 0.875 if any(r.field in ("mask", "padding") for r in found) else 0.5
        return tiled(rng.random, shape, lambda numbers: numbers < share)
    if arg.dtype.is_float or arg.dtype.is_narrow_float:
        return _floats(subject, arg, shape, found, rng)
    if any(role.field == "table" and isinstance(role.op, CACHED) for role in found):
        return np.arange(math.prod(shape)).reshape(shape).astype(arg.dtype.np)  # pages in order, each of one sequence
    if op := next((role.op for role in found if isinstance(role.op, ops.Attend) and role.field == "pages"), None):
        held = subject.shape(op.table)[1]  # some of them, in order, whatever the number of tokens
        return np.broadcast_to(np.arange(shape[2]) * held // shape[2], shape).astype(arg.dtype.np)
    if any(role.field == "blocks" and isinstance(role.op, ops.Attend) for role in found):
        return np.broadcast_to(np.array([shape[3] - 1, *range(shape[3] - 1)], np.int32), shape)  # all are chosen
    low, high = _range(subject, arg, shape, found)
    return tiled(lambda count: rng.integers(low, high, count), shape, lambda numbers: numbers.astype(arg.dtype.np))


def _floats(subject: Subject, arg: Value, shape: Sequence[int], found: list[Role], rng: np.random.Generator) -> Array:
    if part := next((r for r in found if isinstance(r.op, _DECODING)), None):
        return _decoded(subject, arg, shape, part, rng)
    if any(isinstance(r.op, _POSITIVE) or (isinstance(r.op, _DIVIDES) and r.field == "b")
           or (isinstance(r.op, ops.Pow) and r.field == "a") for r in found):  # fmt: skip
        return uniform(rng, shape, arg.dtype, 1.0)
    fan = math.prod(shape[1:]) if len(shape) > 1 and any(r.field in _FAN_IN for r in found) else 1
    if len(shape) == 3 and fan > 1:  # experts: one weight each
        fan = shape[-1]
    return normal(rng, shape, arg.dtype, 1 / math.sqrt(max(fan, 1)))


def _decoded(subject: Subject, arg: Value, shape: Sequence[int], part: Role, rng: np.random.Generator) -> Array:
    """Part of a quantized tensor whose numbers are to be about one over the root of their count in a row."""
    op = part.op
    if isinstance(op, ops.SparseExpand):
        return normal(rng, shape, arg.dtype, 1 / math.sqrt(op.columns) if arg.dtype.is_float else 1.0)
    codes: Value = op.codes  # type: ignore[attr-defined]
    spread = 1 / math.sqrt(subject.shape(codes)[-1])
    if part.field == "codes":
        return normal(rng, shape, arg.dtype)
    if part.field == "table":
        return normal(rng, shape, arg.dtype, spread if op.scale is None else 1.0)  # type: ignore[attr-defined]
    low, high = _CODES.get(codes.dtype, (-1, 1)) if isinstance(op, ops.Dequantize) else (-1, 1)
    return uniform(rng, shape, arg.dtype, 2 * spread / (high - low))


def _range(subject: Subject, arg: Value, shape: Sequence[int], found: list[Role]) -> tuple[int, int]:
    """The range of an integer argument, without its end."""
    for role in found:
        if isinstance(role.op, _DECODING) and role.field in ("codes", "values"):
            return _CODES[arg.dtype]
        if isinstance(role.op, (ops.Dequantize, ops.Expand)) and role.field == "zero":
            return _CODES[role.op.codes.dtype]
        if isinstance(role.op, ops.Expand) and role.field == "scale":
            return 1, _MOST_STEP + 1
        if isinstance(role.op, CACHED) and role.field == "start":
            return positions(subject, role.op)
        if isinstance(role.op, _DIVIDES) and role.field == "b":
            return 1, _BELOW
    ends = [end for role in found if (end := bound(subject, role)) is not None]
    return 0, max(min(ends, default=_BELOW), 1)


def positions(subject: Subject, op: ops.Append | ops.Attend | ops.Select | ops.Choose) -> tuple[int, int]:
    """Around the middle of the cache, but with room for all tokens."""
    tokens = subject.shape(op.k if isinstance(op, ops.Append) else op.q)[1]
    kind = op.cache.cache
    held = subject.shape(op.table)[1] * kind.page if op.table is not None else kind.length
    length = min(kind.length, held)
    middle = max(min(length // 2, length - tokens), 0)
    return max(middle - _BELOW, 0), middle + 1


def bound(subject: Subject, role: Role) -> int | None:
    """What an integer in this role must stay below."""
    op, field = role.op, role.field
    if isinstance(op, ops.Embedding) and field == "indices":
        return subject.shape(op.table)[0]
    if isinstance(op, (ops.Gather, ops.TakeAlong, ops.ScatterAlong)) and field == "indices":
        return subject.shape(op.x)[op.axis]
    if isinstance(op, (ops.GatherND, ops.ScatterND)) and field == "indices":
        return subject.shape(op.x)[role.place]
    if isinstance(op, ops.Experts) and field == "indices":
        return subject.shape(op.gate_up)[0]
    if isinstance(op, (ops.Add, ops.Sub)):  # an offset: half of the table for each of the two
        ends = [end for later in roles(op.result) if (end := bound(subject, later)) is not None]
        return min(ends) // 2 if ends else None
    return None


# --- numbers ----------------------------------------------------------------------------------------------------------


def tiled(draw: Any, shape: Sequence[int], convert: Any) -> Array:
    """``convert(draw(n))`` in ``shape``; a large array repeats its first million or so, which is much faster."""
    size = math.prod(shape)
    block = np.asarray(convert(draw(min(size, PERIOD))))
    if size <= PERIOD:
        return block.reshape(shape)
    out = np.empty(size, block.dtype)
    for start in range(0, size, PERIOD):
        part = out[start : start + PERIOD]
        part[...] = block[: len(part)]
    return out.reshape(shape)


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: DType, scale: float = 1.0) -> Array:
    return tiled(
        lambda count: rng.standard_normal(count, np.float32), shape, lambda x: (x * np.float32(scale)).astype(dtype.np)
    )


def uniform(rng: np.random.Generator, shape: Sequence[int], dtype: DType, middle: float) -> Array:
    """Positive numbers around ``middle``."""
    return tiled(lambda count: rng.uniform(0.5, 1.5, count), shape, lambda x: (x * middle).astype(dtype.np))
