"""Schedules: declared knobs, spaces, constraints, text."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from tilewright.codegen.schedule import (
    AttentionSchedule,
    LinearSchedule,
    Schedule,
    ScheduleError,
    constraint,
    knob,
    parse_schedule,
)
from tilewright.codegen.target import CpuTarget, parse_target

AVX2, AVX512 = parse_target("x86-64-v3"), parse_target("x86-64-v4")


@dataclass(frozen=True)
class Toy(Schedule):
    """Two knobs and a constraint."""

    name: ClassVar[str] = "toy"
    width: int = knob(2, (1, 2, 4))
    deep: bool = knob(False, (False, True))

    @constraint
    def narrow_when_deep(self, target: CpuTarget) -> str | None:
        return "deep and wide" if self.deep and self.width > 2 else None


def test_space_is_the_product_less_constraints() -> None:
    space = Toy.space(AVX2)
    assert space.product == 6
    assert len(space) == len(set(space)) == 5
    assert Toy(4, True) not in set(space)


def test_text_round_trips() -> None:
    assert Toy(4, False).text == "toy{width=4 deep=false}"
    for schedule in Toy.space(AVX2):
        assert parse_schedule(schedule.text) == schedule
    assert parse_schedule("toy{deep=true}") == Toy(2, True)


def test_validate_names_the_knob_and_its_domain() -> None:
    with pytest.raises(ScheduleError, match=r"toy: width=3 is not one of \[1, 2, 4\]"):
        Toy(3).validate(AVX2)
    with pytest.raises(ScheduleError, match="deep and wide"):
        Toy(4, True).validate(AVX2)


@pytest.mark.parametrize(("text", "message"), [
    ("toi{width=1}", "unknown schedule 'toi'; known: .*toy"),
    ("toy{height=1}", "toy has no knob 'height'; its knobs: width, deep"),
    ("toy{width=8}", "toy: width=8 is not one of"),
])
def test_errors_say_what_exists(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_schedule(text)


def test_a_default_outside_its_domain_is_refused() -> None:
    with pytest.raises(ScheduleError, match="default 5 is not in the domain"):
        knob(5, (1, 2))


@pytest.mark.parametrize("target", [AVX2, AVX512])
@pytest.mark.parametrize("kind", [LinearSchedule, AttentionSchedule])
def test_defaults_are_valid(kind: type[Schedule], target: CpuTarget) -> None:
    assert kind.default(target).validate(target) in set(kind.space(target))


def test_tiles_must_fit_the_registers() -> None:
    assert LinearSchedule(tile_m=6, tile_v=4).refusal(AVX512) is None
    assert "vector registers of 16" in LinearSchedule(tile_m=6, tile_v=4).refusal(AVX2)
