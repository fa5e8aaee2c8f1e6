"""Every operation's meaning, against eager PyTorch."""

import pytest

from tests.ir_cases import attention, core, elementwise, lossless, nn, quant, sparse, sparse_expand, spatial
from tests.ir_cases.case import Case, check
from tilewright.ir import DType, Op

FAMILIES = (elementwise, core, nn, lossless, quant, sparse, sparse_expand, spatial, attention)
CASES = [case for family in FAMILIES for case in family.CASES]
STRUCTURAL = {"return", "kernel.call", "kv.append", "kv.attend", "kv.choose", "kv.retain", "kv.select"}
"""Tested in test_ir_interpreter.py, test_ir_kv*.py and test_kv_retain.py."""


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, d, id=f"{c.id}-{d.value}") for c in CASES for d in c.dtypes]
)
def test_matches_torch(case: Case, dtype: DType) -> None:
    check(case, dtype)


def test_every_operation_has_a_case() -> None:
    assert {c.kind.name for c in CASES} == set(Op.registry) - STRUCTURAL


@pytest.mark.parametrize("kind", Op.registry.values(), ids=lambda k: k.name)
def test_declaration_is_complete(kind: type[Op]) -> None:
    assert kind.infer is not Op.infer
    assert kind.evaluate is not Op.evaluate
    assert kind.__doc__
    assert kind.name.startswith(("core.", "nn.", "kv.", "quant.", "sparse.", "moe.", "kernel.")) or kind.name == "return"
