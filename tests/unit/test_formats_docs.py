"""The tables of the page about quantization are what the declarations say."""

from pathlib import Path

import pytest

from tilewright.passes.formats import SCHEMES
from tilewright.passes.formats.docs import BEGIN, END, rewritten, tables

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"


def test_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == rewritten(page), "run: python -m tilewright.passes.formats.docs docs/quantization.md"


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_and_format_is_on_the_page(name: str) -> None:
    assert f"| `{name}` | " in tables()
    assert f"### {type(SCHEMES[name].format).__name__}\n" in tables()


def test_rows_are_what_formats_store() -> None:
    rows = {line.split("`")[1]: line for line in tables().splitlines() if line.startswith("| `")}
    assert "| 4.125 (4 + 16/128), 32 a row | 9.9% | 8 bits | `codes u4 [N, K]`<br>`step u8 [N, K/128]`" in rows["two-level"]
    assert "| 4.25 (4 + 16/64), 512 once | 9.2% | as they are | `codes u4 [N, K]`<br>`table f32 [1, 16]`<br>" in rows["nf4"]
    assert "`group=64`: what divides K" in rows["nf4"]
    assert "[arXiv:2306.07629](https://arxiv.org/abs/2306.07629)" in rows["codebook3"]
