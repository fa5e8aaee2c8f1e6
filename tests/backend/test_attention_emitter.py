"""Attention kernels as fusion cuts them, rotations and column slices included, against the interpreter."""

import numpy as np
import pytest

from tests.backend.harness import TARGETS
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import DType, Function, KVType, Module, Return, TensorType, Value, interpret, ops

LIMIT = {"f32": 2e-5, "bf16": 4e-2}  # of values below 5; bf16: q, p and the result are rounded
LENGTH = 96


class Case:
    """One attention operation over columns of a fused projection; ``rope`` is (rotated elements, style, batch of cos)."""

    def __init__(
        self, dtype: str, q: int, kv: int, dim: int, rope: tuple[int, str, str | int] | None, s: str | int
    ) -> None:
        self.q, self.kv, self.dim, self.rope, self.s = q, kv, dim, rope, s
        self.dtype = DType(dtype)
        self.kernel = Function("k", kind="kernel")
        self.qkv = self.kernel.arg("qkv", TensorType(("B", s, (q + 2 * kv) * dim), self.dtype))
        self.cache = self.kernel.arg("cache", KVType(kv, dim, dim, LENGTH, self.dtype))
        self.start = self.kernel.arg("start", TensorType(("B",), DType.i64))
        if rope:
            table = TensorType((rope[2], s, rope[0]), DType.f32)
            self.tables = self.kernel.arg("cos", table), self.kernel.arg("sin", table)

    def heads(self, first: int, count: int, rotate: bool) -> Value:
        """``count`` heads of the projection from the ``first`` on."""
        b, s, _ = self.qkv.shape
        columns = ops.Slice(self.qkv, starts=(0, 0, first * self.dim), stops=(b, s, (first + count) * self.dim),
                            steps=(1, 1, 1))
        split = self.kernel.append(ops.Reshape(self.kernel.append(columns).result, shape=(b, s, count, self.dim))).result
        if not rotate or self.rope is None:
            return split
        return self.kernel.append(ops.Rope(split, *self.tables, style=self.rope[1])).result

    def attend(self, **given: float) -> None:
        q = self.heads(0, self.q, True)
        op = self.kernel.append(ops.Attend(q, self.cache, self.start, scale=self.dim**-0.5, **given))
        self.kernel.append(Return(op.results))

    def append(self) -> None:
        k, v = self.heads(self.q, self.kv, True), self.heads(self.q + self.kv, self.kv, False)
        self.kernel.append(Return(self.kernel.append(ops.Append(self.cache, k, v, self.start)).results))

    def check(self, target: str, starts: list[int], s: int) -> None:
        rng, b, kind = np.random.default_rng(0), len(starts), self.dtype.np

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        cache = tuple(normal(b, LENGTH, self.kv, self.dim).astype(kind) for _ in "kv")
        operands = [normal(b, s, self.qkv.shape[2]).astype(kind), cache, np.array(starts)]
        if self.rope:
            angles = normal(b if self.rope[2] == "B" else 1, s, self.rope[0])
            operands += [np.cos(angles), np.sin(angles)]
        module = Module("m", dims={"B": (1, 64), "S": (1, 1024)})
        module.add(self.kernel)
        compiled = StandaloneKernel(self.kernel, parse_target(target), AttentionEmitter())
        (got,), (want,) = compiled(operands, {"B": b, "S": s}), interpret(module, "k", list(operands))
        if isinstance(got, tuple):  # slots behind the newest token may hold anything
            got, want = ([x[i, :at + s] for x in pair for i, at in enumerate(starts)] for pair in (got, want))
        else:
            got, want = (got,), (want,)
        for mine, theirs in zip(got, want):
            error = np.abs(mine.astype(np.float64) - theirs.astype(np.float64))
            assert error.max() <= LIMIT[self.dtype.value], np.unravel_index(int(error.argmax()), error.shape)


ROPES = {
    "half": (32, "half", 1),
    "half, part of a vector": (20, "half", "B"),
    "part of the head": (16, "half", "B"),
    "interleaved": (32, "interleaved", 1),
    "interleaved, part of the head": (12, "interleaved", "B"),
    "none": None,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ROPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_attend(target: str, what: str, dtype: str) -> None:
    case = Case(dtype, 6, 2, 32, ROPES[what], "S")
    case.attend(window=50)
    case.check(target, [0, 61], 21)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ROPES)
def test_decode(target: str, what: str) -> None:
    case = Case("f32", 9, 3, 32, ROPES[what], 1)
    case.attend()
    case.check(target, [0, 64, 95], 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ROPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_append(target: str, what: str, dtype: str) -> None:
    for s, starts, tokens in (("S", [3, 20], 70), (1, [0, 95], 1)):
        case = Case(dtype, 4, 2, 32, ROPES[what], s)
        case.append()
        case.check(target, starts, tokens)


@pytest.mark.parametrize("target", TARGETS)
def test_odd_head(target: str) -> None:
    case = Case("bf16", 2, 1, 33, (14, "half", 1), "S")
    case.append()
    case.check(target, [1], 5)


def test_rotated_keys_of_a_tensor_are_refused() -> None:
    kernel = Function("k", kind="kernel")
    q, k = (kernel.arg(name, TensorType(("B", "S", 2, 32), DType.f32)) for name in "qk")
    table = kernel.arg("cos", TensorType((1, "S", 32), DType.f32))
    rope = kernel.append(ops.Rope(k, table, table))
    kernel.append(Return(kernel.append(ops.Attention(q, rope.result, k)).results))
    reason = AttentionEmitter().match(kernel, parse_target("x86-64-v3"))
    assert reason == "a rotation of keys or values that are not appended"
