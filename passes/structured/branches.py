"""Residual branches, ``x + f(x)``: what can go as a whole, and how much each of them changes x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.ir import Function, Op, Value, Weight, ops
from tilewright.passes.calibration.data import Array, Batch
from tilewright.passes.calibration.statistics import blocks
from tilewright.passes.calibration.stream import LAYERS, Stream
from tilewright.passes.match import either, same_shape


@dataclass(frozen=True, eq=False)
class Branch:
    """``add`` is ``trunk + f(trunk)``, ``body`` the operations of f in order."""

    add: ops.Add
    trunk: Value
    body: tuple[Op, ...]

    @property
    def attends(self) -> bool:
        """Whether tokens meet in it."""
        return any(isinstance(op, ops.Attention) for op in self.body)

    @property
    def name(self) -> str:
        """Module path of its last layer."""
        return [op for op in self.body if isinstance(op, LAYERS)][-1].loc.module

    def weights(self) -> set[Weight]:
        return {v for op in self.body for v in op.operands if isinstance(v, Weight)}


Block = tuple[Branch, ...]
"""Neighbouring branches that go together."""


def find_branches(function: Function) -> list[Branch]:
    """The branches of a function that hold a linear layer, in its order; none within another."""
    found: list[Branch] = []
    inside: set[Op] = set()
    place = {op: i for i, op in enumerate(function.body)}
    for add in reversed(list(function.walk(ops.Add))):
        if add in inside or not isinstance(add, ops.Add):
            continue
        for trunk, other in either(add):
            body = between(function, place, trunk, other)
            if any(isinstance(op, LAYERS) for op in body):
                found.append(Branch(add, trunk, body))
                inside.update(body)
                break
    return found[::-1]


def between(function: Function, place: Mapping[Op, int], trunk: Value, end: Value) -> tuple[Op, ...]:
    """The operations that make ``end`` of ``trunk``, when nothing else reads what they make; else none.

    What does not depend on ``trunk`` (tables, masks) counts as given.
    """
    if end.owner is None or len(end.users) > 1 or not same_shape(trunk.shape, end.shape):
        return ()
    first = -1 if trunk.owner is None else place[trunk.owner]
    made: list[Op] = []
    known = {trunk}
    for op in function.body[first + 1 : place[end.owner] + 1]:
        if not known.isdisjoint(op.operands):
            known.update(op.results)
            made.append(op)
    needed, part = {end}, []
    for op in reversed(made):
        if not needed.isdisjoint(op.results):
            part.append(op)
            needed.update(op.operands)
    inner = {r for op in part for r in op.results} - {end}
    closed = end in known and all(set(value.users) <= set(part) for value in inner)
    return tuple(reversed(part)) if closed else ()


def layers_of(branches: Sequence[Branch]) -> list[Block]:
    """Branches by layers: each begins with one in which tokens meet."""
    found: list[list[Branch]] = []
    for branch in branches:
        if branch.attends or not found:
            found.append([])
        found[-1].append(branch)
    return [tuple(block) for block in found]


@dataclass(frozen=True)
class Influence:
    """How far blocks turn the hidden state: ``1 - cos`` (ShortGPT, arXiv:2403.03853) and the angle as a part of pi.

    ``energy`` is the mean square of the hidden state behind the block, the sum over its channels.
    """

    turn: float
    angle: float
    energy: float


def influences(function: Function, spans: Sequence[Block], batches: Sequence[Batch]) -> list[Influence]:
    """What each of ``spans`` does to the hidden state, a mean over tokens; one run over the data."""
    ends = {span[-1].add.result: i for i, span in enumerate(spans)}
    starts = {span[0].trunk for span in spans}
    run = Stream(function, batches, [user for end in ends for user in end.users])
    held = {value: run.values(value) for value in starts & set(run.known)}
    found: dict[int, Influence] = {}
    while run.at < len(run.body):
        op = run.body[run.at]
        run.step()
        for value in set(op.results) & set(run.known):
            if value in ends:
                found[ends[value]] = influence(held.pop(spans[ends[value]][0].trunk), run.values(value))
            if value in starts:
                held[value] = run.values(value)
    return [found[i] for i in range(len(spans))]


def influence(before: Sequence[Array], after: Sequence[Array]) -> Influence:
    """Of hidden states ``[..., H]``."""
    turn = angle = energy = count = 0.0
    for a, b in zip(blocks(before), blocks(after)):
        sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosine = np.clip(np.einsum("rh,rh->r", a, b) / np.maximum(sizes, 1e-30), -1, 1).astype(np.float64)
        turn += float((1 - cosine).sum())
        angle += float(np.arccos(cosine).sum() / np.pi)
        energy += float(np.einsum("rh,rh->", b, b))
        count += len(a)
    return Influence(turn / count, angle / count, energy / count)
