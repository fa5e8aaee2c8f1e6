"""Compile one kernel function with one emitter, and run it beside the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from tests.cuda.emulator import Emulated, quick_compiler
from tilewright.codegen.kernel import Emitter
from tilewright.codegen.mlir.native import load
from tilewright.codegen.target import parse_target
from tilewright.ir import Function, Module, Return, TensorType, eval_dim, interpret

TARGETS = ("native", "x86-64-v3")
CUDA = "cuda{arch=sm_80}"


def one_op(types: Sequence[TensorType], make) -> Function:
    """A function around one operation: ``make(*arguments)``."""
    function = Function("k")
    arguments = [function.arg(f"a{i}", t) for i, t in enumerate(types)]
    op = function.append(make(*arguments))
    function.append(Return(op.results))
    return function


def sample(type: TensorType, dims: dict[str, int], rng: np.random.Generator, below: int = 3) -> np.ndarray:
    """Random contents: normal floats, integers in ``[0, below)``."""
    shape = [eval_dim(d, dims) for d in type.shape]
    values = rng.standard_normal(shape) if type.dtype.is_float else rng.integers(0, below, shape)
    return values.astype(type.dtype.np)


class Compiled:
    """A kernel function compiled by ``emitter`` for ``target``; call it with inputs and sizes."""

    def __init__(self, function: Function, emitter: Emitter, target: str) -> None:
        cpu = parse_target(target)
        reason = emitter.match(function, cpu)
        assert reason is None, reason
        self.function = function
        with quick_compiler():
            self.code = emitter.emit(function, emitter.default_schedule(function, cpu), cpu, "kernel")
        self.device = Emulated(self.code) if self.code.device else None
        self.run = None if self.device else load(self.code.object, "kernel")

    def __call__(self, inputs: Sequence[np.ndarray], dims: dict[str, int]) -> list[np.ndarray]:
        """The results, the tasks done in two ranges as two threads would."""
        outputs = [np.zeros([eval_dim(d, dims) for d in v.shape], v.dtype.np) for v in self.function.returns]
        scratch = [np.zeros(eval_dim(b, dims) + 64, np.uint8) for b in self.code.scratch]
        if self.device:
            self.device([*inputs, *outputs, *scratch], dims)
            return outputs
        tasks = eval_dim(self.code.tasks, dims)
        sizes = [ctypes.c_int64(dims[d]) for d in self.code.dims]
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*inputs, *outputs, *scratch)]
        last = eval_dim(self.code.last, dims)
        for begin, end in ((0, tasks // 2), (tasks // 2, tasks), (tasks, tasks + last)):
            self.run(ctypes.c_int64(begin), ctypes.c_int64(end), *sizes, *pointers)
        return outputs

    def expected(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the interpreter gives."""
        module = Module("m", dims={"B": (1, 1 << 20), "S": (1, 1 << 20)})
        module.add(self.function)
        return interpret(module, self.function.name, list(inputs))


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest magnitude; integers exactly."""
    if want.dtype.kind in "iub":
        np.testing.assert_array_equal(got, want)
        return
    scale = max(np.abs(want.astype(np.float64)).max(initial=0), 1.0)
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=0, atol=tolerance * scale)
