"""Attention over values that are the first components of keys: bit by bit as over a second copy of them, and right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import compare
from tests.backend.harness import TARGETS
from tests.backend.test_kv_layouts import LENGTH, LIMIT, RULES, Appending, Attending, run, visible_slots
from tilewright.codegen.cache import cache_layout
from tilewright.codegen.cuda.cache import refusal
from tilewright.codegen.target import parse_target
from tilewright.ir import CONTIGUOUS, DType, KVType, Layout, Paged, Ring

CASES = [("bf16", (72, 40)), ("bf16", (18, 3)), ("f32", (33, 20)), ("f16", (40, 40))]


class Among(Attending):
    """Values are the first components of keys, whether they are stored beside these or not."""

    def operands(self, starts: Sequence[int], s: int) -> tuple[list[Any], dict[str, int]]:
        made, dims = super().operands(starts, s)
        keys = made[1][0]
        made[1] = keys, keys[..., : self.cache_type.own_vdim]
        return made, dims


def check(target: str, layout: Layout, s: int, starts: Sequence[int], **given: Any) -> np.ndarray:
    given |= {"layout": layout, "s": 1 if s == 1 else "S"}
    got, want = run(Among(values="keys", **given), target, starts, s)
    beside, _ = run(Among(values="own", **given), target, starts, s)
    compare(got, want, LIMIT[given["dtype"]])
    if given["dtype"] != "bf16" or "v3" not in target:  # f32 sums take turns otherwise when bf16 comes in pairs
        assert np.array_equal(got, beside)
    return got


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "sizes"), CASES)
@pytest.mark.parametrize("s", [1, 21])
def test_attend(target: str, dtype: str, sizes: tuple[int, int], s: int) -> None:
    """And pages as one piece, bit by bit."""
    starts, given = [0, 63, LENGTH - s], {"dtype": dtype, "heads": 10, "sizes": sizes}
    found = [check(target, layout, s, starts, **given) for layout in (CONTIGUOUS, Paged(16))]
    assert np.array_equal(*found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("s", [1, 21])
def test_what_queries_see(target: str, s: int) -> None:
    check(target, Paged(32), s, [5, LENGTH - s], dtype="bf16", heads=6, **RULES["all"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("s", [1, 21])
def test_rings(target: str, s: int) -> None:
    check(target, Ring(90, 40, 4), s, [0, 3, 130, LENGTH - s], dtype="bf16", heads=6, window=90)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", [Paged(16), Ring(40, 70, 5)], ids=str)
def test_append(target: str, layout: Layout) -> None:
    for s, starts in ((70, [0, 3, 61, 200]), (1, [0, 4, 5, 630])):
        case = Appending("bf16", "f32", layout, s if s == 1 else "S", values="keys")
        (got, none), (want, _) = run(case, target, starts, s)
        seen = visible_slots(case.cache_type, starts, s)
        assert np.array_equal(got[seen], want[seen])
        assert none.size == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", [CONTIGUOUS, Paged(32)], ids=str)
def test_bytes(target: str, layout: Layout) -> None:
    """What is taken is what the type says."""
    kind = KVType(1, 576, 512, 128, DType.bf16, layout, values="keys")
    memory = cache_layout(kind, parse_target(target))
    assert kind.bytes_of(1) == 1152
    assert (memory.k_bytes, memory.v_bytes) == (kind.page_bytes or kind.sequence_bytes, 0)
    assert sum(x.nbytes for x in memory.empty(3)) == 3 * memory.k_bytes


@pytest.mark.parametrize(("given", "reason"), [
    ({"vdim": 600}, "values of 600 are not among keys of 576"),
    ({"dtype": DType.i8}, "values among keys are floats, not i8"),
    ({"values": "both"}, "values are own or keys, got both"),
])  # fmt: skip
def test_refusals(given: dict[str, Any], reason: str) -> None:
    kind = {"heads": 1, "dim": 576, "vdim": 512, "length": 64, "dtype": DType.bf16, "values": "keys"}
    with pytest.raises(ValueError, match=reason):
        KVType(**kind | given)


def test_refused_on_a_gpu() -> None:
    kind = KVType(1, 576, 512, 64, DType.bf16, values="keys")
    assert "on a GPU values are stored beside their keys; leave out latent-cache" in str(refusal(kind))
