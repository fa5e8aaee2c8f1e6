"""Patterns: matching by annotation, replacing, reasons for skipping."""

import pytest

from tilewright.ir import Builder, Loc, Module, Rewriter, VerifyError, parse_module, print_module, rewrite, verify
from tilewright.ir import ops as o
from tilewright.ir.ops import Add, Exp, Mul, Neg, Relu, Sort


def module(body: str, result: str = "%2") -> Module:
    return parse_module(f"""module @m {{
      func @f(%x: tensor<4xf32>) {{
        {body}
        return([{result}])
      }}
    }}""")


CHAIN = """%0 = core.neg(%x) : tensor<4xf32> loc("a")
           %1 = core.neg(%0) : tensor<4xf32> loc("b")
           %2 = core.add(%1, %1) : tensor<4xf32> loc("c")"""


def drop_double_negation(op: Neg, rw: Rewriter) -> None:
    inner = op.x.owner
    if not isinstance(inner, Neg):
        return rw.skip(op, "its operand is no negation")
    return rw.replace(op, inner.x)


def names(m: Module) -> list[str]:
    return [op.name for op in m.ops()]


def test_replace_by_a_value() -> None:
    m = module(CHAIN)
    rw = rewrite(m, drop_double_negation)
    verify(m)
    assert names(m) == ["core.neg", "core.add", "return"]
    assert rw.changed == 1
    add = m.functions["f"].body[1]
    assert isinstance(add, Add)
    assert add.a is add.b is m.functions["f"].args[0]


def test_skips_say_where_and_why() -> None:
    rw = rewrite(module(CHAIN), drop_double_negation)
    assert str(rw.skips[0]) == "drop-double-negation: core.neg at module a: its operand is no negation"
    assert {s.loc for s in rw.skips} == {Loc("a")}


def test_replace_by_an_operation_keeps_place_and_location() -> None:
    def double(op: Add, rw: Rewriter) -> None:
        if op.a is op.b:
            rw.replace(op, Mul(op.a, rw.before(op).full(2.0, like=op.a)))

    m = module(CHAIN)
    rewrite(m, double)
    verify(m)
    assert names(m) == ["core.neg", "core.neg", "core.full", "core.mul", "return"]
    assert {op.loc.module for op in m.functions["f"].body[2:4]} == {"c"}
    assert "core.mul(%1, %2)" in print_module(m)


def test_replace_several_results() -> None:
    def ascending(op: Sort, rw: Rewriter) -> None:
        if op.descending:
            rw.replace(op, Sort(op.x, op.axis))

    m = module("%0, %1 = core.sort(%x) {axis=0 descending=true} : tensor<4xf32>, tensor<4xi64>", "%0, %1")
    rewrite(m, ascending)
    verify(m)
    [sort, last] = m.ops()
    assert last.operands == list(sort.results)


def test_replacement_needs_one_value_a_result() -> None:
    def wrong(op: Sort, rw: Rewriter) -> None:
        rw.replace(op, op.x)

    m = module("%0, %1 = core.sort(%x) {axis=0} : tensor<4xf32>, tensor<4xi64>", "%0, %1")
    with pytest.raises(VerifyError, match=r"core\.sort has 2 results, 1 replace them"):
        rewrite(m, wrong)


def test_erase_needs_no_users() -> None:
    def erase(op: Exp, rw: Rewriter) -> None:
        rw.erase(op)

    m = module("%0 = core.exp(%x) : tensor<4xf32>\n%1 = core.relu(%x) : tensor<4xf32>", "%1")
    assert rewrite(m, erase).changed == 1
    assert names(m) == ["core.relu", "return"]
    with pytest.raises(VerifyError, match=r"core\.exp still has users"):
        rewrite(module("%0 = core.exp(%x) : tensor<4xf32>", "%0"), erase)


def test_runs_until_nothing_changes_and_in_given_functions_only() -> None:
    body = "\n".join(f"%{i} = core.neg(%{i - 1 if i else 'x'}) : tensor<4xf32>" for i in range(9))
    m = module(body, "%8")
    assert not rewrite(m, drop_double_negation, functions=[]).changed
    rewrite(m, drop_double_negation)
    f = m.functions["f"]
    [last] = f.returns[0].owner.operands
    assert last is f.args[0]


def test_pattern_of_several_classes_and_of_a_method() -> None:
    class Count:
        seen: list[str] = []

        def look(self, op: Neg | Add, rw: Rewriter) -> None:
            self.seen.append(op.name)

    rewrite(module(CHAIN), Count().look)
    assert Count.seen == ["core.neg", "core.neg", "core.add"]


def test_an_op_that_went_away_is_not_looked_at_again() -> None:
    def to_relu(op: Neg, rw: Rewriter) -> None:
        rw.replace(op, Relu(op.x))

    m = module(CHAIN)
    assert rewrite(m, to_relu, drop_double_negation).changed == 2
    assert names(m) == ["core.relu", "core.relu", "core.add", "return"]


def test_builder_inserts_before_and_locates_errors() -> None:
    m = module(CHAIN)
    f = m.functions["f"]
    b = Builder(f, f.body[1])
    with b.at(Loc("here")):
        added = b(o.Exp, f.args[0])
    assert f.body.index(added.op) == 1
    assert added.op.loc == Loc("here")
    assert b.loc != Loc("here")
    with pytest.raises(VerifyError, match=r"axis 3 is outside of rank 1\n  at module there"):
        Builder(f, loc=Loc("there"))(o.Softmax, f.args[0], 3)
    with pytest.raises(VerifyError, match="already in function @f"):
        b.insert(added.op)
