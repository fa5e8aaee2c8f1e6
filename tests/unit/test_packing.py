"""Weight packing: the layout, its text, padding."""

import ml_dtypes
import numpy as np
import pytest

from tilewright.codegen.column_packing import ColumnPacking
from tilewright.codegen.emitters import pack, packed_spec
from tilewright.codegen.packing import Packing, RowPacking, parse_packing
from tilewright.ir import DType, TensorType

NAMES = ("f32", "f16", "bf16", "i8", "u8", "i4", "u4", "i3", "u3", "i2", "u2", "f8e4m3", "f8e5m2", "f4e2m1")
KINDS = {name: DType(name).np for name in NAMES}
RANGES = {"u8": (0, 256), "i8": (-128, 128), "i4": (-8, 8), "u4": (0, 16), "i3": (-4, 4), "u3": (0, 8), "i2": (-2, 2),
          "u2": (0, 4), "f4e2m1": (-6, 7)}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (65, 33), (130, 7), (16, 200)])
def test_unpack_inverts_pack(dtype: str, n: int, k: int) -> None:
    weight = np.random.default_rng(0).integers(*RANGES.get(dtype, (-100, 100)), (n, k)).astype(KINDS[dtype])
    packing = Packing(dtype, n, k, 64)
    packed = packing.pack(weight)
    assert packed.shape == packing.shape
    assert packed.nbytes == packing.nbytes
    again = packing.unpack(packed)
    assert again.dtype == weight.dtype
    assert np.array_equal(again, weight)


@pytest.mark.parametrize("dtype", KINDS)
def test_padding_is_zero(dtype: str) -> None:
    """Whatever the bias of the codes: what is not there multiplies to nothing."""
    weight = np.full((3, 5), 1).astype(KINDS[dtype])
    packing = Packing(dtype, 3, 5, 16)
    packed = packing.pack(weight, np.full(packing.shape, 9, packing._stored))
    narrow = 3 * 8 if dtype == "i3" else 3 * 4  # of five codes the last shares a byte; of i3 the upper bits take four more
    assert np.count_nonzero(packed) == (narrow if packing.bits < 8 else 3 * 5)


def test_pairs_lie_side_by_side() -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    packed = Packing("bf16", 3, 4, 4).pack(weight).astype(int)
    assert packed[0, 0].tolist() == [[0, 1], [4, 5], [8, 9], [0, 0]]
    assert packed[0, 1].tolist() == [[2, 3], [6, 7], [10, 11], [0, 0]]


def test_codes_are_unsigned() -> None:
    bytes_ = Packing("i8", 1, 4, 1).pack(np.array([[-128, -1, 0, 127]], np.int8))
    assert bytes_.ravel().tolist() == [0, 127, 128, 255]
    nibbles = Packing("i4", 1, 8, 1).pack(np.array([[-8, -1, 0, 7, -7, 1, 2, 3]], ml_dtypes.int4))
    assert nibbles.ravel().tolist() == [0 | 1 << 4, 7 | 9 << 4, 8 | 10 << 4, 15 | 11 << 4]


def test_codes_of_two_and_three_bits() -> None:
    codes = np.arange(16) % 4
    word = Packing("u2", 1, 16, 1).pack(codes.astype(KINDS["u2"])[None]).ravel()
    assert [[(byte >> 2 * j) & 3 for byte in word] for j in range(4)] == codes.reshape(4, 4).tolist()
    codes = np.arange(32) * 5 % 8
    words = Packing("u3", 1, 32, 1).pack(codes.astype(np.uint8)[None]).reshape(3, 4)
    low = [[(byte >> 2 * j) & 3 for byte in words[i]] for i in range(2) for j in range(4)]
    high = [[(byte >> j) & 1 for byte in words[2]] for j in range(8)]
    assert (np.array(low) + 4 * np.array(high)).ravel().tolist() == codes.tolist()


@pytest.mark.parametrize(("dtype", "k"), [("i8", 33), ("u4", 33), ("i4", 64), ("u2", 40), ("i3", 70)])
def test_split_exchanges_two_of_four_bytes(dtype: str, k: int) -> None:
    weight = np.random.default_rng(0).integers(*RANGES[dtype], (20, k)).astype(KINDS[dtype])
    plain, split = Packing(dtype, 20, k, 16), Packing(dtype, 20, k, 16, split=True)
    assert np.array_equal(split.pack(weight), plain.pack(weight)[..., [0, 2, 1, 3]])
    assert np.array_equal(split.unpack(split.pack(weight)), weight)
    assert Packing.parse(split.text) == split


