"""``kv.append`` and ``kv.attend`` against attention that sees a whole sequence at once; states across calls."""

import numpy as np
import pytest
import torch

from tests.ir_cases.attention import loops
from tilewright.ir import InterpreterError, Module, empty_states, interpret, parse_module, verify

KV = "kv<heads=2, dim=8, vdim=6, length=12, dtype=f32, layout=contiguous>"


def step_module(attributes: str = "") -> Module:
    """One entry that appends a chunk and attends."""
    module = parse_module(f"""module @m {{
      dim B : 1..4
      dim S : 1..12
      state @kv.0 : {KV}
      func @step(%q: tensor<BxSx4x8xf32>, %k: tensor<BxSx2x8xf32>, %v: tensor<BxSx2x6xf32>, %start: tensor<Bxi64>) {{
        %0 = kv.append(@kv.0, %k, %v, %start) : {KV}
        %1 = kv.attend(%q, %0, %start) {{{attributes or "scale=1.0"}}} : tensor<BxSx4x6xf32>
        return([%1])
      }}
    }}""")
    verify(module)
    return module


@pytest.mark.parametrize("rule", [{}, {"window": 3}, {"chunk": 4}, {"softcap": 2.0}], ids=str)
def test_chunks_equal_the_whole(rule: dict[str, int]) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, 10, h, d)).astype(np.float32) for h, d in ((4, 8), (2, 8), (2, 6)))
    module = step_module(" ".join(f"{k}={v}" for k, v in {"scale": 0.3, **rule}.items()))
    states, found = empty_states(module, 2), []
    for low, high in [(0, 4), (4, 5), (5, 6), (6, 10)]:
        start = np.full(2, low, np.int64)
        inputs = [x[:, low:high] for x in (q, k, v)]
        found += interpret(module, "step", [*inputs, start], states)
    whole = loops(*map(torch.from_numpy, (q, k, v)), [list(range(10))] * 2, scale=0.3, **rule)
    np.testing.assert_allclose(np.concatenate(found, 1), whole.numpy(), rtol=1e-5, atol=1e-5)


def test_sequences_start_apart() -> None:
    rng = np.random.default_rng(2)
    k, v = (rng.standard_normal((2, 6, 2, d)).astype(np.float32) for d in (8, 6))
    q = rng.standard_normal((2, 6, 4, 8)).astype(np.float32)
    module, states = step_module(), None
    states = empty_states(module, 2)
    interpret(module, "step", [q[:, :5], k[:, :5], v[:, :5], np.zeros(2, np.int64)], states)
    start = np.array([5, 2])  # the second sequence had three rows of padding, which are written over
    [got] = interpret(module, "step", [q[:, 5:], k[:, 5:], v[:, 5:], start], states)
    for b, n in enumerate(start):
        keys, values = (torch.from_numpy(np.concatenate([x[b : b + 1, :n], x[b : b + 1, 5:]], 1)) for x in (k, v))
        want = loops(torch.from_numpy(q[b : b + 1, 5:]), keys, values, [[int(n)]])
        np.testing.assert_allclose(got[b : b + 1], want.numpy(), rtol=1e-5, atol=1e-5)


def test_append_leaves_its_operand_alone() -> None:
    module = step_module()
    states = empty_states(module, 1)
    before = states["kv.0"][0]
    ones = [np.ones((1, 2, h, d), np.float32) for h, d in ((4, 8), (2, 8), (2, 6))]
    interpret(module, "step", [*ones, np.array([3])], states)
    assert not before.any()
    assert states["kv.0"][0][0, :, 0, 0].tolist() == [0, 0, 0, 1, 1] + [0] * 7


def test_append_beyond_the_capacity_fails() -> None:
    module = step_module()
    ones = [np.ones((1, 2, h, d), np.float32) for h, d in ((4, 8), (2, 8), (2, 6))]
    with pytest.raises(InterpreterError, match="token 11 and 2 more do not fit the cache's 12 slots"):
        interpret(module, "step", [*ones, np.array([11])], empty_states(module, 1))


def test_missing_states() -> None:
    ones = [np.ones((1, 2, h, d), np.float32) for h, d in ((4, 8), (2, 8), (2, 6))]
    with pytest.raises(InterpreterError, match=r"no cache was given for state @kv\.0"):
        interpret(step_module(), "step", [*ones, np.array([0])])


def test_a_kernel_hands_the_state_on() -> None:
    """The cache that comes out of a kernel is the state, also when the kernel takes two caches."""
    module = parse_module(f"""module @m {{
      dim B : 1..4
      state @one : {KV}
      state @two : {KV}
      kernel @k0(%a: {KV}, %b: {KV}, %k: tensor<Bx1x2x8xf32>, %v: tensor<Bx1x2x6xf32>, %start: tensor<Bxi64>) {{
        %0 = kv.append(%b, %k, %v, %start) : {KV}
        return([%0])
      }}
      func @step(%k: tensor<Bx1x2x8xf32>, %v: tensor<Bx1x2x6xf32>, %start: tensor<Bxi64>) {{
        %0 = kernel.call([@one, @two, %k, %v, %start]) {{callee="k0"}} : {KV}
        return([%k])
      }}
    }}""")
    verify(module)
    states = empty_states(module, 1)
    inputs = [np.ones((1, 1, 2, 8), np.float32), np.ones((1, 1, 2, 6), np.float32), np.array([0])]
    interpret(module, "step", inputs, states)
    assert not states["one"][0].any()
    assert states["two"][0].any()
