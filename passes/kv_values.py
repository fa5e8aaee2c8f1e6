"""Values that are a part of their keys, and need not be stored beside them."""

from __future__ import annotations

from tilewright.ir import Value, ops, same_dim

_SIZE = 3  # the axis of components in ``[B, S, H, D]``


def begins_with(keys: Value, values: Value) -> bool:
    """Whether ``values`` are the first components of ``keys``, ``[B, S, H, D]`` both, as the graph has them."""
    if keys is values or _is_beginning(values, keys):
        return True
    op = keys.owner
    return isinstance(op, ops.Concat) and op.axis % keys.tensor.rank == _SIZE and begins_with(op.xs[0], values)


def _is_beginning(values: Value, keys: Value) -> bool:
    op = values.owner
    if not isinstance(op, ops.Slice) or op.x is not keys or any(op.starts) or set(op.steps) != {1}:
        return False
    return all(map(same_dim, op.stops[:_SIZE], keys.shape[:_SIZE]))
