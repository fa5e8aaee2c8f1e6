"""Times of layers that were not measured lie between those that were."""

from __future__ import annotations

import pytest

from tilewright.codegen.target import parse_target
from tilewright.ir import DType, PassError
from tilewright.layer_costs import Interpolated, corners, layer_costs, layers
from tilewright.passes.pipeline import Pipeline


def test_sizes_between_are_on_lines() -> None:
    asked: list[tuple[int, int]] = []

    def exact(rows: int, columns: int, dtype: DType) -> float:
        asked.append((rows, columns))
        return 3e-6 + rows * columns * 1e-9

    costs = Interpolated(exact)
    for rows, columns in ((2048, 5632), (2048, 3000), (1333, 700), (128, 128)):
        assert costs(rows, columns, DType.bf16) == pytest.approx(exact(rows, columns, DType.bf16), rel=1e-9)
    assert costs(64, 128, DType.bf16) == pytest.approx(costs(128, 128, DType.bf16) / 2)
    before = len(asked)
    costs(2048, 3010, DType.bf16)
    assert len(asked) == before, "the same neighbours"


@pytest.mark.parametrize("size", [128, 129, 704, 1024, 5632, 32000])
def test_neighbours_are_near(size: int) -> None:
    found = dict(corners(size))
    assert sum(n * part for n, part in found.items()) == pytest.approx(size)
    assert all(n % 128 == 0 and abs(n - size) <= max(128, size // 8) for n in found)


def test_layers_have_weights_of_their_own() -> None:
    module = layers(256, 128, DType.f32, 3)
    Pipeline.parse("quantize{scheme=w8a8},cse,dce").run(module)
    assert len(module.functions["forward"].returns) == 3
    assert len({w.name for w in module.weights.values() if w.dtype is DType.i8}) == 3


def test_a_layer_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.layer_costs._BYTES", 1 << 17)
    costs = layer_costs(parse_target("native"), "w8a16")
    assert 0 < costs(128, 128, DType.f32) < 1


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(PassError, match="take cost=bytes"):
        layer_costs(parse_target("cuda{arch=sm_90a}"))
    with pytest.raises(PassError, match="w8a17"):
        layer_costs(parse_target("native"), "w8a17")
