"""What is done with kernels that no family lowers whole: plainer kernels, and a line for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tilewright.codegen.emitters import families, refusals
from tilewright.codegen.target import Target
from tilewright.ir import Argument, Env, Function, Module, Op, Value, Weight, ops, verify
from tilewright.passes.base import PassContext
from tilewright.passes.fuse import Fuse, unfuse
from tilewright.passes.fuse_rules import DECODING, leads
from tilewright.passes.plan_memory import PlanMemory
from tilewright.passes.weights import derive

LINEAR = ("mlir.linear", "cuda.linear")
COLUMNS = ("mlir.columns", *LINEAR)


def lower_refused(module: Module, target: Target) -> list[str]:
    """Replace the fused kernels that no kernel family lowers whole; gives a line for the report on each.

    Sparse weights that no linear kernel reads are stored dense, thresholds whose zeros it does not leave out run before it,
    weights that are coded so are stored as the numbers they mean. If that does not help, the operations run one by one.
    """
    lines, numbers = [], Numbers(module)
    for kernel in module.kernels():
        why = refusal(kernel, target)
        if why is None:
            continue
        what = f"{operations(kernel)} ({kernel.body[0].loc.describe()})"
        for change, how in ((fill, "sparse weights that are stored dense"),
                            (separate, "all of x, of which a kernel of its own makes small elements zero"),
                            (decode, "weights that are stored dequantized")):  # fmt: skip
            if why is not None and change(module, kernel, numbers):
                lines.append(f"{what} take {how}: {explained(change, why)}")
                why = refusal(kernel, target)
        if why is not None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
            lines.append(f"{what} run one by one: {reasons}")
            unfuse(module, kernel.name)
    if lines:
        module.weights = {name: w for name, w in module.weights.items() if w.users}
        PlanMemory().run(module, PassContext())
        verify(module)
    return lines + [line for kernel in module.kernels() if (line := unskipped(kernel))]


def unskipped(kernel: Function) -> str | None:
    """A line for the report on a threshold whose zeros no layer leaves out: it is in no layer's kernel."""
    thresholds = [op for op in kernel.body if isinstance(op, ops.Threshold)]
    if not thresholds or any(isinstance(op, (ops.Linear, ops.GatedLinear)) for op in kernel.body):
        return None
    return f"{operations(kernel)} ({thresholds[0].loc.describe()}): no layer leaves out the zeros that it makes"


def refusal(kernel: Function, target: Target) -> dict[str, str] | None:
    """Why no family lowers a kernel of several operations, each one's reason."""
    reasons = refusals(kernel, target)
    return reasons if len(operations(kernel).split()) > 1 and len(reasons) == len(families(target)) else None


def explained(change: Any, why: Mapping[str, str]) -> str:
    """The reason of the family that would have done without ``change``."""
    return next(why[f] for f in (COLUMNS if change is separate else LINEAR) if f in why)


def operations(kernel: Function) -> str:
    return " ".join(op.name for op in kernel.body[:-1] if not isinstance(op, ops.Reshape))


def decode(module: Module, kernel: Function, numbers: Numbers) -> bool:
    """Give a linear kernel its coded weights as numbers, computed when the artifact is written; whether it had some."""
    anchors = [op for op in kernel.body if isinstance(op, (ops.Linear, ops.GatedLinear))]
    factors = [v for op in anchors for v in (op.operands[1:] if isinstance(op, ops.Linear) else (op.gate, op.up))]
    return _computed(module, kernel, numbers, [v for v in factors if isinstance(v.owner, DECODING)])


def fill(module: Module, kernel: Function, numbers: Numbers) -> bool:
    """Give a kernel its sparse weights, or their codes, dense; whether it had some."""
    return _computed(module, kernel, numbers, [op.result for op in kernel.body if isinstance(op, ops.SparseExpand)])


