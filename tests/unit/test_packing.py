"""Weight packing: the layout, its text, padding."""

import ml_dtypes
import numpy as np
import pytest

from tilewright.codegen.packing import Packing


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i8"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (65, 33), (130, 7), (16, 200)])
def test_unpack_inverts_pack(dtype: str, n: int, k: int) -> None:
    kinds = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8}
    weight = np.random.default_rng(0).integers(-100, 100, (n, k)).astype(kinds[dtype])
    packing = Packing(dtype, n, k, 64)
    packed = packing.pack(weight, np.full(packing.shape, 9, weight.dtype))
    assert packed.nbytes == packing.nbytes
    assert np.array_equal(packing.unpack(packed), weight)
    assert np.count_nonzero(packed) == np.count_nonzero(weight)  # the padding is zero


def test_pairs_lie_side_by_side() -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    packed = Packing("bf16", 3, 4, 4).pack(weight).astype(int)
    assert packed[0, 0].tolist() == [[0, 1], [4, 5], [8, 9], [0, 0]]
    assert packed[0, 1].tolist() == [[2, 3], [6, 7], [10, 11], [0, 0]]


def test_text_round_trips() -> None:
    packing = Packing("bf16", 5632, 2048, 64)
    assert packing.text == "panels{dtype=bf16 n=5632 k=2048 panel=64}"
    assert Packing.parse(packing.text) == packing


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"is not a packing"):
        Packing.parse("panels{n=1}")
    with pytest.raises(ValueError, match=r"cannot pack f64 weights; known: f32, f16, bf16, i8"):
        Packing("f64", 1, 1, 16)
    with pytest.raises(ValueError, match=r"cannot pack float32 \(2, 2\)"):
        Packing("bf16", 2, 2, 16).pack(np.zeros((2, 2), np.float32))