@pytest.mark.parametrize(("dtype", "k"), [("u4", 16), ("u4", 40), ("u2", 70), ("u3", 64)])
def test_rows(dtype: str, k: int) -> None:
    """Neighbouring k's lie in neighbouring words, each of which has the codes that it has in panels."""
    weight = np.random.default_rng(0).integers(*RANGES[dtype], (3, k)).astype(KINDS[dtype])
    rows = RowPacking(dtype, 3, k, 4, 2)
    packed = rows.pack(weight, np.full(rows.shape, 9, np.uint8))
    assert packed.shape == (4, rows.row_size)
    assert not packed[3].any()
    assert rows.nbytes == packed.nbytes
    for row, got in zip(weight, packed):
        wide = np.pad(row, (0, -k % rows.block))
        for lane in range(2):
            word = Packing(dtype, 2, len(wide) // 2, 2).unpack(got)[lane]
            np.testing.assert_array_equal(word, wide[lane::2])
    assert parse_packing(rows.text) == rows


def test_text_round_trips() -> None:
    packing = Packing("bf16", 5632, 2048, 64)
    assert packing.text == "panels{dtype=bf16 n=5632 k=2048 panel=64 pair=2 split=false}"
    assert Packing.parse(packing.text) == packing
    assert Packing.parse(Packing("u8", 3, 2, 16, pair=4).text) != Packing("u8", 3, 2, 16)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"is not a packing"):
        Packing.parse("panels{n=1}")
    with pytest.raises(ValueError, match=r"cannot pack f64 weights; known: f32, f16, bf16, i8"):
        Packing("f64", 1, 1, 16)
    with pytest.raises(ValueError, match=r"cannot pack i4 in pairs of 3"):
        Packing("i4", 1, 1, 16, pair=3)
    with pytest.raises(ValueError, match=r"cannot split bf16"):
        Packing("bf16", 1, 1, 16, split=True)
    with pytest.raises(ValueError, match=r"cannot pack float32 \(2, 2\)"):
        Packing("bf16", 2, 2, 16).pack(np.zeros((2, 2), np.float32))


@pytest.mark.parametrize("dtype", [DType.f8e4m3, DType.f8e5m2, DType.f8e8m0, DType.f4e2m1])
def test_narrow_floats_are_stored_as_bytes(dtype: DType) -> None:
    array = np.exp2(np.arange(6) % 3).reshape(2, 3).astype(dtype.np)
    kind, shape = packed_spec(TensorType((2, 3), dtype), "")
    packed = pack(array, "", dtype)
    assert (kind, shape) == ("u8", packed.shape)
    assert packed.dtype == np.uint8
    if dtype.bits == 8:
        assert np.array_equal(packed.view(dtype.np), array)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i8", "i4"])
@pytest.mark.parametrize(("n", "k", "panel"), [(1, 1, 128), (200, 33, 256), (300, 7, 128), (2048, 3, 2048)])
def test_columns(dtype: str, n: int, k: int, panel: int) -> None:
    """The place of each feature of a k, as the layout's text has it."""
    weight = np.random.default_rng(0).integers(*RANGES.get(dtype, (-100, 100)), (n, k)).astype(KINDS[dtype])
    packing = ColumnPacking(dtype, n, k, panel)
    assert parse_packing(packing.text) == packing
    packed = packing.pack(weight)
    assert packed.shape == packing.shape
    assert packed.nbytes == packing.nbytes
    for feature in range(0, n, max(n // 40, 1)):
        column = packed[feature // panel]
        at, line = feature % panel, {"i8": 64, "i4": 128}.get(dtype, 1)
        within, start = at % line, at // line * (64 if line > 1 else 1)
        t, q, i = within // 16 % 4, within // 4 % 4, within % 4
        if dtype == "i8":
            got = column[:, start + 16 * q + 4 * t + i].view(np.int8)
        elif dtype == "i4":
            byte = column[:, start + 16 * q + 8 * (within // 64) + 2 * i + within // 32 % 2]
            got = ((byte if within // 16 % 2 else byte << 4).astype(np.uint8).view(np.int8) >> 4).astype(np.int8)
        else:
            got = column[:, start]
        np.testing.assert_array_equal(got.astype(np.float32), weight[feature].astype(np.float32))