def separate(module: Module, kernel: Function, numbers: Numbers) -> bool:
    """Have what is in front of a layer as a threshold run before the kernel, once for all that take it; whether it was."""
    found = [op for op in kernel.body if isinstance(op, ops.Threshold) and leads(op)]
    calls = [op for op in module.ops(ops.Call) if isinstance(op, ops.Call) and op.callee == kernel.name]
    for lead in found:
        made, known = Argument(f"x{len(kernel.args)}", lead.result.type), dict[tuple[Value, ...], Value]()
        for call in calls:
            given = tuple(dict(zip(kernel.args, call.args))[leaf] for leaf in _leaves(lead.result))
            known[given] = known.get(given) or _before(call, lead, dict(zip(_leaves(lead.result), given)))
            _set_args(call, (*call.args, known[given]))
        kernel.args.append(made)
        lead.result.replace_all_uses(made)
        limits = lead.limits.owner
        lead.drop()
        if limits is not None and not limits.result.users:
            limits.drop()
    if found:
        _drop_unused(kernel, calls)
        Fuse(mode="single").run(module, PassContext())
    return bool(found)


def _before(call: ops.Call, op: Op, given: dict[Value, Value]) -> Value:
    """The value of a copy of ``op``, and of what is behind it, in front of a call."""
    function = call.parent
    assert function is not None
    for value in op.operands:
        if value not in given and value.owner is not None:
            given[value] = _before(call, value.owner, given)
    return function.insert(function.body.index(call), op.clone(given)).result


def _computed(module: Module, kernel: Function, numbers: Numbers, values: Sequence[Value]) -> bool:
    """Make arguments of those ``values`` that depend on weights alone, computed when the artifact is written."""
    calls = [op for op in module.ops(ops.Call) if isinstance(op, ops.Call) and op.callee == kernel.name]
    found = [v for v in dict.fromkeys(values) if _are_weights(v, kernel, calls)]
    for value in found:
        made = Argument(f"w{len(kernel.args)}", value.type)
        for call in calls:
            _set_args(call, (*call.args, numbers.of(value, dict(zip(kernel.args, call.args)))))
        kernel.args.append(made)
        value.replace_all_uses(made)
    _drop_unused(kernel, calls)
    return bool(found)


def _are_weights(value: Value, kernel: Function, calls: Sequence[ops.Call]) -> bool:
    places = [kernel.args.index(leaf) for leaf in _leaves(value)]  # type: ignore[arg-type]
    return all(isinstance(call.args[place], Weight) for call in calls for place in places)


def _leaves(value: Value) -> list[Value]:
    """The arguments that a coded weight is made of."""
    return [value] if value.owner is None else [leaf for v in value.owner.operands for leaf in _leaves(v)]


class Numbers:
    """The numbers of coded weights as weights of their own, one for all kernels that take them."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.made: dict[tuple[Value, ...], Weight] = {}

    def of(self, value: Value, given: dict[Value, Value]) -> Weight:
        """What a kernel's ``value`` is when its arguments are ``given``."""
        leaves = _leaves(value)
        parts = [w for leaf in leaves if isinstance(w := given[leaf], Weight)]
        key = tuple(parts)
        if key not in self.made:
            make = partial(_evaluated, value, leaves)
            self.made[key] = derive(self.module, f"{parts[0].name}.numbers", value.tensor, parts, make)
        return self.made[key]


def _evaluated(value: Value, leaves: Sequence[Value], *arrays: Any) -> Any:
    known = dict(zip(leaves, arrays))

    def number(v: Value | None) -> Any:
        if v is None or v in known:
            return None if v is None else known[v]
        op = v.owner
        assert op is not None
        return op.evaluate(Env({}), *map(number, op.operand_slots()))

    return number(value)


def _set_args(call: ops.Call, args: tuple[Value, ...]) -> None:
    for value in set(call.args) - set(args):
        value.users.pop(call, None)
    for value in args:
        value.users[call] = None
    call.args = args


def _drop_unused(kernel: Function, calls: Sequence[ops.Call]) -> None:
    """Leave out operations and arguments that nothing takes any more."""
    dead: list[Op] = [op for op in reversed(kernel.body) if isinstance(op, DECODING)]
    for op in dead:
        if not op.result.users:
            op.drop()
    kept = [i for i, arg in enumerate(kernel.args) if arg.users]
    for call in calls:
        _set_args(call, tuple(call.args[i] for i in kept))
    kernel.args[:] = [kernel.args[i] for i in kept]
