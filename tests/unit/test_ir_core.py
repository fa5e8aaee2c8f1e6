"""Types, declarations of operations, values and their users, modules."""

import ml_dtypes
import numpy as np
import pytest
import sympy

from tilewright.ir import (
    Argument,
    ArraySource,
    ComputedSource,
    DType,
    Env,
    Function,
    KVType,
    Loc,
    Module,
    Op,
    Return,
    TensorType,
    Value,
    VerifyError,
    canonical,
    eval_dim,
    parse_dim,
    parse_module,
    product,
    same_dim,
    sym,
)
from tilewright.ir import ops as o

X = TensorType((sym("B"), 4), DType.f32)


def test_dtypes() -> None:
    assert [d.value for d in DType if d.is_float] == ["f64", "f32", "f16", "bf16"]
    assert [d.value for d in DType if d.is_int] == ["i64", "i32", "i16", "i8", "u8", "i4", "u4", "i3", "u3", "i2", "u2"]
    assert all(DType.of(d.np) is d for d in DType if d not in (DType.i3, DType.u3))
    assert [d.size for d in (DType.f64, DType.bf16, DType.bool)] == [8, 2, 1]
    assert [d.bits for d in (DType.f64, DType.bf16, DType.u8, DType.i4, DType.u3, DType.f4e2m1)] == [64, 16, 8, 4, 3, 4]
    with pytest.raises(KeyError, match="no element type for numpy complex64; there are f64"):
        DType.of(np.complex64)


@pytest.mark.parametrize("name", ["s", "Sx", "", "S T", "1S", "É", "S-1"])
def test_symbols_are_upper_case_identifiers(name: str) -> None:
    with pytest.raises(ValueError, match="upper case"):
        sym(name)


