"""Running modules: inputs, dims, weights, kernels, freeing, errors."""

import weakref

import numpy as np
import pytest

from tilewright.ir import (
    ArraySource,
    Builder,
    DType,
    Function,
    InterpreterError,
    Loc,
    Module,
    Op,
    Return,
    TensorType,
    interpret,
    parse_module,
    verify,
)
from tilewright.ir import ops as o

ADD = parse_module("""module @m {
  dim B : 1..8
  dim S : 1..8
  func @f(%x: tensor<BxSxf32>, %y: tensor<(2*S)xf32>) {
    %0 = core.slice(%y) {starts=[0] stops=[S] steps=[1]} : tensor<Sxf32> loc("model.cut" "model.py":7)
    %1 = core.add(%x, %0) : tensor<BxSxf32>
    return([%1])
  }
}""")
X, Y = np.ones((2, 3), np.float32), np.arange(6, dtype=np.float32)


def test_inputs_by_name_and_in_order() -> None:
    want = X + Y[:3]
    np.testing.assert_array_equal(interpret(ADD, "f", [X, Y])[0], want)
    np.testing.assert_array_equal(interpret(ADD, "f", {"y": Y, "x": X})[0], want)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([X], "@f takes 2 inputs, got 1"),
        ({"x": X, "z": Y}, r"missing inputs \['y'\], unknown inputs \['z'\]"),
        ([X.astype(np.float64), Y], r"input x: expected tensor<BxSxf32>, got float64\[2, 3\]"),
        ([X[0], Y], r"input x: expected tensor<BxSxf32>, got float32\[3\]"),
        ([X, Y[:5]], r"input y: expected size 2\*S=6, got 5"),
        ([[1.0], Y], "input x: expected tensor<BxSxf32>, got list"),
    ],
    ids=["too few", "names", "type", "rank", "size", "no array"],
)
def test_inputs_that_do_not_fit(inputs: object, message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        interpret(ADD, "f", inputs)  # type: ignore[arg-type]


def test_unknown_function() -> None:
    with pytest.raises(InterpreterError, match="there is no function @g; there are f"):
        interpret(ADD, "g", [])


def test_an_operation_that_fails_is_named() -> None:
    module = parse_module("""module @m {
      func @f(%i: tensor<2xi64>, %t: tensor<3x4xf32>) {
        %0 = nn.embedding(%i, %t) : tensor<2x4xf32> loc("model.embed" "model.py":9)
        return([%0])
      }
    }""")
    with pytest.raises(InterpreterError, match=r"index 1\.\.3 is outside.*\n.*model.embed, model.py:9"):
        interpret(module, "f", [np.array([1, 3]), np.zeros((3, 4), np.float32)])


def test_results_of_another_type_are_refused() -> None:
    class Wrong(o.Exp):  # type: ignore[misc, valid-type]
        """Exp in the wrong type."""

        def evaluate(self, env: object, x: np.ndarray) -> np.ndarray:
            return np.exp(x.astype(np.float64))

    f = Function("f")
    f.append(Return(f.append(Wrong(f.arg("x", TensorType((2,), DType.f32)))).results))
    module = Module("m", {"f": f})
    with pytest.raises(InterpreterError, match=r"result 0 is float64\[2\], its type is tensor<2xf32>"):
        interpret(module, "f", [np.ones(2, np.float32)])


def test_scalars_stay_arrays() -> None:
    module = parse_module("""module @m {
      kernel @k(%a: tensor<f32>) {
        %0 = core.exp(%a) : tensor<f32>
        return([%0])
      }
      func @f(%x: tensor<4xf32>, %i: tensor<i64>) {
        %0 = core.gather(%x, %i) {axis=0} : tensor<f32>
        %1 = kernel.call([%0]) {callee="k"} : tensor<f32>
        return([%1])
      }
    }""")
    verify(module)
    [got] = interpret(module, "f", [np.zeros(4, np.float32), np.array(2)])
    assert isinstance(got, np.ndarray)
    assert got.shape == ()


def test_weights() -> None:
    module = Module("m")
    w = module.weight("w", TensorType((2, 3), DType.f32), ArraySource(np.eye(2, 3, dtype=np.float32)))
    f = module.add(Function("f"))
    b = Builder(f)
    b.insert(Return([b.add(o.Linear(f.arg("x", TensorType((3,), DType.f32)), w))]))
    np.testing.assert_array_equal(interpret(module, "f", [np.array([5, 6, 7], np.float32)])[0], [5, 6])
    w.source = ArraySource(np.eye(3, dtype=np.float32))
    with pytest.raises(InterpreterError, match="weight @w: expected tensor<2x3xf32>, its source gave float32"):
        interpret(module, "f", [np.zeros(3, np.float32)])
    w.source = None
    with pytest.raises(InterpreterError, match="weight @w has no data"):
        interpret(module, "f", [np.zeros(3, np.float32)])


def test_kernel_calls() -> None:
    module = parse_module("""module @m {
      dim N : 1..8
      kernel @k(%a: tensor<Nxf32>, %b: tensor<f32>) {
        %0 = core.add(%a, %b) : tensor<Nxf32>
        %1 = core.iota() {length=N dtype=i64} : tensor<Nxi64>
        return([%0, %1, %a])
      }
      func @f(%x: tensor<Nxf32>, %y: tensor<f32>) {
        %0, %1, %2 = kernel.call([%x, %y]) {callee="k"} : tensor<Nxf32>, tensor<Nxi64>, tensor<Nxf32>
        %3, %4, %5 = kernel.call([%0, %y]) {callee="k"} : tensor<Nxf32>, tensor<Nxi64>, tensor<Nxf32>
        return([%3, %1, %5])
      }
    }""")
    verify(module)
    got = interpret(module, "f", [np.zeros(3, np.float32), np.array(2, np.float32)])
    assert [g.tolist() for g in got] == [[4, 4, 4], [0, 1, 2], [2, 2, 2]]


def test_values_live_until_their_last_use() -> None:
    """A value that one operation takes twice, and one that nothing takes, are freed when they are not needed."""
    f = Function("f")
    b = Builder(f, loc=Loc("here"))
    x = f.arg("x", TensorType((4,), DType.f32))
    first = b.add(o.Exp(x))
    b.add(o.Neg(x))  # unused
    twice = b.add(o.Mul(first, first))
    last = b.add(o.Add(twice, first))
    b.insert(Return([b.add(o.Relu(last)), last]))
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[list[bool]] = []

    def observer(op: Op, results: object) -> None:
        alive.append([r() is not None for r in made])
        made.extend(weakref.ref(r) for r in results)  # type: ignore[attr-defined]

    got = interpret(Module("m", {"f": f}), "f", [np.ones(4, np.float32)], observer=observer)
    assert len(got) == 2
    assert alive == [[], [True], [True, False], [True, False, True], [False, False, False, True]]
