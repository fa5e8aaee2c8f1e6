"""Which heads of keys a model needs whole: what its layers lose when one head alone sees only sinks and a window.

Measured on text, as DuoAttention (arXiv:2410.10819) finds the heads that retrieve; but for each head by itself, over the
projection that reads it, and not by training. ``repeated`` text is random tokens that come twice, where only heads that
look far back find anything: the probe of RazorAttention (arXiv:2407.15891).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from tilewright.ir import Function, Module, Op, PassError, Weight, ops
from tilewright.ir.interpreter import evaluate
from tilewright.passes.activations.attention import joined_heads
from tilewright.passes.calibration.data import Array, Batch
from tilewright.passes.calibration.stream import Stream
from tilewright.passes.weights import as_weight

SEQUENCES = 4
"""How many the repeated text has."""


def errors(
    function: Function, batches: Sequence[Batch], attentions: Collection[Op], less: Callable[[ops.Attention], Op]
) -> dict[Op, Array]:
    """For each attention the squared error of each of its heads of keys, ``[Hkv]``, as a part of what its reader gives.

    ``less`` makes a detached attention that sees less.
    """
    run = Stream(function, batches, attentions)
    found: dict[Op, Array] = {}
    while run.at < len(run.body):
        op = run.body[run.at]
        if op in attentions:
            assert isinstance(op, ops.Attention)
            streamed = less(op)
            found[op] = _losses(run, op, streamed)
            streamed.drop()
        run.step()
    return found


def _losses(run: Stream, op: ops.Attention, less: Op) -> Array:
    reader = _reader(op)
    matrix = None if reader is None else reader.load().astype(np.float32)
    lost, whole = np.zeros(int(op.k.shape[2])), 0.0
    for i, env in enumerate(run.envs):
        args = [None if v is None else v.load() if isinstance(v, Weight) else run.known[v][i] for v in op.operand_slots()]
        full, part = (evaluate(o, env, args)[0].astype(np.float32) for o in (op, less))
        whole += float(np.square(_read(full, matrix)).sum())
        heads = full.shape[2] // lost.size
        for head in range(lost.size):
            alone = np.zeros_like(full)
            mine = slice(head * heads, (head + 1) * heads)
            alone[:, :, mine] = full[:, :, mine] - part[:, :, mine]
            lost[head] += float(np.square(_read(alone, matrix)).sum())
    if reader is not None:
        reader.release()
    return lost / max(whole, 1e-30)


def _reader(op: ops.Attention) -> Weight | None:
    """The weight of the projection that reads the heads, if there is just one."""
    users = list(joined_heads(op).users)
    return as_weight(users[0].weight, 2) if len(users) == 1 and isinstance(users[0], ops.Linear) else None


def _read(heads: Array, matrix: Array | None) -> Array:
    flat = heads.reshape(*heads.shape[:2], -1)
    return flat if matrix is None else flat @ matrix.T


def repeated(module: Module, function: Function, window: int) -> list[Batch]:
    """Random tokens that come twice, further apart than ``window``. Raises PassError when the model takes too few."""
    [ids] = function.args
    most = module.dims.get(str(ids.shape[1]), (1, 4 * window))[1]
    half = min(most // 2, 2 * window)
    if half <= window:
        raise PassError(f"a window of {window} tokens leaves nothing out of the {most} that the model was traced for")
    table = next(op.table for op in ids.users if isinstance(op, ops.Embedding))
    rng = np.random.default_rng(0)
    rows = rng.integers(0, int(table.shape[0]), (SEQUENCES, half))
    return [{ids.name or "": np.concatenate([row, row])[None]} for row in rows]
