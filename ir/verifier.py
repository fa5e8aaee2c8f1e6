"""Checks a module; the first broken rule raises a VerifyError with the lines around it."""

from __future__ import annotations

from tilewright.ir.compare import same_type
from tilewright.ir.core import Function, Module, Op, Return, Value
from tilewright.ir.errors import VerifyError
from tilewright.ir.ops.kernel import Call
from tilewright.ir.printer import around
from tilewright.ir.types import TensorType, dim_symbols


def verify(module: Module) -> None:
    """Raise VerifyError unless every function is in SSA form, well typed, and refers only to what exists."""
    known: set[Value] = {*module.weights.values(), *module.states.values()}
    for name, function in module.functions.items():
        if name != function.name:
            raise VerifyError(f"function @{function.name} is listed as @{name}")
        _verify_function(module, function, set(known))


def _verify_function(module: Module, function: Function, defined: set[Value]) -> None:
    function.terminator  # noqa: B018  (raises when there is none)
    for value in function.args:
        _verify_dims(module, function, value)
    defined.update(function.args)
    for i, op in enumerate(function.body):
        try:
            _verify_op(module, function, op, defined, last=i == len(function.body) - 1)
        except VerifyError as error:
            message = f"in @{function.name}: {error.message}\n{around(function, op)}"
            raise VerifyError(message, error.loc or op.loc) from None
        defined.update(op.results)


def _verify_op(module: Module, function: Function, op: Op, defined: set[Value], last: bool) -> None:
    if op.parent is not function:
        op.fail("its parent is another function")
    if isinstance(op, Return) != last:
        op.fail("a return stands last, and only there")
    for value in op.operands:
        if value not in defined:
            op.fail(f"operand {value!r} is not defined before this point")
        if op not in value.users:
            op.fail(f"operand {value!r} does not list it as a user")
    inferred = op.infer()
    if len(inferred) != len(op.results) or not all(map(same_type, inferred, op.result_types)):
        op.fail(f"expected result types {', '.join(map(str, inferred))}, got {', '.join(map(str, op.result_types))}")
    for result in op.results:
        _verify_dims(module, function, result)
    if isinstance(op, Call):
        _verify_call(module, op)


def _verify_dims(module: Module, function: Function, value: Value) -> None:
    if not isinstance(value.type, TensorType):
        return
    unknown = dim_symbols(value.shape) - set(module.dims)
    if unknown:
        raise VerifyError(f"in @{function.name}: {value!r} uses the undeclared dim {', '.join(sorted(unknown))}")


def _verify_call(module: Module, op: Call) -> None:
    callee = module.functions.get(op.callee)
    if callee is None or callee.kind != "kernel":
        op.fail(f"there is no kernel @{op.callee}")
    for want, got in zip(callee.args, op.args, strict=False):
        op.expect(same_type(want.type, got.type), f"@{op.callee} takes {want.type} as {want.name}, got {got.type}")
    op.expect(len(callee.args) == len(op.args), f"@{op.callee} takes {len(callee.args)} operands, got {len(op.args)}")
    gives = tuple(v.type for v in callee.returns)
    fits = len(gives) == len(op.types) and all(map(same_type, gives, op.types))
    op.expect(fits, f"@{op.callee} gives {', '.join(map(str, gives))}")
