"""The text form of passes: what parses, what it means, and where errors point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.ir import Module, ParseError, PassError
from tilewright.passes import Pass, PassContext, Pipeline, find, names, parse_pass, print_pass, register
from tilewright.passes.named import NAMED


@register
@dataclass(frozen=True)
class Sample(Pass):
    """Has an option of each kind."""

    name: ClassVar[str] = "sample"
    count: int = 1
    rate: float = 0.5
    quick: bool = False
    kind: str = "plain"
    scheme: Literal["a", "b"] = "a"
    limit: int | None = None
    skip: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")

    def run(self, module: Module, ctx: PassContext) -> bool:
        return False


def test_options_are_typed_by_their_fields() -> None:
    text = 'sample{count=3 rate=1e-3 quick=true kind="a b,c" scheme=b limit=4 skip=[lm_head,"x y"] sizes=[5]}'
    want = Sample(3, 1e-3, True, "a b,c", "b", 4, ("lm_head", "x y"), (5,))
    assert parse_pass(text) == want
    assert print_pass(want) == text.replace("1e-3", "0.001")
    assert parse_pass("sample{limit=none skip=[] sizes=7}") == Sample(sizes=(7,))


def test_defaults_are_left_out() -> None:
    assert print_pass(Sample()) == str(Sample()) == "sample"
    assert str(Pipeline.parse(" sample { count=2 } , dce ")) == "sample{count=2},dce"


@given(
    st.builds(
        Sample,
        count=st.integers(0, 10**12),
        rate=st.floats(allow_nan=False),
        quick=st.booleans(),
        kind=st.text(min_size=1).filter(lambda s: s.isprintable()),
        scheme=st.sampled_from(["a", "b"]),
        limit=st.none() | st.integers(),
        skip=st.lists(st.text().filter(lambda s: s.isprintable())).map(tuple),
        sizes=st.lists(st.integers()).map(tuple),
    )
)
def test_printing_round_trips(sample: Sample) -> None:
    assert parse_pass(print_pass(sample)) == sample


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "at least one pass"),
        ("dce,", 5, "expected word, got the end"),
        ("dce,,dce", 5, "expected word, got ','"),
        ("dce dce", 5, "expected ,, got 'dce'"),
        ("sample{count=1", 15, "expected word or }, got the end"),
        ("sample{count}", 13, "expected =, got '}'"),
        ("sample{count=}", 14, "expected word or string, got '}'"),
        ("sample{count=1 count=2}", 16, "'count' is given twice"),
        ("dce,sample{depth=1}", 12, "sample has no option 'depth'; it has count, rate"),
        ("sample{count=x}", 8, "option count of sample: expected an integer, got 'x'"),
        ("sample{rate=x}", 8, "expected a number, got 'x'"),
        ("sample{quick=1}", 8, "expected true or false, got '1'"),
        ("sample{scheme=c}", 8, "expected one of a, b, got 'c'"),
        ("sample{kind=[a]}", 8, "takes one value, got a list"),
        ("dce,sample{count=-1}", 5, "sample: count must not be negative"),
        ('sample{kind="a}', 13, "unexpected character"),
        ("O2{x=1}", 1, "the named pipeline O2 takes no options"),
    ],
)
def test_errors_point_at_the_column(text: str, column: int, message: str) -> None:
    with pytest.raises(ParseError) as info:
        Pipeline.parse(text)
    assert info.value.column == column
    assert message in info.value.message


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(PassError, match=r"column 5: there is no pass named 'fuze'; there are .*canonicalize, .*, O0, O1"):
        Pipeline.parse("dce,fuze")
    with pytest.raises(PassError, match="there is no pass"):
        parse_pass("nothing")


def test_every_pass_can_be_found() -> None:
    for name in names():
        cls = find(name)
        assert cls.name == name
        assert cls.__doc__, name
        assert parse_pass(name) == cls()


@pytest.mark.parametrize("name", NAMED)
def test_named_pipelines_expand_to_text_that_round_trips(name: str) -> None:
    pipeline = Pipeline.parse(name)
    assert pipeline.passes
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.parse(f"dce,{name}").passes == (find("dce")(), *pipeline.passes)


def test_named_pipelines_must_not_contain_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMED, "one", "dce,two")
    monkeypatch.setitem(NAMED, "two", "one")
    with pytest.raises(PassError, match="one -> two -> one contain each other"):
        Pipeline.parse("one")


def test_a_name_is_registered_once() -> None:
    @dataclass(frozen=True)
    class Other(Sample):
        name: ClassVar[str] = "dce"

    with pytest.raises(PassError, match="already a pass named 'dce'"):
        register(Other)
    assert register(Sample) is Sample
