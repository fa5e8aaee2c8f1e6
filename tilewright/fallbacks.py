"""What is done with kernels that no family lowers whole: plainer kernels, and a line for the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tilewright.codegen.emitters import families, refusals
from tilewright.codegen.target import Target
from tilewright.ir import Argument, Env, Function, Module, Op, Value, Weight, ops, verify
from tilewright.passes.base import PassContext
from tilewright.passes.fuse import unfuse
from tilewright.passes.fuse_rules import DECODING
from tilewright.passes.plan_memory import PlanMemory
from tilewright.passes.weights import derive

LINEAR = ("mlir.linear", "cuda.linear")


def lower_refused(module: Module, target: Target) -> list[str]:
    """Replace the fused kernels that no kernel family lowers whole; gives a line for the report on each.

    Sparse weights that no linear kernel reads are stored dense, those that are coded so as the numbers they mean. If that
    does not help, the operations run one by one.
    """
    lines, numbers = [], Numbers(module)
    for kernel in module.kernels():
        why = refusal(kernel, target)
        if why is None:
            continue
        what = f"{operations(kernel)} ({kernel.body[0].loc.describe()})"
        for change, how in ((fill, "sparse weights that are stored dense"),
                            (decode, "weights that are stored dequantized")):  # fmt: skip
            if why is not None and change(module, kernel, numbers):
                lines.append(f"{what} take {how}: {next(why[f] for f in LINEAR if f in why)}")
                why = refusal(kernel, target)
        if why is not None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
            lines.append(f"{what} run one by one: {reasons}")
            unfuse(module, kernel.name)
    if lines:
        module.weights = {name: w for name, w in module.weights.items() if w.users}
        PlanMemory().run(module, PassContext())
        verify(module)
    return lines


def refusal(kernel: Function, target: Target) -> dict[str, str] | None:
    """Why no family lowers a kernel of several operations, each one's reason."""
    reasons = refusals(kernel, target)
    return reasons if len(operations(kernel).split()) > 1 and len(reasons) == len(families(target)) else None


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
