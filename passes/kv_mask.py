"""Which earlier tokens an attention sees, read from its attributes, or from its mask by evaluating it.

A mask spelled out in a model (``tril``, comparisons of ``arange``, a float mask to add) is an expression of the sizes:
its numbers at the length of the cache say exactly whether it is causal, a window, or chunks, however it is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilewright.ir import DType, Value, ops
from tilewright.ir.ops.attention import visible
from tilewright.passes.kv_shapes import Array, ShapeValues, refuse

MAX_ELEMENTS = 1 << 26
"""Masks and biases with more elements than this are not evaluated."""


@dataclass(frozen=True)
class Sight:
    """A token sees itself and those before it: the last ``window`` (if positive), those of its chunk (if positive).

    Beside a window it sees the ``first`` tokens.
    """

    window: int = -1
    chunk: int = 0
    first: int = 0

    def keep(self, n: int) -> Array:
        """bool ``[n, n]``: query i sees key j."""
        out: Array = visible(np.arange(n), np.arange(n), True, self.window, -1, self.chunk, self.first)
        return out


def square(shapes: ShapeValues, value: Value, n: int) -> Array:
    """A mask or bias for n tokens as ``[1, heads or 1, n, n]``; refused when too large, or other in each sequence."""
    heads = [d for d in value.shape[-3:-2] if isinstance(d, int)]
    if n * n * (heads or [1])[0] > MAX_ELEMENTS:
        raise refuse(
            value,
            f"makes a mask or bias of {n} x {n} for each head, too large to be evaluated; give kv-layout a smaller length",
        )
    array = shapes.at(value, n)
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    if array.shape[0] != 1:
        raise refuse(value, "gives each sequence of a batch another mask or bias")
    return np.broadcast_to(array, (*array.shape[:2], n, n))


def masked(bias: Array) -> Array:
    """Where an additive bias hides a key: so negative that its weight is exactly zero."""
    dtype = DType.of(bias.dtype)
    limit = max(-1e9, -32752.0) if dtype is DType.f16 else -1e9
    return np.asarray(bias.astype(np.float32) <= limit)


def read_sight(shapes: ShapeValues, op: ops.Attention, bias: Array | None) -> Sight:
    """What ``op`` lets a token see; ``bias`` are the numbers of a square bias at the cache's length.

    Raises UnsupportedError for anything that is not causal.
    """
    _check_padding(shapes, op)
    causal = op.causal or op.window_right == 1
    hides = bias is not None and bool(masked(bias).any())
    if op.mask is None and not hides:
        if not causal:
            raise refuse(op, "looks at later tokens too: what it gives would change as more follow")
        return Sight(op.window if op.window > 0 else -1, op.chunk, op.first)
    n = shapes.length
    keep = visible(np.arange(n), np.arange(n), op.causal, op.window, op.window_right, op.chunk, op.first)[None, None]
    if op.mask is not None:
        keep = keep & square(shapes, op.mask, n)
    if hides and bias is not None:
        keep = keep & ~masked(bias)
    if not (keep == keep[:, :1]).all():
        raise refuse(op, "has a mask that differs between heads")
    sight = match(keep[0, 0])
    if sight is None:
        raise refuse(op, "has a mask that is neither causal, nor a causal window, nor causal chunks")
    _check_shorter(shapes, op, sight, hides)
    return sight


def match(keep: Array) -> Sight | None:
    """The window or chunk that a bool ``[n, n]`` mask spells, or None when it is something else."""
    first = keep.argmax(axis=1)
    late = np.flatnonzero(first)
    found = [Sight()]
    if late.size:
        row = int(late[0])
        found = [Sight(window=row - int(first[row]) + 1), Sight(chunk=int(first[row]))]
    return next((s for s in found if np.array_equal(s.keep(len(keep)), keep)), None)


def _check_shorter(shapes: ShapeValues, op: ops.Attention, sight: Sight, hides: bool) -> None:
    """A mask that hides other tokens when there are fewer cannot be replaced by ``sight``."""
    for n in shapes.probes:
        keep = visible(np.arange(n), np.arange(n), op.causal, op.window, op.window_right, op.chunk)
        keep = keep if op.mask is None else keep & square(shapes, op.mask, n)
        keep = keep & ~masked(square(shapes, op.bias, n)) if hides and op.bias is not None else keep
        if not (keep == sight.keep(n)).all():
            raise refuse(op, f"has another kind of mask for {n} tokens than for {shapes.length}")


def _check_padding(shapes: ShapeValues, op: ops.Attention) -> None:
    if op.padding is None:
        return
    if not all(shapes.at(op.padding, n).all() for n in (*shapes.probes, shapes.length)):
        raise refuse(op, "has a padding mask: sequences are padded on the right, and each has its own length")
