"""The blocks of a function: behind each one value alone goes on, as behind a layer of a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tilewright.ir import Function, Op, Return, Value, ops
from tilewright.passes.activations.places import Place
from tilewright.passes.quantize import is_given


@dataclass(frozen=True)
class Block:
    """Places and the value that is all that goes on behind them."""

    places: tuple[Place, ...]
    result: Value

    @property
    def last(self) -> Op:
        assert self.result.owner is not None
        return self.result.owner


def blocks_of(function: Function, places: Sequence[Place]) -> list[Block]:
    """The blocks that hold places; each but the first begins with the next attention."""
    stops = {place.stop: place for place in places}
    found: dict[int, Block] = {}
    attended = 0
    for part, result in _segments(function):
        attended += any(isinstance(op, ops.Attention) for op in part)
        held = tuple(stops[op] for op in part if op in stops)
        if held:
            number = max(attended, 1)
            before = found[number].places if number in found else ()
            found[number] = Block((*before, *held), result)
    return list(found.values())


def _segments(function: Function) -> Iterator[tuple[list[Op], Value]]:
    """The operations up to each value that alone goes on behind it. What depends on sizes alone, as positions do, does
    not count."""
    left: dict[Value, int] = {a: len(a.users) for a in function.args if a.dtype.is_float}
    part: list[Op] = []
    for op in function.body:
        if isinstance(op, Return):
            break
        part.append(op)
        taken = [v for v in set(op.operands) if v in left]
        if taken or (isinstance(op, ops.Embedding) and is_given(op.indices)):
            left |= {r: len(r.users) for r in op.results if r.users}
        for value in taken:
            left[value] -= 1
            if not left[value]:
                del left[value]
        if len(left) == 1:
            yield part, next(iter(left))
            part = []
    if part:
        yield part, part[-1].results[0]
