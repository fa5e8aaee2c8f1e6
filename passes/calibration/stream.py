"""Runs a function over calibration data in lock-step: each operation over all micro-batches before the next one.

Memory: the values that are still needed between two operations, for all tokens of the data: mostly the hidden state and
the input of the next layer, as a micro-batch's input goes once its result is there. A decoder with a hidden state of H and
a feed-forward layer of F channels in bf16 holds about ``2 * tokens * (2 * H + F)`` bytes: 128 sequences of 2,048 tokens of
a 1B model (H 2048, F 5632) are 5 GB, 16 of them 0.6 GB. Besides these there are the weights of one operation, in f32, and
the scores of one micro-batch's attention. Operations that no wanted layer needs (the head's logits) are not run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from tilewright.ir import Env, Function, Op, Return, Value, Weight, dim_symbols, ops
from tilewright.ir.interpreter import bind_dims, evaluate
from tilewright.ir.ops import numerics
from tilewright.passes.calibration.data import Array, Batch

Layer = ops.Linear | ops.GatedLinear
LAYERS = (ops.Linear, ops.GatedLinear)
Visit = Callable[[Layer, Sequence[Array]], Mapping[Value, Array] | None]
"""Sees a linear layer and its inputs, an array a micro-batch; may give values to go on with in place of its weights."""
Replaced = Mapping[Value, Callable[[], Array]]
"""What makes the numbers, f32, that linear layers take in place of a weight's."""


def stream(function: Function, batches: Sequence[Batch], visit: Visit, wanted: Collection[Op]) -> None:
    """Visit the linear layers among ``wanted`` in the order of ``function``, each with its inputs over ``batches``."""
    if not wanted:
        return
    run = Stream(function, batches, wanted)
    for layer in run:
        run.step(visit(layer, run.values(layer.x)))


class Stream:
    """A run of ``function`` over ``batches`` that stops in front of each layer among ``wanted``.

    Without ``wanted``, or with the return among them, the whole function runs, and :meth:`results` gives what it returns.
    Linear layers take what ``replaced`` gives in place of their weights.
    """

    def __init__(
        self, function: Function, batches: Sequence[Batch], wanted: Collection[Op] = (), replaced: Replaced | None = None
    ) -> None:
        self.wanted = frozenset(wanted)
        self.replaced = dict(replaced or {})
        self.body = _needed(function, self.wanted)
        self.returns = function.returns if not wanted or function.terminator in self.wanted else ()
        self.at = 0
        args = [[batch[a.name or ""] for a in function.args] for batch in batches]
        self.envs = [Env(bind_dims(function.args, values)) for values in args]
        self.known: dict[Value, list[Array | None]] = {a: list(vs) for a, vs in zip(function.args, zip(*args))}
        self.left = _uses(self.body, self.returns)
        self.constants = _constants(self.body)

    def fork(self, replaced: Replaced) -> Stream:
        """A run that stands where this one stands and goes on with ``replaced``, stopping nowhere; arrays are shared."""
        twin = object.__new__(Stream)
        twin.__dict__ |= self.__dict__
        twin.wanted, twin.replaced = frozenset(), dict(replaced)
        twin.known = {value: list(arrays) for value, arrays in self.known.items()}
        twin.left = dict(self.left)
        return twin

    def __iter__(self) -> Iterator[Layer]:
        """The wanted layers, the run standing in front of each; goes past one that was not stepped over."""
        while self.at < len(self.body):
            op = self.body[self.at]
            if op in self.wanted and isinstance(op, LAYERS):
                at = self.at
                yield op
                if self.at != at:
                    continue
            self.step()

    def results(self) -> list[list[Array]]:
        """Run to the end; gives the function's results, a list of micro-batches each."""
        for _ in self:
            pass
        return [self.values(value) for value in self.returns]

    def values(self, value: Value) -> list[Array]:
        """What ``value`` is for each micro-batch."""
        return [array for array in self.known[value] if array is not None]

    def step(self, changes: Mapping[Value, Array] | None = None) -> None:
        """Run the operation that the run stands in front of; ``changes`` replace its weights."""
        op = self.body[self.at]
        self.at += 1
        found = {v: make() for v, make in self.replaced.items() if v in op.operands and isinstance(op, LAYERS)}
        fixed = _loaded(op, found | dict(changes or {}))
        dying = self.dying(op)
        if op.results and any(self.left.get(r) for r in op.results):
            self.run(op, fixed, dying)
        for value in dying:
            self.known.pop(value, None)

    def run(self, op: Op, fixed: Mapping[Value, Array], dying: Sequence[Value]) -> None:
        """One operation over all micro-batches. An input that dies with it goes as soon as its result is there."""
        found: list[list[Array]] = [[] for _ in op.results]
        once = op in self.constants
        for i, env in enumerate(self.envs[:1] if once else self.envs):
            args = [None if v is None else fixed[v] if v in fixed else self.known[v][i] for v in op.operand_slots()]
            for column, array in zip(found, evaluate(op, env, args)):
                column.append(array)
            for value in dying if not once else ():
                self.known[value][i] = None
        for result, column in zip(op.results, found):
            if self.left.get(result):
                self.known[result] = list(column * len(self.envs) if once else column)

    def dying(self, op: Op) -> list[Value]:
        """Count the uses of ``op`` and give the values that nothing needs after it."""
        taken = {v for v in op.operands if v in self.left}
        for value in taken:
            self.left[value] -= 1
        return [value for value in taken if not self.left[value] and value in self.known]


def _needed(function: Function, wanted: frozenset[Op]) -> list[Op]:
    """The operations that the wanted ones depend on and they themselves; all when none is wanted, or a return is."""
    if not wanted or function.terminator in wanted:
        return [op for op in function.body if not isinstance(op, Return)]
    found: list[Op] = []
    values: set[Value] = set()
    for op in reversed(function.body):
        if op in wanted or values & set(op.results):
            found.append(op)
            values |= set(op.operands)
    return found[::-1]


def _uses(body: Sequence[Op], returns: Sequence[Value]) -> dict[Value, int]:
    """How many of the operations take each value; one more for what the function returns."""
    left: dict[Value, int] = dict.fromkeys((v for v in returns if not isinstance(v, Weight)), 1)
    for op in body:
        for value in {v for v in op.operands if not isinstance(v, Weight)}:
            left[value] = left.get(value, 0) + 1
    return left


def _constants(body: Sequence[Op]) -> set[Op]:
    """Operations whose results are the same for every micro-batch: they depend on weights and known sizes alone."""
    found: set[Op] = set()
    for op in body:
        if not all(isinstance(v, Weight) or v.owner in found for v in op.operands):
            continue
        dims = [d for r in op.results for d in r.shape] + [
            d for a in op.attrs.values() for d in (a if isinstance(a, tuple) else (a,)) if hasattr(d, "free_symbols")
        ]
        if not dim_symbols(dims):
            found.add(op)
    return found


def _loaded(op: Op, changes: Mapping[Value, Array]) -> dict[Value, Array]:
    """The weights that ``op`` takes; those of a linear layer are widened here, once for all micro-batches."""
    found: dict[Value, Array] = dict(changes)
    for value in op.operands:
        if isinstance(value, Weight) and value not in found:
            array = value.load()
            found[value] = numerics.wide(array) if isinstance(op, LAYERS) else array
            value.release()
    return found
