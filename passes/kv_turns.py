"""Queries as they would be at another position: the rope before them is repeated there.

    %q = nn.rope(%x, %cos, %sin)   ->   %far = nn.rope(%x, %capped_cos, %capped_sin)

StreamingLLM (arXiv:2309.17453) counts positions inside of its cache. Distances within a window are the same either way; the
sinks are taken to be no further from a query than in a cache that is full.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tilewright.ir import Builder, Function, Op, Value, ops
from tilewright.passes.kv_axes import Axes
from tilewright.passes.kv_rows import Rows
from tilewright.passes.kv_shapes import refuse

_MOVES = (ops.Reshape, ops.Transpose, ops.Slice, ops.Concat, ops.Broadcast, ops.Cast, ops.Gather)


@dataclass
class Turns:
    """Knows where the ropes of ``function`` take their angles from."""

    function: Function
    rows: Rows
    axes: dict[Value, Axes]
    angles: dict[tuple[Op, str], tuple[Value, Axes]] = field(default_factory=dict)
    capped: dict[int, Rows] = field(default_factory=dict)

    def note(self, rope: Op, slot: str, value: Value, axes: Axes) -> None:
        """``rope`` takes the rows of ``value``, which are by position, as ``slot``."""
        self.angles[rope, slot] = value, axes

    def behind(self, op: ops.Attention, position: int) -> Value:
        """The queries of ``op``, those that stand behind ``position`` as if they stood there."""
        assert op.parent is not None
        found = self._again(op.q, self._rows(position), Builder(op.parent, op, op.loc), op)
        if found is op.q:
            raise refuse(
                op,
                "has queries that no nn.rope turns by their position, so that sinks have no place beside a window "
                "(learned positions and biases give none); leave out sinks, or run fuse-rope before",
            )
        return found

    def _rows(self, position: int) -> Rows:
        """Rows of positions that go no further than ``position``."""
        if position not in self.capped:
            rows, body = self.rows, self.function.body
            builder = Builder(self.function, body[body.index(rows.positions.owner) + 1])  # type: ignore[arg-type]
            limit = builder.full(position, rows.positions)
            capped = builder(ops.Minimum, rows.positions, limit)
            self.axes[capped] = self.axes[rows.positions]
            self.capped[position] = Rows(rows.module, rows.shapes, capped, rows.length)
        return self.capped[position]

    def _again(self, value: Value, rows: Rows, builder: Builder, user: Op) -> Value:
        """``value`` with the ropes behind it repeated, or itself when there are none."""
        op = value.owner
        if isinstance(op, ops.Rope) and (op, "cos") in self.angles:
            angles = {slot: self.angles[op, slot] for slot in ("cos", "sin")}
            placed = {slot: rows.place(found, op, axes, 0) for slot, (found, axes) in angles.items()}
            return builder(ops.Rope, op.x, placed["cos"], placed["sin"], style=op.style)
        if not isinstance(op, _MOVES):
            return value
        changed = {v: new for v in op.operands if (new := self._again(v, rows, builder, user)) is not v}
        return builder.insert(op.clone(changed)).results[value.index] if changed else value  # type: ignore[attr-defined]
