"""A thin, readable layer over MLIR's Python bindings for writing kernels with the native ABI.

    with Kernel("scale", target, dims=("N",), buffers=(("x", "f32"), ("y", "f32"))) as k:
        x, y = k.buffers
        with k.loop(k.begin, k.end) as rows:                  # tasks
            base = rows.index * 64
            with k.loop(0, 64, k.lanes) as loop:
                y.store(x.load(base + loop.index, k.lanes) * 2.0, base + loop.index)
    code = compile_kernel(k)                                  # lower.py

The function is ``void scale(int64 begin, int64 end, int64 N, float *x, float *y)``. Buffers are flat; every index is in
elements. Inside the ``with`` block all operators emit at the current place; loops and conditions are context managers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from torch_mlir import ir
from torch_mlir.dialects import func, memref, scf, vector

from tilewright.codegen.mlir.value import SIZES, Number, Val, constant, fma, intrinsic, iota, mlir_type, shuffle
from tilewright.codegen.target import CpuTarget

__all__ = ["Buffer", "Kernel", "Loop", "Val", "constant", "fma", "intrinsic", "iota", "shuffle"]

# Buffers have no real extent in MLIR: a static size makes the bare-pointer convention apply, and is never checked.
_UNBOUNDED = 1 << 40
_ACTIVE = threading.local()


class Kernel:
    """A function under construction; use as a context manager, then hand it to ``lower.compile_kernel``."""

    def __init__(self, name: str, target: CpuTarget, dims: Sequence[str] = (),
                 buffers: Sequence[tuple[str, str]] = ()) -> None:
        """``dims`` are the names of int64 arguments, ``buffers`` the (name, dtype) of pointer arguments, in order."""
        self.name, self.target = name, target
        self._dim_names, self._buffer_specs = tuple(dims), tuple(buffers)
        self._tables: set[str] = set()

    @property
    def lanes(self) -> int:
        """f32 lanes of one vector on this target."""
        return self.target.lanes

    @staticmethod
    def current() -> Kernel:
        """The kernel whose ``with`` block is running."""
        return _ACTIVE.kernel

    def __enter__(self) -> Kernel:
        if getattr(_ACTIVE, "kernel", None) is not None:
            raise RuntimeError(f"kernel {_ACTIVE.kernel.name} is still being built")
        self._scopes = ExitStack()
        self._scopes.enter_context(ir.Context())
        self._scopes.enter_context(ir.Location.unknown())
        _ACTIVE.kernel = self
        self.module = ir.Module.create()
        self._open_function()
        return self

    def _open_function(self) -> None:
        scalars = 2 + len(self._dim_names)
        kinds = [mlir_type("index")] * scalars + [_memref(dtype) for _, dtype in self._buffer_specs]
        with ir.InsertionPoint(self.module.body):
            function = func.FuncOp(self.name, (kinds, []))
        self._entry = function.add_entry_block()
        self._scopes.enter_context(ir.InsertionPoint(self._entry))
        values = [Val(argument, "index") for argument in self._entry.arguments[:scalars]]
        self.begin, self.end = values[:2]
        self.dims = dict(zip(self._dim_names, values[2:]))
        pairs = zip(self._entry.arguments[scalars:], self._buffer_specs)
        self.buffers = tuple(Buffer(argument, dtype) for argument, (_, dtype) in pairs)

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            func.return_([])
        self._scopes.close()
        _ACTIVE.kernel = None

    # --- control ----------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Val | int, stop: Val | int, step: Val | int = 1, carry: Sequence[Val] = ()) -> Iterator[Loop]:
        """``for index in range(start, stop, step)``; ``carry`` are values that one iteration hands to the next.

            with k.loop(0, n, carry=[zero]) as loop:
                (total,) = loop.values
                loop.next(total + ...)
            (total,) = loop.results
        """
        bounds = [_index(bound).ir for bound in (start, stop, step)]
        op = scf.ForOp(*bounds, [value.ir for value in carry])
        loop = Loop(op, carry)
        with ir.InsertionPoint(op.body):
            yield loop
            loop.close()

    @contextmanager
    def when(self, condition: Val) -> Iterator[None]:
        """Run the block only if the scalar bool holds."""
        op = scf.IfOp(condition.ir)
        with ir.InsertionPoint(op.then_block):
            yield
            scf.yield_([])

    def branch(self, condition: Val, then: Callable[[], Sequence[Val] | None],
               otherwise: Callable[[], Sequence[Val] | None]) -> list[Val]:
        """``then()`` or ``otherwise()``, as the scalar bool picks; both give values of the same types, or None."""
        return _branch(condition, then, otherwise)

    @contextmanager
    def function(self, name: str, buffers: Sequence[Buffer], numbers: int) -> Iterator[Function]:
        """An inner function, written in the block and then called: code that several places share.

            with k.function("dot", (x, y), numbers=2) as dot:
                x, y = dot.buffers
                start, count = dot.numbers
                ...
            dot((x, y), (0, n))
        """
        kinds = [buffer.memory.type for buffer in buffers] + [mlir_type("index")] * numbers
        with ir.InsertionPoint(self.module.body):
            op = func.FuncOp(f"{self.name}.{name}", (kinds, []), visibility="private")
        op.attributes["llvm.linkage"] = ir.Attribute.parse("#llvm.linkage<internal>")
        outer, self._entry = self._entry, op.add_entry_block()
        with ir.InsertionPoint(self._entry):
            yield Function(op, buffers)
            func.return_([])
        self._entry = outer

    # --- memory -----------------------------------------------------------------------------------------------------

    def scratch(self, count: int, dtype: str) -> Buffer:
        """A 64-byte aligned stack array of ``count`` elements, allocated once at function entry."""
        kind = ir.MemRefType.get([count], mlir_type("i8" if dtype == "bool" else dtype))
        with ir.InsertionPoint.at_block_begin(self._entry):
            return Buffer(memref.alloca(kind, [], [], alignment=64), dtype)

    def table(self, name: str, numbers: Sequence[int]) -> Buffer:
        """Constant bytes; the same ``name`` stands for the same numbers everywhere in the kernel."""
        kind, symbol = ir.MemRefType.get([len(numbers)], mlir_type("u8")), f"{self.name}.{name}"
        if name not in self._tables:
            self._tables.add(name)
            values = ir.DenseElementsAttr.get(np.array(numbers, np.uint8).view(np.int8), type=mlir_type("u8"))
            with ir.InsertionPoint(self.module.body):
                memref.GlobalOp(symbol, ir.TypeAttr.get(kind), sym_visibility="private", initial_value=values,
                                constant=True, alignment=64)  # fmt: skip
        return Buffer(memref.get_global(kind, symbol), "u8")

    def mask(self, remaining: Val, lanes: int) -> Val:
        """A bool vector, true in the first ``remaining`` lanes (an index; all lanes when it is ``>= lanes``)."""
        clipped = remaining.min(constant(lanes)).to("i32")
        return iota(lanes) < clipped.splat(lanes)


class Loop:
    """What ``Kernel.loop`` yields: ``index``, the carried ``values``, ``next(...)`` and afterwards ``results``."""

    def __init__(self, op: scf.ForOp, carry: Sequence[Val]) -> None:
        self._op, self._carry, self._closed = op, carry, False
        self.index = Val(op.induction_variable, "index")
        self.values = self._wrap(op.inner_iter_args)

    @property
    def results(self) -> list[Val]:
        """The carried values after the last iteration (the initial ones when there was none)."""
        return self._wrap(self._op.results)

    @property
    def operation(self) -> scf.ForOp:
        """The loop itself: what is built at ``InsertionPoint(loop.operation)`` comes before it."""
        return self._op

    def next(self, *values: Val) -> None:
        """Hand ``values`` to the next iteration; the last statement of a loop that carries."""
        scf.yield_([value.ir for value in values])
        self._closed = True

    def close(self) -> None:
        if self._carry and not self._closed:
            raise RuntimeError("a loop with carried values must end with loop.next(...)")
        if not self._closed:
            scf.yield_([])

    def _wrap(self, values: Sequence[ir.Value]) -> list[Val]:
        return [Val(value, like.dtype, like.lanes) for value, like in zip(values, self._carry)]


class Function:
    """What ``Kernel.function`` yields: inside, its ``buffers`` and ``numbers`` (indices); afterwards, a callable."""

    def __init__(self, op: func.FuncOp, like: Sequence[Buffer]) -> None:
        self._op = op
        arguments = op.entry_block.arguments
        self.buffers = tuple(Buffer(memory, buffer.dtype) for memory, buffer in zip(arguments, like))
        self.numbers = tuple(Val(number, "index") for number in list(arguments)[len(like):])

    def __call__(self, buffers: Sequence[Buffer], numbers: Sequence[Val | int]) -> None:
        """Call it; the buffers are whole (their ``at`` offset must be passed as a number)."""
        operands = [buffer.memory for buffer in buffers] + [_index(number).ir for number in numbers]
        func.CallOp([], ir.FlatSymbolRefAttr.get(self._op.name.value), operands)


class Buffer:
    """Flat memory of one dtype, optionally seen from an offset. A bool is stored as one byte, 0 or 1."""

    def __init__(self, memory: ir.Value, dtype: str, offset: Val | None = None) -> None:
        self.memory, self.dtype, self._offset = memory, dtype, offset

    def at(self, offset: Val | int) -> Buffer:
        """The same memory, with indices counted from ``offset``."""
        return Buffer(self.memory, self.dtype, self._place(offset))

    def view(self, dtype: str) -> Buffer:
        """The same memory as elements of another dtype that MLIR holds alike (bf16 and i16)."""
        return Buffer(self.memory, dtype, self._offset)

    def load(self, index: Val | int, lanes: int = 0, mask: Val | None = None) -> Val:
        """``lanes`` consecutive elements (0 = one scalar); lanes that ``mask`` turns off read as zero, untouched."""
        place = [self._place(index).ir]
        stored = "i8" if self.dtype == "bool" else self.dtype
        if not lanes:
            value = Val(memref.load(self.memory, place), stored)
        elif mask is None:
            value = Val(vector.load(mlir_type(stored, lanes), self.memory, place), stored, lanes)
        else:
            zero = constant(0, stored, lanes)
            value = Val(vector.maskedload(zero.ir.type, self.memory, place, mask.ir, zero.ir), stored, lanes)
        return value.ne(0) if self.dtype == "bool" else value

    def gather(self, places: Val) -> Val:
        """The elements at ``places``, a vector of i32."""
        like, all_of_them = constant(0, self.dtype, places.lanes), constant(1, "bool", places.lanes)
        found = vector.gather(like.ir.type, self.memory, [self._place(0).ir], places.ir, all_of_them.ir, like.ir)
        return Val(found, self.dtype, places.lanes)

    def store(self, value: Val, index: Val | int, mask: Val | None = None, stream: bool = False) -> None:
        """Write a scalar or vector of this buffer's dtype; ``stream`` bypasses the caches (64-byte aligned only)."""
        if value.dtype != self.dtype:
            raise TypeError(f"cannot store {value!r} in a {self.dtype} buffer; cast it with .to(...)")
        if self.dtype == "bool":
            value = value.to("i8")
        place = [self._place(index).ir]
        if not value.lanes:
            memref.store(value.ir, self.memory, place)
        elif mask is not None:
            vector.maskedstore(self.memory, place, mask.ir, value.ir)
        elif stream:
            vector.store(value.ir, self.memory, place, nontemporal=True, alignment=value.lanes * SIZES[value.dtype])
        else:
            vector.store(value.ir, self.memory, place)

    def prefetch(self, index: Val | int, locality: int = 3, write: bool = False) -> None:
        """Ask for the cache line of an element; it may lie past the end. Locality 3 is all caches, 0 is use once."""
        memref.prefetch(self.memory, [self._place(index).ir], write, locality, True)

    def _place(self, index: Val | int) -> Val:
        index = _index(index)
        return index if self._offset is None else self._offset + index


