"""weights.safetensors: aligned, streamed, readable by the safetensors package."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime import DamagedArtifactError
from tilewright.runtime.artifact import DTYPES, WeightSpec, WeightsWriter, plan_weights, read_table
from tilewright.runtime.weights import data_offset

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(tensors=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=6), data=st.data())
def test_any_tensors_round_trip(tmp_path_factory, tensors, data):
    arrays = {f"t.{i}": random_array(dtype, shape, i) for i, (dtype, shape) in enumerate(tensors)}
    plan = plan_weights(
        WeightSpec(name, dtype, array.shape) for (name, array), (dtype, _) in zip(arrays.items(), tensors)
    )
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    with WeightsWriter(path, plan) as writer:
        for name, array in arrays.items():
            writer.write(name, array if data.draw(st.booleans()) else pieces(array))
    check(path, plan, arrays, writer.file)


def random_array(dtype, shape, seed):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(DTYPES[dtype])


def pieces(array):
    data = array.tobytes()
    return (data[i : i + 7] for i in range(0, len(data), 7))


def check(path, plan, arrays, file):
    raw = path.read_bytes()
    assert len(plan.header) % 64 == 0
    assert (len(raw), xxhash.xxh3_128_hexdigest(raw)) == (file.bytes, file.xxh3_128)
    assert len(raw) == len(plan.header) + plan.size
    table = read_table(path)
    assert list(table) == list(arrays)
    for name, array in arrays.items():
        dtype, shape, offset = table[name]
        assert offset == len(plan.header) + plan.offsets[name]
        assert offset % 64 == 0
        assert (DTYPES[dtype], shape) == (array.dtype, array.shape)
        assert raw[offset : offset + array.nbytes] == array.tobytes()


def test_the_safetensors_package_reads_it(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    arrays = {"a": np.arange(5, dtype=np.float32), "ünï/b": np.ones((2, 3), ml_dtypes.bfloat16)}
    arrays["empty"] = np.zeros((0, 4))
    names = {value: key for key, value in DTYPES.items()}
    plan = plan_weights(WeightSpec(name, names[array.dtype], array.shape) for name, array in arrays.items())
    with WeightsWriter(tmp_path / "w.safetensors", plan) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    found = dict(safetensors.deserialize((tmp_path / "w.safetensors").read_bytes()))
    assert {name: bytes(found[name]["data"]) for name in arrays} == {n: a.tobytes() for n, a in arrays.items()}
    assert {name: found[name]["dtype"] for name in arrays} == {"a": "F32", "ünï/b": "BF16", "empty": "F64"}
    assert all(name in arrays or name.startswith("__pad__") for name in found)


def test_strided_arrays_are_written_row_major(tmp_path):
    array = np.arange(12, dtype=np.int16).reshape(3, 4).T
    with WeightsWriter(tmp_path / "w", plan_weights([WeightSpec("t", "i16", (4, 3))])) as writer:
        writer.write("t", array)
    assert (tmp_path / "w").read_bytes()[-24:] == array.tobytes()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("b", b"12345678", "the plan says that 'a' is written next"),
        ("c", b"", "the plan says that 'a' is written next"),
        ("a", b"1234567", "the plan says 8 bytes, 7 were given"),
        ("a", [b"1234", b"56789"], "the plan says 8 bytes, 9 were given"),
        ("a", np.zeros(1, np.float64), "the plan says f32, the array is float64"),
    ],
)
def test_wrong_tensor_is_refused(tmp_path, name, data, message):
    plan = plan_weights([WeightSpec("a", "f32", (2,)), WeightSpec("b", "u8", (1,))])
    writer = WeightsWriter(tmp_path / "w", plan)
    with pytest.raises(ValueError, match=message):
        writer.write(name, data)
    writer.abort()


def test_tensor_after_the_last_is_refused(tmp_path):
    writer = WeightsWriter(tmp_path / "w", plan_weights([]))
    with pytest.raises(ValueError, match="'no further tensor' is written next"):
        writer.write("a", b"")
    writer.close()
    writer.close()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([WeightSpec("a", "u8", (1,)), WeightSpec("a", "u8", (1,))], "'a': its name is there twice"),
        ([WeightSpec("__metadata__", "u8", (1,))], "starts with two underscores"),
        ([WeightSpec("a", "int4", (1,))], "unknown dtype 'int4'; known: .*bf16"),
    ],
)
def test_impossible_plan_is_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        plan_weights(specs)


@pytest.mark.parametrize("head", [b"", b"1234", (2**60).to_bytes(8, "little"), (57).to_bytes(8, "little")])
def test_damaged_header_is_refused(head):
    with pytest.raises(DamagedArtifactError, match="header is damaged"):
        data_offset(head, 1000, "weights.safetensors")
