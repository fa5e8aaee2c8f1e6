"""What a model needs the heads of its keys for: what its layers lose when one head alone sees less than all of the text.

Measured on text, as DuoAttention (arXiv:2410.10819) finds the heads that retrieve; but for each head by itself, over the
projection that reads it, and not by training. ``repeated`` text is random tokens that come twice, where only heads that
look far back find anything: the probe of RazorAttention (arXiv:2407.15891).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tilewright.ir import Env, Module, Op, PassError, Value, Weight, ops
from tilewright.ir.interpreter import evaluate
from tilewright.passes.activations.attention import AnyAttention, joined_heads
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.stream import Stream
from tilewright.passes.weights import as_weight

SEQUENCES = 4
"""How many the repeated text has."""

Ways = Callable[[AnyAttention, Env, Sequence[Any]], Sequence[Array]]
"""What attention to less gives, in one way or several, of the same operands."""


def errors(run: Stream, attentions: Collection[Op], ways: Ways) -> dict[Op, Array]:
    """For each attention the squared error of each of its heads of keys in each way, ``[ways, Hkv]``, as a part of what
    its reader gives. ``run`` stops in front of these attentions, and goes on with what they give themselves.
    """
    found: dict[Op, Array] = {}
    while run.at < len(run.body):
        op = run.body[run.at]
        if op in attentions:
            assert isinstance(op, AnyAttention)
            found[op] = _losses(run, op, ways)
        run.step()
    return found


def _losses(run: Stream, op: AnyAttention, ways: Ways) -> Array:
    reader = _reader(op)
    matrix = None if reader is None else reader.load().astype(np.float32)
    count = op.cache.cache.heads if isinstance(op, ops.Attend) else int(op.k.shape[2])
    lost: list[list[list[float]]] = []
    whole = 0.0
    for i, env in enumerate(run.envs):
        args = [None if v is None else v.load() if isinstance(v, Weight) else run.known[v][i] for v in op.operand_slots()]
        full = evaluate(op, env, args)[0].astype(np.float32)
        whole += float(np.square(_read(full, matrix)).sum())
        lost.append([_by_head(full - part.astype(np.float32), matrix, count) for part in ways(op, env, args)])
    if reader is not None:
        reader.release()
    total: Array = np.array(lost).sum(0) / max(whole, 1e-30)
    return total


def _by_head(change: Array, matrix: Array | None, count: int) -> list[float]:
    """The square of what the reader makes of the change of each head of keys alone."""
    heads, size = change.shape[2] // count, change.shape[2] // count * change.shape[3]
    parts = [change[:, :, h * heads : (h + 1) * heads] for h in range(count)]
    columns = [None if matrix is None else matrix[:, h * size : (h + 1) * size] for h in range(count)]
    return [float(np.square(_read(part, mine)).sum()) for part, mine in zip(parts, columns)]


def _reader(op: AnyAttention) -> Weight | None:
    """The weight of the projection that reads the heads, if there is just one."""
    users = list(joined_heads(op).users)
    return as_weight(users[0].weight, 2) if len(users) == 1 and isinstance(users[0], ops.Linear) else None


def _read(heads: Array, matrix: Array | None) -> Array:
    flat = heads.reshape(*heads.shape[:2], -1)
    return flat if matrix is None else flat @ matrix.T


def repeated(module: Module, ids: Value, window: int) -> list[Array]:
    """Random tokens that come twice, further apart than ``window``: texts i64 ``[1, S]`` for the argument ``ids``.

    Raises PassError when the model takes too few.
    """
    most = module.dims.get(str(ids.shape[1]), (1, 4 * window))[1]
    half = min(most // 2, 2 * window)
    if half <= window:
        raise PassError(f"a window of {window} tokens leaves nothing out of the {most} that the model was traced for")
    table = next(op.table for op in ids.users if isinstance(op, ops.Embedding))
    rng = np.random.default_rng(0)
    rows = rng.integers(0, int(table.shape[0]), (SEQUENCES, half))
    return [np.concatenate([row, row])[None] for row in rows]
