"""Attention kernels as fusion cuts them, rotations and column slices included, against the interpreter."""

import pytest

from tests.backend.attention_cases import ROPES, Case
from tests.backend.harness import TARGETS
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import DType, Function, Return, TensorType, ops

LIMIT = {"f32": 1e-5, "bf16": 2e-2}  # of values below 5; bf16: q, p and the result are rounded


def check(case: Case, target: str, starts: list[int], s: int) -> None:
    compiled = StandaloneKernel(case.kernel, parse_target(target), AttentionEmitter())
    case.check(compiled, starts, s, LIMIT[case.dtype.value])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ROPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_attend(target: str, what: str, dtype: str) -> None:
    case = Case(dtype, 6, 2, 32, ROPES[what], "S")
    case.attend(window=50)
    check(case, target, [0, 61], 21)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ROPES)
def test_decode(target: str, what: str) -> None:
    case = Case("f32", 9, 3, 32, ROPES[what], 1)
    case.attend()
    check(case, target, [0, 64, 95], 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ROPES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_append(target: str, what: str, dtype: str) -> None:
    for s, starts, tokens in (("S", [3, 20], 70), (1, [0, 95], 1)):
        case = Case(dtype, 4, 2, 32, ROPES[what], s)
        case.append()
        check(case, target, starts, tokens)


@pytest.mark.parametrize("target", TARGETS)
def test_odd_head(target: str) -> None:
    case = Case("bf16", 2, 1, 33, (14, "half", 1), "S")
    case.append()
    check(case, target, [1], 5)


def test_rotated_keys_of_a_tensor_are_refused() -> None:
    kernel = Function("k", kind="kernel")
    q, k = (kernel.arg(name, TensorType(("B", "S", 2, 32), DType.f32)) for name in "qk")
    table = kernel.arg("cos", TensorType((1, "S", 32), DType.f32))
    rope = kernel.append(ops.Rope(k, table, table))
    kernel.append(Return(kernel.append(ops.Attention(q, rope.result, k)).results))
    reason = AttentionEmitter().match(kernel, parse_target("x86-64-v3"))
    assert reason == "a rotation of keys or values that are not appended"


def test_first_tokens_beside_a_window_need_a_cache() -> None:
    kernel = Function("k", kind="kernel")
    q = kernel.arg("q", TensorType(("B", "S", 2, 32), DType.f32))
    kernel.append(Return(kernel.append(ops.Attention(q, q, q, causal=True, window=8, first=4)).results))
    reason = AttentionEmitter().match(kernel, parse_target("x86-64-v3"))
    assert reason == "no kernel for the first 4 tokens beside a window, but over a cache of kind=ring"