def _memref(dtype: str) -> ir.Type:
    return ir.MemRefType.get([_UNBOUNDED], mlir_type("i8" if dtype == "bool" else dtype))


def _index(value: Val | Number) -> Val:
    return value if isinstance(value, Val) else constant(value)


def _branch(condition: Val, then: Callable, otherwise: Callable) -> list[Val]:
    """Both sides are built in a region without results first, because only they know the result types."""
    trial = scf.IfOp(condition.ir, [], has_else=True)
    sides = []
    for block, build in ((trial.then_block, then), (trial.else_block, otherwise)):
        with ir.InsertionPoint(block):
            sides.append(list(build() or ()))
            scf.yield_([value.ir for value in sides[-1]])
    like = sides[0]
    if [(v.dtype, v.lanes) for v in like] != [(v.dtype, v.lanes) for v in sides[1]]:
        raise TypeError(f"the sides of a branch differ: {like} and {sides[1]}")
    if not like:
        return []
    op = scf.IfOp(condition.ir, [value.ir.type for value in like], has_else=True)
    for old, new in ((trial.then_block, op.then_block), (trial.else_block, op.else_block)):
        for operation in list(old.operations):
            new.append(operation)
    trial.operation.erase()
    return [Val(result, v.dtype, v.lanes) for result, v in zip(op.results, like)]
