"""The structures of a function: groups of units that can go one by one, such as the channels of one feed-forward layer.

A unit is a component of tied indices (``axes.py``) that nothing pins, with columns of linear layers that read it and rows
of weights that make it. Units that touch the same axes are one group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from tilewright.ir import Function, Op, Weight, ops
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.stream import LAYERS, Layer
from tilewright.passes.structured.axes import Axes, Axis, Rule, axes_of
from tilewright.passes.structured.rules import HEADS, grouped, rule_of

Kind = Literal["channels", "heads", "groups"]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can go from the graph one by one.

    ``index``: for each axis that they touch the number of the unit each index belongs to, -1 where it is none's.
    ``readers``: the layers that read them. ``kind`` is ``heads`` for queries, alone or with keys of their own, ``groups``
    for heads of keys with all their queries, else ``channels``. ``shared`` weights get smaller with other groups too.
    """

    kind: Kind
    index: Mapping[Axis, Array]
    readers: tuple[Layer, ...]
    attention: ops.Attention | None
    count: int
    shared: frozenset[Weight] = frozenset()

    @property
    def name(self) -> str:
        """Where the first reader is."""
        return self.readers[0].loc.module or self.readers[0].name

    @cached_property
    def parties(self) -> Array:
        """For each unit the number of the party that it belongs to, ``[count]``: all parties must stay of one size.

        Queries that share a head of keys are a party; of other units all are one.
        """
        if self.attention is None or self.kind == "groups":
            return np.zeros(self.count, np.int64)
        index = self.index[self.attention.result, HEADS]
        shared = int(self.attention.q.shape[HEADS]) // int(self.attention.k.shape[HEADS])
        found = np.zeros(self.count, np.int64)
        if shared > 1:
            found[index[index >= 0]] = np.nonzero(index >= 0)[0] // shared
        return found

    def weights(self) -> list[Weight]:
        """The weights that get smaller."""
        return list(dict.fromkeys(value for value, _ in self.index if isinstance(value, Weight)))

    def columns(self, reader: Layer) -> Array:
        """For each input channel of ``reader`` the unit it belongs to, -1 where it is none's; ``[K]``."""
        return self.index[reader.x, reader.x.tensor.rank - 1]

    def kept(self, gone: Array) -> dict[Axis, Array]:
        """What stays of each axis without the units ``gone``."""
        lost = np.zeros(self.count + 1, bool)
        lost[gone] = True
        lost[-1] = False  # what belongs to no unit stays
        return {axis: ~lost[index] for axis, index in self.index.items()}


def find_groups(function: Function, kinds: Sequence[Kind], skip: Callable[[Op, str], None]) -> list[Group]:
    """The groups of the wanted kinds, in the order of their readers. ``skip`` hears of layers whose inputs are in none."""
    axes = axes_of(function, _rule(kinds))
    label = axes.components()
    pinned = _pinned(axes, label)
    found = _by_axes(axes, label, set(pinned))
    groups: dict[Layer, list[Group]] = {}
    layers = [op for op in function.walk(*LAYERS) if isinstance(op, LAYERS)]
    for touched, units in found.items():
        group = _group(axes, label, touched, units, layers, kinds)
        if isinstance(group, Group):
            groups.setdefault(group.readers[0], []).append(group)
    wanted = with_shared([g for op in layers for g in groups.get(op, []) if g.kind in kinds])
    taken = {op for g in wanted for op in g.readers}
    for op in layers:
        if op not in taken:
            skip(op, _reason(axes, label, pinned, op, groups))
    return wanted


def with_shared(groups: Sequence[Group]) -> list[Group]:
    """Groups that know which of their weights others touch too."""
    times = Counter(w for g in groups for w in g.weights())
    return [replace(g, shared=frozenset(w for w in g.weights() if times[w] > 1)) for g in groups]


def _rule(kinds: Sequence[Kind]) -> Callable[[Op], Rule | None]:
    return lambda op: grouped if isinstance(op, ops.Attention) and "groups" in kinds else rule_of(op)  # type: ignore[return-value]


def _pinned(axes: Axes, label: Array) -> dict[int, str]:
    """The components that something pins, and what."""
    found: dict[int, str] = {}
    for (value, axis), reason in axes.pins.items():
        for component in np.unique(label[axes.nodes(value, axis)]):
            found.setdefault(int(component), reason)
    return found


def _by_axes(axes: Axes, label: Array, pinned: set[int]) -> dict[tuple[Axis, ...], list[int]]:
    """The components that nothing pins, by the axes that they touch."""
    touched: dict[int, list[Axis]] = {}
    for axis, start in axes.starts.items():
        for component in np.unique(label[start : start + int(axis[0].shape[axis[1]])]).tolist():
            if component not in pinned:
                touched.setdefault(component, []).append(axis)
    found: dict[tuple[Axis, ...], list[int]] = {}
    for component, where in sorted(touched.items()):
        found.setdefault(tuple(where), []).append(component)
    return found


def _group(axes: Axes, label: Array, touched: Sequence[Axis], units: Sequence[int], layers: Sequence[Layer],
           kinds: Sequence[Kind]) -> Group | None:  # fmt: skip
    """The units as a group; None when no layer reads them, or nothing that is stored gets smaller with them."""
    place = set(touched)
    readers = tuple(op for op in layers if (op.x, op.x.tensor.rank - 1) in place)
    read = {(w, 1) for op in readers for w in op.operands}
    if not readers or not any(isinstance(value, Weight) and (value, axis) not in read for value, axis in touched):
        return None
    number = np.full(axes.count, -1)
    number[list(units)] = np.arange(len(units))
    index = {axis: number[label[axes.nodes(*axis)]] for axis in touched}
    attention = next((v.owner for v, axis in touched if isinstance(v.owner, ops.Attention) and axis == HEADS), None)
    kind: Kind = "channels" if attention is None else "groups" if "groups" in kinds else "heads"
    return Group(kind, index, readers, attention, len(units))


def _reason(axes: Axes, label: Array, pinned: Mapping[int, str], op: Layer, groups: Mapping[Layer, Sequence[Group]]) -> str:
    """Why the inputs of a layer all stay."""
    other = [g.kind for found in groups.values() for g in found if op in g.readers]
    if other:
        return f"its inputs are {other[0]}, which are not asked for"
    found = [pinned[c] for c in label[axes.nodes(op.x, -1)].tolist() if c in pinned]
    return f"its inputs stay: {found[0]}" if found else "nothing that is stored makes its inputs"