def test_dims() -> None:
    b, s = sym("B"), sym("S")
    assert same_dim((b + s) * 2, 2 * b + 2 * s)
    assert not same_dim(b, s)
    assert not same_dim(3, 4)
    assert same_dim(parse_dim("-(-S//4)"), -((-s) // 4))
    assert eval_dim(parse_dim("max(S, 2)*((B*S+7)//8)%5"), {"B": 3, "S": 9}) == 9 * ((27 + 7) // 8) % 5
    assert product((2, b, 3)) == 6 * b
    assert isinstance(product((2, 3)), int)
    with pytest.raises(KeyError, match="S"):
        eval_dim(b + s, {"B": 1})


def test_types() -> None:
    assert str(X) == "tensor<Bx4xf32>"
    assert X.bytes == 16 * sym("B")
    assert TensorType((sympy.Integer(2), np.int64(3)), DType.i8).shape == (2, 3)
    assert X.with_dtype(DType.bf16).with_shape([7]) == TensorType((7,), DType.bf16)
    with pytest.raises(VerifyError, match="expected a kv cache, got tensor"):
        _ = Argument("x", X).cache
    with pytest.raises(VerifyError, match="expected a tensor, got kv<heads=1"):
        _ = Argument("x", KVType(1, 2, 3, 4, DType.f32)).shape


def test_a_declaration_gives_fields() -> None:
    fields = {f.name: (f.kind, f.is_operand) for f in o.Concat.fields}
    assert fields == {"xs": ("variadic", True), "axis": ("int", False)}
    assert [f.kind for f in o.Linear.fields] == ["operand", "operand", "optional"]


def test_wrong_fields() -> None:
    x = Argument("x", X)
    with pytest.raises(TypeError, match=r"nn\.softmax needs 'axis'"):
        o.Softmax(x)
    with pytest.raises(TypeError, match=r"has no field 'dim'; it has \['x', 'axis'\]"):
        o.Softmax(x, axis=0, dim=1)
    with pytest.raises(TypeError, match="takes 2 fields, got 3"):
        o.Softmax(x, 1, 2)
    assert not x.users


def test_an_operation_is_declared_once_and_hides_nothing() -> None:
    with pytest.raises(TypeError, match=r"core\.exp is declared twice"):
        type("Again", (Op,), {"name": "core.exp"})
    with pytest.raises(TypeError, match="a field cannot be called 'operands'"):
        type("Hides", (Op,), {"__annotations__": {"operands": "Value"}})


def test_attributes_are_plain_python() -> None:
    x = Argument("x", X)
    op = o.RmsNorm(x, eps=np.float32(0.5))
    assert type(op.eps) is float
    assert o.Transpose(x, [np.int64(1), 0]).perm == (1, 0)
    assert type(o.Full((), np.float64(2.5), DType.f32).value) is float
    assert type(o.Full((), ml_dtypes.bfloat16(2.5), DType.f32).value) is float
    assert o.Reshape(x, ["2*B", 2]).shape == (2 * sym("B"), 2)


def test_users() -> None:
    x, y = Argument("x", X), Argument("y", X)
    add, neg = o.Add(x, x), o.Neg(x)
    assert list(x.users) == [add, neg]
    x.replace_all_uses(y)
    assert add.a is add.b is neg.x is y
    assert not x.users
    assert list(y.users) == [add, neg]
    neg.drop()
    assert list(y.users) == [add]


def test_a_failed_operation_leaves_no_user() -> None:
    x, y = Argument("x", X), Argument("y", TensorType((3,), DType.f32))
    with pytest.raises(
        VerifyError, match=r"core\.add: shapes \[B, 4\] and \[3\] do not broadcast\n  at module m, f\.py:3"
    ):
        o.Add(x, y, loc=Loc("m", "f.py", 3))
    assert not x.users


def test_clone() -> None:
    x, y = Argument("x", X), Argument("y", X)
    op = o.Concat([x, y, x], 1, loc=Loc("here"))
    copy = op.clone({x: y}, axis=0)
    assert copy.operands == [y, y, y]
    assert (copy.attrs, copy.loc, copy.parent) == ({"axis": 0}, Loc("here"), None)


def test_a_result_is_asked_for_alone() -> None:
    with pytest.raises(VerifyError, match=r"core\.sort has 2 results, not one"):
        _ = o.Sort(Argument("x", X), 1).result


def test_costs() -> None:
    b = sym("B")
    x, w = Argument("x", X), Argument("w", TensorType((5, 4), DType.f32))
    assert o.Linear(x, w).flops() == 2 * b * 5 * 4
    assert o.Linear(x, w).bytes_moved() == 4 * (4 * b + 20 + 5 * b)
    q = Argument("q", TensorType((b, 3, 4, 8), DType.f32))
    assert o.Attention(q, q, q).flops() == 2 * b * 4 * 3 * 3 * 16


def test_base_operation_declares_nothing() -> None:
    class Empty(Op):
        """Nothing."""

        def infer(self) -> tuple[()]:
            return ()

    with pytest.raises(NotImplementedError):
        Op()
    with pytest.raises(NotImplementedError):
        Empty().evaluate(Env({}))
    assert Empty().flops() == 0


def test_module_names_are_unique() -> None:
    m = Module("m")
    m.weight("w", X)
    m.add(Function("f"))
    for add in (m.weight, m.state):
        with pytest.raises(VerifyError, match="@w exists already"):
            add("w", X)  # type: ignore[operator]
    with pytest.raises(VerifyError, match="@f exists already"):
        m.add(Function("f"))
    first, second = (m.constant(np.arange(3.0)[::-1], "w") for _ in range(2))
    assert (first.name, second.name) == ("w.1", "w.2")
    assert first.load().flags.c_contiguous
    assert m.constant(np.array(2.5), "scalar").shape == ()


def test_computed_weights() -> None:
    m = Module("m")
    parts = tuple(ArraySource(np.full((2, 4), v, np.float32)) for v in (1, 2))
    w = m.weight("w", TensorType((4, 4), DType.f32), ComputedSource(parts, lambda *xs: np.concatenate(xs)))
    assert w.load().sum() == 24


def test_function_symbols_and_entries() -> None:
    m = parse_module("""module @m {
      kernel @k(%a: tensor<4xf32>) { return([%a]) }
      func @f(%x: tensor<BxSxf32>) {
        %0 = core.size_of() {value="T*2"} : tensor<i64>
        return([%0])
      }
    }""")
    assert m.functions["f"].symbols() == ["B", "S", "T"]
    assert [f.name for f in m.entries()] == ["f"]
    assert [f.name for f in m.kernels()] == ["k"]
    with pytest.raises(VerifyError, match="@g does not end in a return"):
        _ = Function("g").terminator


def test_canonical_text_is_blind_to_names_and_locations() -> None:
    op = '%9 = core.exp(%{1}) : tensor<4xf32> loc("{0}") return([%9])'
    form = "module @m {{ kernel @{0}(%{1}: tensor<4xf32>) {{ " + op + " }} }}"
    texts = [parse_module(form.format(*names)) for names in (("k", "x"), ("other", "y"))]
    first, second = (canonical(m.kernels()[0]) for m in texts)
    assert first == second == "(%a0: tensor<4xf32>)\n%0 = core.exp(%a0) : tensor<4xf32>\nreturn([%0])"


def test_equality_sees_differences() -> None:
    def build(loc: str = "a", fn: str = "sum", name: str = "x") -> Module:
        m = Module("m")
        f = m.add(Function("f"))
        x: Value = f.arg(name, X)
        r = f.append(o.Reduce(x, fn, (0,), loc=Loc(loc)))
        f.append(Return(r.results))
        return m

    assert build() == build()
    for other in (build(loc="b"), build(fn="max"), build(name="y"), Module("m")):
        assert build() != other
