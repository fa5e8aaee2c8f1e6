"""Copies of functions and operations with a symbolic size replaced: ``decode`` is ``forward`` at ``S = 1``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tilewright.ir import Argument, Builder, Dim, Function, KVType, Op, TensorType, Value, as_dim

Sizes = Mapping[Any, Dim]


def at_sizes(dim: Dim, sizes: Sizes) -> Dim:
    """``dim`` with the symbols in ``sizes`` replaced."""
    return dim if isinstance(dim, int) else as_dim(dim.subs(dict(sizes), simultaneous=True))


def clone_op(op: Op, mapping: Mapping[Value, Value], sizes: Sizes) -> Op:
    """A detached copy of ``op`` at other sizes; its result types are inferred anew."""
    changes: dict[str, Any] = {}
    for f in op.fields:
        value = getattr(op, f.name)
        if f.kind == "Dim":
            changes[f.name] = at_sizes(value, sizes)
        elif f.kind == "tuple[Dim, ...]":
            changes[f.name] = tuple(at_sizes(d, sizes) for d in value)
    return op.clone(mapping, **changes)


def clone_function(function: Function, name: str, sizes: Sizes) -> tuple[Function, dict[Value, Value]]:
    """A copy of ``function`` called ``name`` at other sizes, and the map from its values to the copy's."""
    mapping: dict[Value, Value] = {}
    copy = Function(name)
    for arg in function.args:
        if isinstance(arg.type, KVType):
            mapping[arg] = Argument(arg.name, arg.type)
        else:
            shape = tuple(at_sizes(d, sizes) for d in arg.shape)
            mapping[arg] = copy.arg(arg.name or "", TensorType(shape, arg.dtype))
    b = Builder(copy)
    for op in function.body:
        mapping.update(zip(op.results, b.insert(clone_op(op, mapping, sizes)).results))
    return copy, mapping


def sweep(function: Function) -> None:
    """Drop the operations whose results nothing uses."""
    for op in reversed(list(function.body)):
        if not op.has_effect and not any(r.users for r in op.results):
            op.drop()
