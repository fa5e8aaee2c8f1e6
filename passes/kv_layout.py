"""``forward(ids) -> logits`` without memory -> ``prefill(ids, start, last)`` and ``decode(ids, start)`` over KV caches.

The cache is made from the causal model as it stands, by how values depend on the tokens and not by what the model is
called: attention between tokens gets a cache (:mod:`kv_attention`), values that depend on the position alone are taken
by position (:mod:`kv_rows`), all else must treat each position alone (:mod:`kv_axes`), or the module is refused with
the operation and the reason.

``start`` ``[B]`` is the position of a sequence's first token in this call. Sequences are padded on the right; ``last``
``[B]`` is the index of the last valid token, and logits are those after it. ``start[b] + S`` may not exceed ``length``.
Caches of pages take one ``table`` (i32 ``[B, T]``) for all layers: the pages of each sequence, in order. Caches of kept
tokens take ``count`` ``[B]``, how many of a call's tokens are of the text: a sequence with none stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tilewright.ir import (
    Argument,
    Builder,
    DType,
    Function,
    Kept,
    KVType,
    Module,
    Op,
    Paged,
    PassError,
    Return,
    Ring,
    TensorType,
    UnsupportedError,
    Value,
    ops,
    sym,
)
from tilewright.passes.base import PassContext
from tilewright.passes.kv_attention import Attentions
from tilewright.passes.kv_axes import PLAIN, Axes, Mixed
from tilewright.passes.kv_bias import Biases
from tilewright.passes.kv_carry import check_result, named_operands, result_axes
from tilewright.passes.kv_clone import clone_function, sweep
from tilewright.passes.kv_last import take_last
from tilewright.passes.kv_options import ENDLESS, KvOptions, describe
from tilewright.passes.kv_rows import Rows
from tilewright.passes.kv_select import select_pages
from tilewright.passes.kv_shapes import ShapeValues, refuse
from tilewright.passes.kv_turns import Turns

LONGEST = 4096


@dataclass(frozen=True)
class KvLayout(KvOptions):
    """Gives a causal language model its KV cache, stored as :class:`KvOptions` say.

    ``keep_forward`` leaves ``@forward`` in place.
    """

    name: ClassVar[str] = "kv-layout"
    keep_forward: bool = False

    def inapplicable(self, module: Module) -> str | None:
        task = module.meta.get("task", "not given")
        if task != "causal-lm":
            return f'the model\'s task is {task}, a KV cache is for causal-lm (meta "task")'
        if "decode" in module.functions:
            return "the module has a decode function already"
        return None if "forward" in module.functions else "the module has no function @forward"

    def run(self, module: Module, ctx: PassContext) -> bool:
        forward = module.functions["forward"]
        ids = _token_input(module, forward)
        batch, seq = ids.shape
        known, length = self._lengths(module, seq)
        step = Step(module, forward, ShapeValues(batch, seq, known), length, self)
        step.transform()
        decode, prefill = step.decode(), step.prefill()
        module.add(prefill)
        module.add(decode)
        if not self.keep_forward:
            _remove(module, forward)
        types = [s.cache for s in module.states.values()]
        self._check_kind_found(types)
        low, high = module.dims.get(str(seq), (1, length))
        most = min([high, length, *(t.layout.chunk for t in types if isinstance(t.layout, (Ring, Kept)))])
        module.dims[str(seq)] = (1 if not self.keep_forward else low, most)
        module.meta |= {"kv_length": str(length), "outputs.prefill": '["logits"]', "outputs.decode": '["logits"]'}
        for name, kind, sight in zip(module.states, types, step.attentions.sights):
            ctx.note(f"{name}: {kind} window={sight.window} chunk={sight.chunk}")
        if types:
            ctx.note(f"all caches: {describe(types)}")
        return True

    def _lengths(self, module: Module, seq: sympy.Symbol) -> tuple[int, int]:
        """Positions at which the model can be looked at, and those that a sequence may have."""
        most = module.dims.get(str(seq), (1, LONGEST))[1]
        if self.is_endless:
            length = ENDLESS if self.length is None else self.length
            return min(most, LONGEST, length), length
        if self.length is None:
            return min(most, LONGEST), min(most, LONGEST)
        if self.length > most:
            raise PassError(
                f"kv-layout: length={self.length} is more than the {most} tokens that the model was traced for; "
                f"give length={most}, or trace it for longer inputs"
            )
        return self.length, self.length

    def _check_kind_found(self, types: list[KVType]) -> None:
        if self.select is not None and types and not any(t.has_summary for t in types):
            raise PassError(
                "kv-layout: select is for attention that sees all tokens, behind the first of them; this model has none; "
                "give whole=0, or leave out select"
            )
        if self.kind == "ring" and types and not any(isinstance(t.layout, Ring) for t in types):
            raise PassError(
                "kv-layout: kind=ring without a window is for models with windows, and no attention of this one has a "
                "window of its own; give window=1024, or another kind"
            )
        if self.kind == "ring" and self.page is not None and not any(t.page for t in types):
            raise PassError("kv-layout: page is for attention without a window, and all of this model's have one; omit it")
        if self.kind == "kept" and types and not any(t.budget for t in types):
            raise PassError("kv-layout: kind=kept is for attention to all tokens, and every one of this model has a window "
                            "of its own; give kind=ring")  # fmt: skip


class Step:
    """One call of the cached model for S tokens a sequence, made from ``forward``; the source of prefill and decode."""

    def __init__(self, module: Module, forward: Function, shapes: ShapeValues, length: int, options: KvOptions) -> None:
        self.shapes, self.options = shapes, options
        self.function, mapping = clone_function(forward, "prefill", {})
        self.ids = mapping[forward.args[0]]
        self.ids.name = "ids"
        self.start = self.function.arg("start", TensorType((shapes.batch,), DType.i64))
        table = _table(module, self.function, shapes.batch, options.pages, length) if options.pages else None
        kept = options.kind == "kept"
        count = self.function.arg("count", TensorType((shapes.batch,), DType.i64)) if kept else None
        self.positions = self._count()
        self.axes: dict[Value, Axes] = {self.ids: PLAIN, self.positions: PLAIN}
        self.rows = Rows(module, shapes, self.positions, length)
        self.turns = Turns(self.function, self.rows, self.axes)
        biases = Biases(shapes, self.rows)
        self.attentions = Attentions(module, shapes, biases, self.start, table, count, options, length, self.turns.behind)

    def _count(self) -> Value:
        """``[B, S]``: where each token stands."""
        b = Builder(self.function, self.function.body[0])
        column = b(ops.Reshape, self.start, (self.shapes.batch, 1))
        return b(ops.Add, column, b(ops.Iota, self.shapes.seq, DType.i64))

    def transform(self) -> None:
        """Replace attention and position tables; refuse what else relates positions."""
        for op in self.function.walk():
            self._visit(op)
        self._check_logits()
        sweep(self.function)

    def _visit(self, op: Op) -> None:
        if isinstance(op, ops.Attention) and (op.k in self.axes or op.v in self.axes):
            cached = self.attentions.cache(op, self.axes)
            op.result.replace_all_uses(cached)
            op.drop()
            self.axes[cached] = PLAIN
            return
        found = None if isinstance(op, Return) else self._axes_of(op)
        if found is None:
            return
        for slot, value in list(named_operands(op)):
            if value not in self.axes and self.shapes.varies(value):
                self._by_position(op, slot, value, found)
        self.axes.update(dict.fromkeys(op.results, found))

    def _axes_of(self, op: Op) -> Axes | None:
        """Where op's results have the tokens; None for an operation that no token takes part in."""
        try:
            found = result_axes(op, self.axes, self.shapes.batch, self.shapes.seq)
            if found is not None:
                for result in op.results:
                    check_result(result, found, self.shapes.batch, self.shapes.seq)
        except Mixed as reason:
            raise refuse(op, str(reason)) from None
        return found

    def _by_position(self, op: Op, slot: str, value: Value, found: Axes) -> None:
        """Have ``op`` take the rows of a value that depends on the position alone."""
        if not self.shapes.seq_axes(value):
            if not self.shapes.is_constant(value):
                raise refuse(op, f"computes with the number of tokens, as data ({value.type}): it is not causal")
            return
        if isinstance(value.owner, ops.Full):
            return
        if isinstance(op, ops.Rope):
            axes, offset = self.axes.get(op.x, found), 0
        elif isinstance(op, (ops.Elementwise, ops.Concat)):
            axes, offset = found, op.result.tensor.rank - value.tensor.rank
        else:
            raise refuse(op, f"takes {value.type} as {slot}, which depends on the position")
        placed = self.rows.place(value, op, axes, offset)
        if isinstance(op, ops.Rope):
            self.turns.note(op, slot, value, axes)
        op.replace_operand(value, placed)

    def _check_logits(self) -> None:
        end = self.function.terminator
        if len(end.values) != 1:
            raise refuse(end, f"gives {len(end.values)} values; a causal language model gives its logits alone")
        logits = end.values[0]
        if logits not in self.axes:
            raise refuse(logits, f"gives {logits.type}, which does not depend on the tokens, as logits")
        if not self.axes[logits].is_plain or logits.tensor.rank != 3:
            raise refuse(logits, f"gives logits {logits.type}; expected [batch, positions, vocabulary]")

    def decode(self) -> Function:
        """The step for one token a sequence."""
        function, _ = clone_function(self.function, "decode", {self.shapes.seq: 1})
        select_pages(function, self.options)
        end = function.terminator
        logits = end.values[0]
        flat = Builder(function, end)(ops.Reshape, logits, (logits.shape[0], logits.shape[2]))
        end.replace_operand(logits, flat)
        return function

    def prefill(self) -> Function:
        """The step for S tokens, with the logits of the last valid one."""
        last = self.function.arg("last", TensorType((self.shapes.batch,), DType.i64))
        take_last(self.function, self.axes, self.positions, last)
        sweep(self.function)
        return self.function


