"""Checks a module; the first broken rule raises a VerifyError with the lines around it."""

from __future__ import annotations

from tilewright.ir.caches import overwritten
from tilewright.ir.compare import same_type
from tilewright.ir.core import Function, Module, Op, Return, Value
from tilewright.ir.errors import VerifyError
from tilewright.ir.ops.kernel import Call
from tilewright.ir.printer import around
from tilewright.ir.types import TensorType, dim_symbols


def verify(module: Module) -> None:
    """Raise VerifyError unless every function is in SSA form, well typed, and refers only to what exists."""
    for name, (low, high) in module.dims.items():
        if low > high:
            raise VerifyError(f"dim {name} has no size in {low}..{high}")
    for function in module.kernels():
        for call in function.walk(Call):
            raise VerifyError(f"in @{function.name}: a kernel calls no kernel\n{around(function, call)}", call.loc)
    for name, function in module.functions.items():
        if name != function.name:
            raise VerifyError(f"function @{function.name} is listed as @{name}")
        _FunctionVerifier(module, function).verify()


class _FunctionVerifier:
    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self.defined: set[Value] = {*module.weights.values(), *module.states.values(), *function.args}
        self.overwritten: dict[Value, Op] = {}

    def verify(self) -> None:
        self.signature()
        last = self.function.terminator
        for op in self.function.body:
            try:
                if isinstance(op, Return) and op is not last:
                    op.fail("a return stands last, and only there")
                self.op(op)
            except VerifyError as error:
                message = f"in @{self.function.name}: {error.message}\n{around(self.function, op)}"
                raise VerifyError(message, error.loc or op.loc) from None

    def signature(self) -> None:
        names: set[str] = set()
        for i, arg in enumerate(self.function.args):
            name = arg.name or f"arg{i}"
            if name in names:
                raise VerifyError(f"in @{self.function.name}: two arguments are called {name}")
            names.add(name)
            self.dims(arg)

    def op(self, op: Op) -> None:
        if op.parent is not self.function:
            op.fail("its parent is another function")
        for value in op.operands:
            self.operand(op, value)
        inferred = op.infer()
        if len(inferred) != len(op.results) or not all(map(same_type, inferred, op.result_types)):
            got = ", ".join(map(str, op.result_types))
            op.fail(f"expected result types {', '.join(map(str, inferred))}, got {got}")
        for result in op.results:
            self.dims(result)
        if isinstance(op, Call):
            self.call(op)
        self.defined.update(op.results)
        self.overwritten |= dict.fromkeys(overwritten(self.module, op), op)

    def operand(self, op: Op, value: Value) -> None:
        if value not in self.defined:
            op.fail(f"operand {value!r} is not defined before this point")
        if op not in value.users:
            op.fail(f"operand {value!r} does not list it as a user")
        if value in self.overwritten:
            op.fail(f"operand {value!r} is overwritten by {self.overwritten[value].name} above: take its result")

    def dims(self, value: Value) -> None:
        if not isinstance(value.type, TensorType):
            return
        unknown = dim_symbols(value.shape) - set(self.module.dims)
        if unknown:
            raise VerifyError(f"{value!r} uses the undeclared dim {', '.join(sorted(unknown))}")

    def call(self, op: Call) -> None:
        callee = self.module.functions.get(op.callee)
        if callee is None or callee.kind != "kernel":
            op.fail(f"there is no kernel @{op.callee}")
        count = len(callee.args)
        op.expect(count == len(op.args), f"@{op.callee} takes {count} operands, got {len(op.args)}")
        for want, got in zip(callee.args, op.args):
            op.expect(same_type(want.type, got.type), f"@{op.callee} takes {want.type} as {want.name}, got {got.type}")
        gives = tuple(v.type for v in callee.returns)
        fits = len(gives) == len(op.types) and all(map(same_type, gives, op.types))
        op.expect(fits, f"@{op.callee} gives {', '.join(map(str, gives))}")
