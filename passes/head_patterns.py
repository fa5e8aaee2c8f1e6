"""Which pattern of ``kv.choose`` each head of keys is given: the one that changes least what its layer gives.

Kernel-aware search of MInference (arXiv:2407.02490, section 3.2): patterns are compared at the same count of blocks, which
is what the kernel takes time for. There it is query heads that have patterns; here those that share a head of keys, which
also share their lists of blocks, since the kernel goes along one list with the queries of all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from tilewright.ir import CONTIGUOUS, Env, Function, Module, Op, PassError, ops
from tilewright.ir.interpreter import Cache, empty_states, evaluate
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.data import Array, Batch, check, listed
from tilewright.passes.calibration.stream import Stream
from tilewright.passes.head_profile import errors, repeated

Text = Literal["calibration", "repeated"]
CANDIDATES = ("a-shape", "vertical-slash", "block-sparse")
"""Of two that are as near the first is taken. ``flex`` decides for each prompt how many blocks it takes."""
CHUNK = 512
"""Queries that choose at once: prompts are fed in such pieces."""
WHY = "sparse-prefill with pattern=auto"


def best_patterns(
    module: Module, ctx: PassContext, attentions: Sequence[ops.Attend], text: Text, sizes: Mapping[str, Any]
) -> dict[Op, tuple[str, ...]]:
    """Of each of ``attentions`` of ``@prefill`` the pattern of each head of keys; of one that all have, that alone.

    ``sizes`` are the attributes of ``kv.choose``, with ``tokens``. Raises PassError without data to measure on, and where
    no text is so long that something is left out.
    """
    function = module.functions["prefill"]
    batches = _prompts(module, function, ctx, text, sizes["tokens"])
    if max(batch["ids"].shape[1] for batch in batches) <= -(-sizes["tokens"] // sizes["block"]) * sizes["block"]:
        raise PassError(f"{WHY}: no text is longer than what lists hold, {sizes['tokens']} tokens: nothing tells patterns "
                        "apart; give longer texts, or fewer tokens")  # fmt: skip
    run = Stream(function, batches, attentions)
    for name, state in module.states.items():
        run.known[state] = [_empty(module, batch, name) for batch in batches]  # type: ignore[misc]
    lost = errors(run, attentions, partial(_each, sizes={**sizes, "dense": 0}))
    found = {op: tuple(CANDIDATES[i] for i in losses.argmin(0)) for op, losses in lost.items()}
    for op, kinds in found.items():
        ctx.note(f"{op.loc.module or op.name}: {_counted(kinds)}; {_shown(lost[op])}")
    ctx.note(f"all heads of keys: {_counted([kind for kinds in found.values() for kind in kinds])}")
    return {op: kinds[:1] if len(set(kinds)) == 1 else kinds for op, kinds in found.items()}


def _counted(kinds: Sequence[str]) -> str:
    count = Counter(kinds)
    return ", ".join(f"{count[kind]} {kind}" for kind in CANDIDATES if count[kind])


def _shown(losses: Array) -> str:
    """What is lost of a layer's output, as if the heads' errors were independent."""
    alone = ", ".join(f"{kind} {sum(row):.2g}" for kind, row in zip(CANDIDATES, losses))
    return f"part of the output that changes: {losses.min(0).sum():.2g} ({alone})"


# --- prompts ----------------------------------------------------------------------------------------------------------


def _prompts(module: Module, function: Function, ctx: PassContext, text: Text, tokens: int) -> list[Batch]:
    """Inputs of ``@prefill``: each text as a whole."""
    ids = function.args[0]
    if text == "repeated":
        texts = repeated(module, ids, tokens)
    else:
        texts = [next(iter(batch.values())) for batch in listed(ctx, f"{WHY} and text=calibration")]
    batches = [_prompt(module, function, text) for text in texts]
    check(function, module, batches, WHY)
    return batches


def _prompt(module: Module, function: Function, ids: Array) -> Batch:
    count, size = ids.shape
    given = {"ids": ids, "start": np.zeros(count, np.int64), "last": np.full(count, size - 1, np.int64)}
    page = max((state.cache.page for state in module.states.values()), default=0)
    if page:
        pages = -(-size // page)
        given["table"] = np.arange(count * pages, dtype=np.int32).reshape(count, pages)
    return {arg.name or "": given[arg.name or ""] for arg in function.args}


def _empty(module: Module, batch: Batch, name: str) -> Cache:
    """The cache ``name`` for a prompt, no longer than it."""
    count, size = batch["ids"].shape
    pages = batch["table"].size if "table" in batch else None
    cache = empty_states(module, count, pages)[name]
    return tuple(part[:, :size] for part in cache) if module.states[name].cache.layout == CONTIGUOUS else cache


# --- attention to less ------------------------------------------------------------------------------------------------


def _each(op: Op, env: Env, args: Sequence[Any], sizes: Mapping[str, Any]) -> list[Array]:
    """What ``op`` gives with each of the patterns for all heads."""
    assert isinstance(op, ops.Attend)
    return [_sparse(op, env, args, {**sizes, "patterns": (kind,)}) for kind in CANDIDATES]


def _sparse(op: ops.Attend, env: Env, args: Sequence[Any], given: Mapping[str, Any]) -> Array:
    choose = ops.Choose(op.q, op.cache, op.start, op.table, scale=op.scale, **given)
    attend = op.clone({}, blocks=choose.result, block=choose.block, queries=choose.queries)
    values = dict(zip((f.name for f in op.fields if f.is_operand), args))
    queries, first, symbol = values["q"], values["start"], op.q.shape[1]
    size = queries.shape[1] if isinstance(symbol, int) else CHUNK
    found = []
    for at in range(0, queries.shape[1], size):
        values |= {"q": queries[:, at : at + size], "start": first + at}
        here = Env({**env.dims, str(symbol): values["q"].shape[1]})
        [values["blocks"]] = evaluate(choose, here, [values[name] for name in ("q", "cache", "start", "table")])
        found += evaluate(attend, here, list(values.values()))
    attend.drop()
    choose.drop()
    return np.concatenate(found, 1)
