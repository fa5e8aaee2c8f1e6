"""The reference page is what the declarations say."""

from pathlib import Path

from tilewright.ir import Op, parse_module, print_module, verify
from tilewright.ir.docs import EXAMPLE, reference

PAGE = Path(__file__).parents[2] / "docs" / "ir.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "run: python -m tilewright.ir.docs > docs/ir.md"


def test_every_operation_is_on_the_page() -> None:
    page = reference()
    assert [name for name in Op.registry if name != "return" and f"| `{name}`<br>" not in page] == []


def test_example_is_valid_and_as_printed() -> None:
    module = parse_module(EXAMPLE)
    verify(module)
    assert print_module(module) == EXAMPLE
