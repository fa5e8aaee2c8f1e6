"""Values that follow from the sizes of the input alone: rope tables, position numbers, masks, biases.

They are known before any token is, so the interpreter evaluates them at whatever length is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.ir import Dim, Env, Op, TensorType, TilewrightError, UnsupportedError, Value, Weight
from tilewright.passes.kv_axes import has

Array = np.ndarray[Any, Any]
PROBES = (3, 8, 33)
"""Lengths at which a value is compared with itself at the length of the cache."""


def refuse(where: Op | Value, reason: str) -> UnsupportedError:
    """The error that says which operation cannot be cached, and why."""
    op = where if isinstance(where, Op) else where.owner
    if op is None:
        return UnsupportedError(f"kv-layout: {reason}")
    return UnsupportedError(f"kv-layout: {op.name} {reason}", op.loc)


class ShapeValues:
    """Evaluates values of a function that depend on ``batch`` and ``seq`` alone. ``length`` is the cache's."""

    def __init__(self, batch: Any, seq: Any, length: int) -> None:
        self.batch, self.seq, self.length = batch, seq, length
        self._varying: dict[Value, bool] = {}

    @property
    def probes(self) -> list[int]:
        return [p for p in PROBES if p < self.length]

    def varies(self, value: Value) -> bool:
        """Whether the number of positions takes part in ``value`` at all, as a size or as data."""
        if value not in self._varying:
            op = value.owner
            self._varying[value] = op is not None and (
                any(has(d, self.seq) for d in _dims(op)) or any(map(self.varies, op.operands))
            )
        return self._varying[value]

    def seq_axes(self, value: Value) -> list[int]:
        return [i for i, d in enumerate(value.shape) if has(d, self.seq)]

    def at(self, value: Value, seq: int, batch: int = 1) -> Array:
        """The numbers of ``value`` at the given sizes; raises UnsupportedError when they cannot be computed."""
        env = Env({str(self.batch): batch, str(self.seq): seq})
        known: dict[Value, Array] = {}
        try:
            for op in cone(value):
                with np.errstate(all="ignore"):
                    out = op.evaluate(env, *(None if v is None else _look_up(known, v) for v in op.operand_slots()))
                known.update(zip(op.results, map(np.asarray, out if len(op.results) > 1 else (out,))))
        except (TilewrightError, KeyError, IndexError, ValueError) as error:
            text = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            raise refuse(
                value,
                f"cannot be evaluated for {seq} positions: {text}; is the model made for so many? "
                "Give kv-layout a smaller length",
            ) from error
        return _look_up(known, value)

    def check_batch(self, value: Value) -> None:
        """Refuse a value that is not the same for every sequence of a batch."""
        axes = [i for i, d in enumerate(value.shape) if has(d, self.batch)]
        n = min(3, self.length)
        small, one = self.at(value, n, batch=2), self.at(value, n)
        if not np.array_equal(small, np.broadcast_to(one, small.shape) if axes else one, equal_nan=True):
            raise refuse(value, "gives each sequence of a batch another value, and does not depend on the tokens")

    def is_constant(self, value: Value) -> bool:
        """Whether ``value``, which has no axis of positions, has the same numbers at every length."""
        at = [self.at(value, n) for n in (1, *self.probes, self.length)]
        return all(close(at[0], other) for other in at)


def close(a: Array, b: Array) -> bool:
    """Equal up to the last digits, which differ between the vector and the scalar code of NumPy."""
    if a.dtype.kind in "biu":
        return bool(np.array_equal(a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.abs(a[np.isfinite(a)])
    scale = float(finite.max()) if finite.size else 1.0
    return bool(np.allclose(a, b, rtol=1e-5, atol=1e-6 * scale, equal_nan=True))


def _look_up(known: dict[Value, Array], value: Value) -> Array:
    return value.load() if isinstance(value, Weight) else known[value]


def cone(value: Value) -> Sequence[Op]:
    """The operations that ``value`` comes from, operands first."""
    order: dict[Op, None] = {}
    todo = [(value.owner, False)]
    while todo:
        op, ready = todo.pop()
        if op is None or op in order:
            continue
        if ready:
            order[op] = None
            continue
        todo.append((op, True))
        todo.extend((v.owner, False) for v in op.operands)
    return list(order)


def _dims(op: Op) -> list[Dim]:
    found = [d for r in op.results if isinstance(r.type, TensorType) for d in r.shape]
    for attr in op.attrs.values():
        found.extend(d for d in (attr if isinstance(attr, tuple) else (attr,)) if hasattr(d, "free_symbols"))
    return found
