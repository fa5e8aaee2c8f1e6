"""What only a module in memory can break; the rest is in ``filetests/errors``."""

import re

import pytest

from tilewright.ir import DType, Function, Loc, Module, Return, TensorType, VerifyError, sym, verify
from tilewright.ir import ops as o

X = TensorType((4,), DType.f32)


def sample() -> tuple[Module, Function]:
    """``relu(exp(x))``, located."""
    m = Module("m")
    f = m.add(Function("f"))
    exp = f.append(o.Exp(f.arg("x", X), loc=Loc("model.a", "model.py", 3)))
    relu = f.append(o.Relu(exp.result, loc=Loc("model.b", "model.py", 4)))
    f.append(Return(relu.results))
    return m, f


def refuses(module: Module, message: str) -> str:
    with pytest.raises(VerifyError, match=message) as error:
        verify(module)
    return str(error.value)


def test_sample_is_valid() -> None:
    verify(sample()[0])


def test_use_before_definition_shows_the_lines_around() -> None:
    m, f = sample()
    f.body[0], f.body[1] = f.body[1], f.body[0]
    text = refuses(m, "is not defined before this point")
    assert "in @f: core.relu: operand" in text
    assert re.search(r"  -> %0 = core.relu\(%1\) : tensor<4xf32> loc.*\n     %1 = core.exp\(%x\)", text)
    assert text.endswith("at module model.b, model.py:4")


def test_operand_of_another_module() -> None:
    m, f = sample()
    other = Module("other").weight("w", X)
    f.body[0].replace_operand(f.args[0], other)
    refuses(m, r"operand <Weight w : tensor<4xf32>> is not defined")


def test_users_are_kept() -> None:
    m, f = sample()
    f.args[0].users.clear()
    refuses(m, "does not list it as a user")


def test_parent_is_kept() -> None:
    m, f = sample()
    f.body[0].parent = Function("elsewhere")
    refuses(m, "its parent is another function")


def test_result_types_are_inferred_ones() -> None:
    m, f = sample()
    f.body[0].results[0].type = TensorType((5,), DType.f32)
    refuses(m, "expected result types tensor<4xf32>, got tensor<5xf32>")


def test_an_attribute_that_breaks_the_rules_later() -> None:
    m, f = sample()
    softmax = o.Softmax(f.args[0], 0)
    f.insert(0, softmax)
    softmax.axis = 2
    refuses(m, r"nn\.softmax: axis 2 is outside of rank 1")


def test_returns() -> None:
    m, f = sample()
    f.insert(1, Return([f.args[0]]))
    refuses(m, "a return stands last, and only there")
    f.body[:] = f.body[:1]
    refuses(m, "@f does not end in a return")


def test_names_and_dims() -> None:
    m, f = sample()
    f.arg("x", X)
    refuses(m, "in @f: two arguments are called x")
    f.args[1].name = None
    f.arg("arg1", X)
    refuses(m, "two arguments are called arg1")
    del f.args[1:]
    m.functions["g"] = m.functions.pop("f")
    refuses(m, "function @f is listed as @g")
    m, f = sample()
    f.arg("y", TensorType((sym("S"),), DType.f32))
    refuses(m, "uses the undeclared dim S")
    m.dims["S"] = (4, 2)
    refuses(m, r"dim S has no size in 4\.\.2")
