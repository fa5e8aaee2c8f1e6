"""Attention over what keys and values are linear in, instead of over these.

    k[h] = concat(Wk[h] c, r),  v[h] = Wv[h] c          q[h] . k[h] = (Wk[h]^T q[h]) . c + q[h] . r
    attention(q, k, v)   ->   Wv[h] attention(concat(q Wk[h], q), concat(c, r), c)

Queries take in the matrices of keys, results those of values. Matrices are read off the graph: it is evaluated for the unit
vectors of what is stored when the artifact is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tilewright.ir import Builder, Env, Function, Module, Op, TensorType, Value, Weight, ops
from tilewright.ir.interpreter import evaluate
from tilewright.passes.calibration.data import Array
from tilewright.passes.head_parts import along
from tilewright.passes.kv_clone import clone_op
from tilewright.passes.latent_cut import bytes_of, linear_operands, numbers
from tilewright.passes.weights import derive

HEADS, SIZE = 2, 3


@dataclass
class Absorbed:
    """An attention in the making, over the values ``stored``; ``b`` builds before it."""

    module: Module
    b: Builder
    op: ops.Attention
    stored: Sequence[Value]
    queries: dict[Value, Value] = field(default_factory=dict)

    @property
    def batch(self) -> tuple[Any, Any]:
        return self.op.q.shape[0], self.op.q.shape[1]

    @property
    def sources(self) -> tuple[list[Value], list[Value]]:
        """What keys and what values follow from; where keys need all that values do, that comes first."""
        of_keys, of_values = (between(part, self.stored)[1] for part in (self.op.k, self.op.v))
        return sorted(of_keys, key=lambda v: v not in of_values), of_values

    @property
    def among(self) -> bool:
        """Whether values need nothing that keys do not: then they are the first components of these."""
        of_keys, of_values = self.sources
        return of_keys[:len(of_values)] == of_values

    @property
    def bytes(self) -> int:
        """Of a token, what is stored with its key and, if need be, with its value."""
        of_keys, of_values = self.sources
        return bytes_of(of_keys) + (0 if self.among else bytes_of(of_values))

    def result(self) -> Value:
        """What takes the place of the attention's result."""
        self._take_keys(self.op.k, 0)
        of_keys, of_values = self.sources
        q = self._joined([self.queries[x] for x in of_keys])
        v = self._joined([self._one_head(x) for x in of_values])
        own = [self._one_head(x) for x in of_keys[len(of_values) * self.among:]]
        k = self._joined([v, *own] if self.among else own)
        out = self.b.insert(self.op.clone({}, q=q, k=k, v=v)).results[0]
        return self._product(out, self._matrix(self.op.v, of_values, by_size=False), int(self.op.v.shape[SIZE]))

    def _take_keys(self, part: Value, start: int) -> None:
        """Queries for ``part`` of the keys, which is their components from ``start`` on."""
        op = part.owner
        if isinstance(op, ops.Concat) and op.axis == SIZE and part not in self.stored:
            for x in op.xs:
                self._take_keys(x, start)
                start += int(x.shape[SIZE])
            return
        size = int(part.shape[SIZE])
        q = along(self.b, self.op.q, SIZE, start, start + size)
        shared = op.x if isinstance(op, ops.Broadcast) else part
        if shared in self.stored and shared.shape[HEADS] == 1:
            self._add(shared, q)
            return
        for source in between(part, self.stored)[1]:
            self._add(source, self._product(q, self._matrix(part, [source], by_size=True), numbers(source)))

    def _add(self, source: Value, q: Value) -> None:
        before = self.queries.get(source)
        self.queries[source] = q if before is None else self.b(ops.Add, before, q)

    def _product(self, x: Value, matrix: Weight, size: int) -> Value:
        """``[B, S, Hq, n]``, head by head, times ``matrix`` ``[H, n, size]``: ``[B, S, Hq, size]``."""
        heads, count = int(matrix.shape[0]), int(x.shape[HEADS])
        grouped = self.b(ops.Reshape, x, (*self.batch, heads, count // heads, x.shape[SIZE]))
        return self.b(ops.Reshape, self.b(ops.Matmul, grouped, matrix), (*self.batch, count, size))

    def _one_head(self, value: Value) -> Value:
        return self.b(ops.Reshape, value, (*self.batch, 1, numbers(value)))

    def _joined(self, values: Sequence[Value]) -> Value:
        return values[0] if len(values) == 1 else self.b(ops.Concat, tuple(values), SIZE)

    def _matrix(self, part: Value, sources: Sequence[Value], by_size: bool) -> Weight:
        """How ``part`` ``[B, S, H, n]`` follows from ``sources``: ``[H, n, R]`` ``by_size``, else ``[H, R, n]``."""
        unit = Unit(part, self.stored, sources, self.batch)
        heads, size, length = int(part.shape[HEADS]), int(part.shape[SIZE]), sum(map(numbers, sources))
        kind = TensorType((heads, size, length) if by_size else (heads, length, size), part.dtype)
        name = f"{unit.weights[0].name if unit.weights else 'latent'}.absorbed"
        return derive(self.module, name, kind, unit.weights, partial(unit.matrix, by_size))


class Unit:
    """How ``part`` ``[B, S, H, n]`` follows from ``sources``, as a function over the unit vectors of these, one a token."""

    def __init__(self, part: Value, stored: Sequence[Value], sources: Sequence[Value], batch: tuple[Any, Any]) -> None:
        self.length = sum(map(numbers, sources))
        inside, behind = between(part, stored)
        self.weights = list(dict.fromkeys(v for op in inside for v in op.operands if isinstance(v, Weight)))
        self.function = Function("matrix")
        mapping: dict[Value, Value] = {}
        self.given: list[tuple[Value, bool]] = []
        for value in behind:
            kind = TensorType((1, self.length, *value.shape[2:]), value.dtype)
            mapping[value] = self.function.arg(f"x{len(self.given)}", kind)
            self.given.append((mapping[value], value in sources))
        self.arguments = [self.function.arg(f"w{i}", w.tensor) for i, w in enumerate(self.weights)]
        mapping.update(zip(self.weights, self.arguments))
        b, sizes = Builder(self.function), {batch[0]: 1, batch[1]: self.length}
        for op in inside:
            mapping.update(zip(op.results, b.insert(clone_op(op, mapping, sizes)).results))
        self.part = mapping[part]

    def matrix(self, by_size: bool, *arrays: Array) -> Array:
        """``[H, n, R]`` when ``by_size``, else ``[H, R, n]``."""
        known: dict[Value, Array] = dict(zip(self.arguments, arrays))
        start = 0
        for value, is_source in self.given:
            count = numbers(value)
            unit = np.eye(self.length)[:, start : start + count] if is_source else np.zeros((self.length, count))
            known[value] = unit.reshape(value.shape).astype(value.dtype.np)
            start += count * is_source
        for op in self.function.body:
            known.update(zip(op.results, evaluate(op, Env({}), [v and known[v] for v in op.operand_slots()])))
        return np.ascontiguousarray(known[self.part][0].transpose((1, 2, 0) if by_size else (1, 0, 2)))


def between(part: Value, stored: Sequence[Value]) -> tuple[list[Op], list[Value]]:
    """The operations from ``stored`` to ``part``, in order, and those of ``stored`` that they begin with, in theirs."""
    inside: dict[Op, None] = {}
    behind: set[Value] = set()

    def visit(value: Value) -> None:
        if value in stored:
            behind.add(value)
        elif value.owner is not None and value.owner not in inside:
            for operand in linear_operands(value.owner):
                visit(operand)
            inside[value.owner] = None

    visit(part)
    return list(inside), [v for v in stored if v in behind]
