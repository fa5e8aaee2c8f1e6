"""How a loop kernel is laid out: its iteration space, what is a task, which rows stay on the stack.

The space starts as the results' shape. A dry walk over the accesses (`Survey`) then tells where an axis must be split
so that a reshape needs no division, where neighbouring axes can be one because every access runs through both, at
which places of the innermost axis the formula changes, and on which axes reductions depend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sympy

from tilewright.codegen import reads as rd
from tilewright.codegen.index import Index, Poly, Var, at_most, floor_div, less, modulo
from tilewright.codegen.index_shapes import as_dim, delinear, linear, size
from tilewright.codegen.mlir.loops_cost import result_sets, rows_on_stack
from tilewright.ir import Dim, Function, Op, Shape, Value, ops

FEW = 4
TILE = 16
_SEGMENTS = 8
Space = tuple[Poly, ...]


@dataclass(frozen=True)
class Group:
    """Results written by one nest. Loops run over ``dims`` in ``order``; axis ``vector``, if any, over lanes."""

    results: tuple[int, ...]
    dims: Space
    order: tuple[int, ...]
    vector: int | None
    cuts: tuple[int, ...] = ()
    """Where the formula changes along the vector axis."""


@dataclass(frozen=True)
class Plan:
    """Tasks run over ``outer``, row-major; in each, the groups' loops. ``block`` cuts the vector axis into tasks.

    ``tiled`` is an outer axis of which a task does `TILE` places: they run innermost, since they are neighbours in the
    memory that a transposition reads.
    """

    lead: Space
    groups: tuple[Group, ...]
    block: int
    buffered: frozenset[Value]
    tiled: int | None = None

    @property
    def outer(self) -> Space:
        """The axes that tasks run over."""
        axes = list(self.lead)
        if self.tiled is not None:
            axes[self.tiled] = floor_div(axes[self.tiled] + (TILE - 1), TILE)
        if self.block:
            axes.append(floor_div(self.groups[0].dims[-1] + (self.block - 1), self.block))
        return tuple(axes)

    @property
    def tasks(self) -> Dim:
        """Units of work."""
        return as_dim(_count(self.outer))

    @property
    def work(self) -> Dim:
        """About ``tasks``, without rounding up."""
        if self.block:
            return sympy.sympify(as_dim(_count((*self.lead, *self.groups[0].dims)))) / self.block
        return sympy.sympify(as_dim(_count(self.lead))) / (TILE if self.tiled is not None else 1)


class Survey:
    """The accesses of some results over an iteration space, by symbols only."""

    def __init__(self, results: Iterable[Value], space: Space) -> None:
        self.space = space
        self.vars = [Var(f"s{i}", Poly(), n - 1, 1) for i, n in enumerate(space)]
        self.places: list[Poly] = []
        self.cuts: dict[Var, set[int]] = {v: set() for v in self.vars}
        self.row_vars: set[Var] = set()
        self.inner_vars: set[Var] = set()
        self._sources: dict[Var, set[Var]] = {}
        self._seen: set[tuple[Value, Index]] = set()
        position = linear([Poly.of(v) for v in self.vars], space)
        for result in results:
            self.visit(result, delinear(position, result.shape))

    def visit(self, v: Value, index: Index) -> None:
        if (v, index) in self._seen:
            return
        self._seen.add((v, index))
        op = v.owner
        if op is None:
            self.places.append(linear(index, v.shape))
        elif rd.is_plain(op):
            for place in rd.reads(op, index, self._pick):
                self.visit(*place)
        elif isinstance(op, ops.Iota):
            self.places.append(index[0])
        elif isinstance(op, ops.Rope):
            self._rope(op, index)
        elif isinstance(op, ops.Concat):
            self._concat(op, index)
        elif isinstance(op, ops.Pad):
            for i, first, last in rd.pad_ranges(op, index):
                self._cut(i, first)
                self._cut(i, last)
            self.visit(*rd.pad_read(op, index))
        elif isinstance(op, ops.Quantize):
            self._quantize(op, v, index)
        elif not isinstance(op, rd.CREATION):
            self._row(op, index)

    def _pick(self, indices: Value, index: Index, dim: Dim) -> Poly:
        self.visit(indices, index)
        key = f"p{id(indices)}[{','.join(i.key for i in index)}]"
        var = Var(key, Poly(), size(dim) - 1, max((i.depth for i in index), default=0))
        self._sources[var] = self.used(index)
        return Poly.of(var)

    def _cut(self, at: Poly, place: Poly) -> None:
        """The formula changes where ``at`` reaches ``place``."""
        self.places.append(at)
        var = at.atoms[0] if len(at.atoms) == 1 else None
        if not isinstance(var, Var) or at - var_poly(var) != Poly.of(at.offset) or place.constant is None:
            return
        self.cuts.setdefault(var, set()).add(place.constant - at.offset)

    def _rope(self, op: ops.Rope, index: Index) -> None:
        if op.style == "half":
            self._cut(index[3], Poly.of(rd.rotated(op) // 2))
        self._cut(index[3], Poly.of(rd.rotated(op)))
        self.visit(op.x, index)
        for v in (op.cos, op.sin):
            self.visit(v, rd.rope_angle(op, index))

    def _concat(self, op: ops.Concat, index: Index) -> None:
        at = index[op.axis]
        for first, last, place in rd.concat_pieces(op, index):
            self._cut(at, first)
            if not (less(at, first) or at_most(last, at)):
                self.visit(*place)

    def _row(self, op: Op, index: Index) -> None:
        row = rd.row_of(op, index)
        at = tuple(
            Poly.of(Var(f"r{id(op)}.{i}", Poly(), size(n) - 1, 2)) for i, n in enumerate(rd.fold_extents(op))
        )
        self.visit(op.operands[0], rd.row_element(op, row, at))
        if rd.is_trailing(op):
            self.row_vars |= self.used(row)
        if isinstance(op, rd.FOLDS):
            return
        self.inner_vars |= self.used(index) - self.used(row)
        self.visit(op.operands[0], index)
        for place in rd.row_weights(op, index):
            self.visit(*place)

    def _quantize(self, op: ops.Quantize, v: Value, index: Index) -> None:
        *row, at = index
        element = Poly.of(Var(f"q{id(op)}", Poly(), size(op.x.shape[-1]) - 1, 2))
        self.visit(op.x, (*row, element))
        self.inner_vars |= self.used(index) - self.used(row)
        if v is op.results[0]:
            self.places.append(rd.quantize_group(op, at))
            self.visit(op.x, index)

    def used(self, index: Iterable[Poly]) -> set[Var]:
        """Variables of the space on which ``index`` depends."""
        found: set[Var] = set()
        for poly in index:
            for atom in poly.atoms:
                if isinstance(atom, Var):
                    found |= self._sources.get(atom, {atom})
                elif hasattr(atom, "num"):
                    found |= self.used([atom.num, atom.den])
        return found & set(self.vars)

    def split(self) -> tuple[int, Poly] | None:
        """An axis and a size to split it by, so that a division goes away."""
        for place in self.places:
            for atom in place.quotients():
                for axis, var in enumerate(self.vars):
                    n = self.space[axis]
                    if atom.num == Poly.of(var) and modulo(n, atom.den) == Poly() and less(atom.den, n):
                        return axis, atom.den
        return None

    def divides(self, axis: int) -> bool:
        """Whether some access divides the variable of ``axis``."""
        var = self.vars[axis]
        quotients = [q for place in self.places for q in place.quotients()]
        return any(var in self.used([q.num]) for q in quotients)


def var_poly(var: Var) -> Poly:
    return Poly.of(var)


# --- the iteration space ------------------------------------------------------------------------------------------


def planner(kernel: Function) -> Callable[[int], Plan]:
    """Plans of a kernel that ``match`` accepts, by about the elements of one task."""
    sets = result_sets(kernel)
    if all(0 in value.shape for value in kernel.returns):
        return lambda limit: Plan((Poly(),), (), 0, frozenset())
    buffered = rows_on_stack(kernel)[0]
    if len(sets) > 1:
        shared = _shared_prefix(kernel, sets, buffered)
        return lambda limit: shared
    results = [kernel.returns[i] for i in sets[0]]
    space = _space(results, tuple(map(size, results[0].shape)), 0)
    survey = Survey(results, space)
    vector = _vector_axis(survey)
    if vector is None and space and survey.vars[-1] in survey.row_vars:
        group = Group(tuple(sets[0]), (), (), None)
        return lambda limit: Plan(space, (group,), 0, buffered)

    def plan(limit: int) -> Plan:
        first = _first_inner(survey, limit)
        tiled = _tiled(survey, first, vector)
        block = 0 if tiled is not None else _block(survey, first, vector, limit)
        return Plan(space[:first], (_group(sets[0], survey, first, vector),), block, buffered, tiled)

    return plan


def shared_axes(kernel: Function) -> Shape:
    """Leading axes that all results have."""
    shared: list[Dim] = []
    for dims in zip(*(value.shape for value in kernel.returns)):
        if any(dim != dims[0] for dim in dims):
            break
        shared.append(dims[0])
    return tuple(shared)


def _shared_prefix(kernel: Function, sets: list[list[int]], buffered: frozenset[Value]) -> Plan:
    prefix = tuple(n for n in map(size, shared_axes(kernel)) if n.constant != 1)
    groups = []
    for members in sets:
        results = [kernel.returns[i] for i in members]
        survey = Survey(results, _space(results, tuple(map(size, results[0].shape)), len(prefix)))
        groups.append(_group(members, survey, len(prefix), _vector_axis(survey)))
    return Plan(prefix, tuple(groups), 0, buffered)


def _space(results: Sequence[Value], shape: Space, fixed: int) -> Space:
    """The axes to loop over; the first ``fixed`` stay as they are."""
    space = tuple(n for n in shape if n.constant != 1)
    for _ in range(8):
        wanted = Survey(results, space).split()
        if wanted is None or wanted[0] < fixed:
            break
        axis, den = wanted
        space = (*space[:axis], floor_div(space[axis], den), den, *space[axis + 1:])
    for axis in reversed(range(fixed, len(space) - 1)):
        merged = (*space[:axis], space[axis] * space[axis + 1], *space[axis + 2:])
        if not Survey(results, merged).divides(axis):
            space = merged
    return space


def _vector_axis(survey: Survey) -> int | None:
    """The last axis, unless it is tiny or each of its elements is a reduction of a contiguous row."""
    if not survey.space or survey.vars[-1] in survey.row_vars:
        return None
    last = survey.space[-1].constant
    return None if last is not None and last < FEW else len(survey.space) - 1


def _first_inner(survey: Survey, limit: int) -> int:
    """Axes from here on run inside of a task: normalised ones must, others while that is little work."""
    space = survey.space
    needed = [i for i, var in enumerate(survey.vars) if var in survey.inner_vars]
    first = min([*needed, max(len(space) - 1, 0)])
    work = _count(space[first:])
    while first > 0 and work.constant is not None and (work * space[first - 1]).constant is not None:
        work = work * space[first - 1]
        if work.constant > limit:  # type: ignore[operator]
            break
        first -= 1
    return first


def _tiled(survey: Survey, first: int, vector: int | None) -> int | None:
    """The outer axis along which an access is contiguous that is strided along the vectors."""
    if vector is None or survey.row_vars or survey.inner_vars or first < len(survey.space) - 1:
        return None
    last = survey.vars[-1]
    for place in survey.places:
        factors = {atoms: factor for atoms, factor in place.terms if not any(q in atoms for q in place.quotients())}
        if ((last,) in factors and factors[last,] == 1) or not any(last in atoms for atoms in factors):
            continue
        for axis, var in enumerate(survey.vars[:first]):
            if factors.get((var,)) == 1:
                return axis
    return None


def _block(survey: Survey, first: int, vector: int | None, limit: int) -> int:
    """Elements of the vector axis that are one task, 0 when it is not cut."""
    plain = not survey.row_vars and not survey.inner_vars
    if not plain or vector is None or first != len(survey.space) - 1 or survey.cuts[survey.vars[-1]]:
        return 0
    last = survey.space[-1].constant
    if first == 0:
        return limit
    return limit if last is not None and last >= 4 * limit else 0


def _group(members: Sequence[int], survey: Survey, first: int, vector: int | None) -> Group:
    inner = range(first, len(survey.space))
    order = sorted(inner, key=lambda axis: survey.vars[axis] in survey.inner_vars)
    if vector is not None and survey.vars[vector] in survey.inner_vars and order and order[-1] != vector:
        order = [*(axis for axis in order if axis != vector), vector]
    at = None if vector is None or vector < first else vector - first
    cuts = () if at is None else _cuts(survey, survey.space[-1])
    return Group(tuple(members), survey.space[first:], tuple(axis - first for axis in order), at, cuts)


def _cuts(survey: Survey, extent: Poly) -> tuple[int, ...]:
    cuts = sorted(c for c in survey.cuts[survey.vars[-1]] if c > 0 and less(Poly.of(c), extent))
    return tuple(cuts) if len(cuts) < _SEGMENTS else ()


def _count(space: Space) -> Poly:
    total = Poly.of(1)
    for n in space:
        total = total * n
    return total