def _table(module: Module, function: Function, batch: sympy.Symbol, layout: Paged, length: int) -> Value:
    """The argument with the pages of each sequence, ``[B, T]``."""
    name = next(n for n in ("T", *(f"T_{i}" for i in range(1, 99))) if n not in module.dims)
    module.dims[name] = (1, -(-length // layout.page))
    return function.arg("table", TensorType((batch, sym(name)), DType.i32))


def _token_input(module: Module, forward: Function) -> Argument:
    """The argument that holds token numbers; raises UnsupportedError unless it is the only one, ``[B, S]`` of i64."""
    named = module.meta.get("token_input")
    for arg in forward.args:
        if named is not None and arg.name != named:
            raise UnsupportedError(
                f"kv-layout: @forward takes {arg.name} besides the token input {named}; "
                "trace the model with its token input alone"
            )
    if len(forward.args) != 1:
        raise UnsupportedError(f"kv-layout: @forward takes {len(forward.args)} inputs, expected the tokens alone")
    ids = forward.args[0]
    symbols = {d for d in ids.tensor.shape if isinstance(d, sympy.Symbol)}
    if ids.dtype is not DType.i64 or ids.tensor.rank != 2 or len(symbols) != 2:
        raise UnsupportedError(
            f"kv-layout: the token input {ids.name} is {ids.type}; expected i64 with a symbolic batch and length, "
            "so trace the model with both dynamic"
        )
    return ids


def _remove(module: Module, function: Function) -> None:
    for op in reversed(list(function.body)):
        op.drop()
    del module.functions[function.name]
