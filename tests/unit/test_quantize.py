"""What the pass does to whole functions, and what it refuses."""

from dataclasses import dataclass

import numpy as np
import pytest

from tilewright.ir import ArraySource, Module, PassError, interpret, ops, parse_module
from tilewright.passes.pipeline import Pipeline

TIED = """
module @m {
  dim B : 1..8
  weight @up : tensor<64x32xf32>
  weight @down : tensor<32x64xf32>
  weight @embed : tensor<40x32xf32>
  func @forward(%ids: tensor<Bxi64>) {
    %0 = nn.embedding(%ids, @embed) : tensor<Bx32xf32>
    %1 = nn.linear(%0, @up) : tensor<Bx64xf32>
    %2 = core.silu(%1) : tensor<Bx64xf32>
    %3 = nn.linear(%2, @down) : tensor<Bx32xf32>
    %4 = nn.linear(%3, @embed) : tensor<Bx40xf32>
    return([%4])
  }
}
"""


def tied() -> Module:
    module, rng = parse_module(TIED), np.random.default_rng(2)
    for w in module.weights.values():
        w.source = ArraySource(rng.standard_normal(tuple(map(int, w.shape))).astype(np.float32))
    return module


@pytest.mark.parametrize(("pipeline", "close"), [
    ("quantize{scheme=w8a16}", 0.02),
    ("quantize{scheme=w8a8}", 0.04),
    ("quantize{scheme=w8a8 group=16 zero=true}", 0.04),
    ("quantize{scheme=w8a8 layers=head},quantize{scheme=w4a8 group=16 layers=body}", 0.2),
    ("quantize{scheme=w4a16 group=16 zero=true}", 0.2),
])  # fmt: skip
def test_functions_keep_their_meaning(pipeline: str, close: float) -> None:
    ids = np.arange(8)
    want = interpret(tied(), "forward", [ids])[0]
    module = tied()
    Pipeline.parse(f"{pipeline},dce").run(module)
    got = interpret(module, "forward", [ids])[0]
    assert 0 < np.linalg.norm(got - want) < close * np.linalg.norm(want)


def test_head_and_table_share_numbers_and_the_rest_has_its_own() -> None:
    module = tied()
    Pipeline.parse("quantize{scheme=w8a8 layers=head},quantize{scheme=w4a8 group=16 layers=body},dce").run(module)
    kinds = {name: w.dtype.value for name, w in module.weights.items() if not name.endswith("scale")}
    assert kinds == {"embed.i8": "i8", "up.i4": "i4", "down.i4": "i4"}
    assert sum(int(w.tensor.bytes) for w in module.weights.values()) == 40 * 36 + 2 * (64 * 32 // 2 + 64 * 32 // 16 * 2)


def test_layers_that_share_an_input_share_its_codes() -> None:
    text = TIED.replace("nn.linear(%3, @embed)", "nn.linear(%0, @embed)").replace("return([%4])", "return([%3, %4])")
    module = parse_module(text)
    Pipeline.parse("quantize{scheme=w8a8}").run(module)
    assert len(list(module.functions["forward"].walk(ops.Quantize))) == 2


def test_a_group_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(PassError, match=r"@down: groups of 48 do not divide its rows of 64; choose another group"):
        Pipeline.parse("quantize{scheme=w4a8 group=48 skip=[*up*, *embed*]}").run(tied())


@pytest.mark.parametrize(("text", "message"), [
    ("quantize{scheme=w4a61}", r"no scheme 'w4a61' \(did you mean w4a16\?\); there are w8a16, w8a8"),
    ("quantize{group=-2}", "a group has 1 or more elements, or is 0 for all of a row; got -2"),
])  # fmt: skip
def test_schemes_and_options_are_checked_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text)


@pytest.mark.parametrize("option", ["skip", "only"])
def test_a_pattern_that_matches_no_weight_is_refused_with_close_names(option: str) -> None:
    with pytest.raises(PassError, match=rf"option {option} of quantize: no weight is named '\*dwon\*'; near are down"):
        Pipeline.parse(f"quantize{{{option}=[up, *dwon*]}}").run(tied())


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(number: float) -> None:
    module = tied()
    source = module.weights["down"].source
    assert isinstance(source, ArraySource)
    source.array[7, 3] = number
    with pytest.raises(PassError, match=r"@down has numbers that are NaN or infinite, first in row 7; .* skip=down"):
        Pipeline.parse("quantize").run(module)


@dataclass
class OnDisk:
    """Numbers of a file."""

    array: np.ndarray
    released: int = 0

    def load(self) -> np.ndarray:
        return self.array

    def release(self) -> None:
        self.released += 1


def test_numbers_in_files_are_checked_at_once_and_let_go() -> None:
    module = tied()
    down = module.weights["down"].source = OnDisk(np.ones((32, 64), np.float32))
    Pipeline.parse("quantize").run(module)
    assert down.released == 1
    module = tied()
    module.weights["down"].source = OnDisk(np.full((32, 64), np.nan, np.float32))
    with pytest.raises(PassError, match="@down has numbers that are NaN or infinite, first in row 0"):
        Pipeline.parse("quantize").run(module)
