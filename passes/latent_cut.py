"""What to store of each token so that keys and values follow from it, in the fewest bytes: a minimum cut.

Values of a token that keys and values are linear in, each as heavy as its bytes, lie between what is not linear (a norm, a
rope) and the keys and values; the lightest set of them that all paths go through is what has to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx

from tilewright.ir import Op, Value, Weight, dim_symbols, ops
from tilewright.ir.types import product
from tilewright.passes.match import same_shape

_SOURCE, _SINK = "tokens", "attention"


def numbers(value: Value) -> int:
    """How many a token has of ``value`` ``[B, S, ...]``."""
    return int(product(value.shape[2:]))


def bytes_of(values: Sequence[Value]) -> int:
    """Bytes of a token."""
    return sum(numbers(v) * v.dtype.size for v in values)


def linear_operands(op: Op | None) -> list[Value]:
    """The operands ``[B, S, ...]`` that an operation is linear in, token by token; none when it is something else."""
    match op:
        case ops.Linear(bias=None) if isinstance(op.weight, Weight):
            found: list[Value] = [op.x]
        case ops.Reshape() | ops.Slice() | ops.Broadcast():
            found = [op.x]
        case ops.Concat() if op.axis % op.result.tensor.rank >= 2:
            found = list(op.xs)
        case _:
            return []
    whole = all(same_shape(v.shape[:2], op.result.shape[:2]) and not dim_symbols(list(v.shape[2:])) for v in found)
    moved = isinstance(op, ops.Slice) and (any(op.starts[:2]) or op.steps[:2] != (1, 1))
    leads = isinstance(op, ops.Broadcast) and op.x.tensor.rank != op.result.tensor.rank
    return [] if moved or leads or not whole else found


def stored_for(wanted: Sequence[Value]) -> list[Value]:
    """The values of a token that ``wanted`` are linear in and that have the fewest bytes, else ``wanted`` themselves."""
    graph = networkx.DiGraph()
    todo, seen = list(wanted), dict.fromkeys(wanted)
    while todo:
        value = todo.pop()
        graph.add_edge((value, "in"), (value, "out"), capacity=bytes_of([value]))
        operands = linear_operands(value.owner)
        for operand in operands:
            graph.add_edge((operand, "out"), (value, "in"))
        if not operands:
            graph.add_edge(_SOURCE, (value, "in"))
        todo += [v for v in operands if v not in seen]
        seen.update(dict.fromkeys(operands))
    for value in wanted:
        graph.add_edge((value, "out"), _SINK)
    _, (reached, _) = networkx.minimum_cut(graph, _SOURCE, _SINK)
    return [value for value in seen if (value, "in") in reached and (value, "out") not in reached]
