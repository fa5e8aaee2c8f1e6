"""Which indices along the axes of values belong together: when one goes, all that are tied to it go (arXiv:2301.12900).

Each index along each axis of known size is a node. Operations tie nodes to each other (``rules.py``); what an operation
needs whole it pins. Nodes that are tied directly or through others form one component.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tilewright.ir import Function, Op, TensorType, Value, Weight
from tilewright.passes.calibration.data import Array

Axis = tuple[Value, int]
_NONE: Array = np.empty(0, np.int64)


@dataclass
class Axes:
    """The nodes of a function, their ties and pins. An axis of one index, or of symbolic size, has no nodes."""

    starts: dict[Axis, int] = field(default_factory=dict)
    count: int = 0
    ties: list[tuple[Array, Array]] = field(default_factory=list)
    pins: dict[Axis, str] = field(default_factory=dict)

    def nodes(self, value: Value, axis: int) -> Array:
        """The nodes along ``axis``, one an index, in order."""
        axis %= value.tensor.rank
        size = value.shape[axis]
        if not isinstance(size, int) or size <= 1:
            return _NONE
        if (value, axis) not in self.starts:
            self.starts[value, axis] = self.count
            self.count += size
        start = self.starts[value, axis]
        return np.arange(start, start + size)

    def tie(self, a: Array, b: Array) -> None:
        """The nodes ``a`` and ``b`` go together, pair by pair."""
        self.ties.append((a, b))

    def pin(self, value: Value, axis: int, reason: str) -> None:
        """No index along ``axis`` may go."""
        if self.nodes(value, axis).size:
            self.pins.setdefault((value, axis % value.tensor.rank), reason)

    def components(self) -> Array:
        """For each node the number of its component, ``[count]``."""
        label = np.arange(self.count)
        if not self.ties:
            return label
        a, b = (np.concatenate(side) for side in zip(*self.ties))
        while True:
            lowest = np.minimum(label[a], label[b])
            new = label.copy()
            np.minimum.at(new, label[a], lowest)
            np.minimum.at(new, label[b], lowest)
            while not np.array_equal(new, new[new]):
                new = new[new]
            if np.array_equal(new, label):
                return label
            label = new


@dataclass
class Ties:
    """What a rule says about one operation. Axes that it does not speak of are pinned."""

    axes: Axes
    op: Op
    known: set[Axis] = field(default_factory=set)

    def free(self, value: Value, axis: int) -> Array:
        """The nodes of an axis that the operation takes in any size."""
        nodes = self.axes.nodes(value, axis)
        self.known.add((value, axis % value.tensor.rank))
        return nodes

    def same(self, a: Value, i: int, b: Value, j: int) -> None:
        """Axes of one size go together index by index; one index that is repeated ties nothing."""
        first, second = self.free(a, i), self.free(b, j)
        if first.size == second.size:
            self.axes.tie(first, second)

    def finish(self) -> None:
        reason = f"{self.op.name} at {self.op.loc.describe()} needs all of it"
        for value in [*self.op.operands, *self.op.results]:
            for i in range(value.tensor.rank if isinstance(value.type, TensorType) else 0):
                if (value, i) not in self.known:
                    self.axes.pin(value, i, reason)


Rule = Callable[[Ties, Op], None]


def axes_of(function: Function, rule: Callable[[Op], Rule | None]) -> Axes:
    """The axes of all values of ``function``. ``rule`` gives the rule of an operation, None where there is none."""
    axes = Axes()
    for arg in function.args:
        for i in range(arg.tensor.rank):
            axes.pin(arg, i, f"it is the input {arg.name}")
    for op in function.body:
        ties = Ties(axes, op)
        apply = rule(op)
        if apply is not None:
            apply(ties, op)
        ties.finish()
    for value in dict.fromkeys(v for v, _ in axes.starts):
        if isinstance(value, Weight) and any(op.parent is not function for op in value.users):
            for i in range(value.tensor.rank):
                axes.pin(value, i, f"@{value.name} is used by another function too")
    return axes
