"""Sessions: inputs are checked before anything runs; memory is reused, lazy and given back; threads take turns."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from tests.toy_artifact import CAPACITY, VOCABULARY, WEIGHT, logits, save
from tilewright.runtime import InputError, ProgramError, SessionError, load
from tilewright.runtime.binding import bind
from tilewright.runtime.manifest import DTYPES, DimSpec, EntrySpec, TensorSpec
from tilewright.runtime.memory import aligned, as_aligned, pages


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return load(save(tmp_path_factory.mktemp("session") / "toy"), threads=2)


@pytest.fixture
def session(program):
    with program.session(batch=3) as session:
        yield session


def i64(*values):
    return np.array(values, np.int64)


def test_runs_an_entry(session):
    x = np.random.default_rng(0).random((5, 8), np.float32)
    result = session("scale", x=x)
    assert list(result) == ["y", "twice"]
    assert np.array_equal(result["y"], x * 2 + WEIGHT)
    assert np.array_equal(result["twice"], np.arange(10))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(program, threads):
    x = np.random.default_rng(0).random((64, 8), np.float32)
    with program.session(threads) as session:
        assert session.threads == threads
        for _ in range(100):
            assert np.array_equal(session("scale", x=x)["y"], x * 2 + WEIGHT)


def test_any_layout_of_an_input(session):
    x = np.random.default_rng(0).random((8, 4, 2), np.float32)[:, :, 1].T
    raw = np.zeros(4 * 32 + 4, np.uint8)
    odd = raw[4:].view(np.float32).reshape(4, 8)
    odd[...] = x
    for array in (x, odd, np.asfortranarray(x), x.tolist(), x[::-1][::-1]):
        assert np.array_equal(session("scale", x=array)["y"], x * 2 + WEIGHT)


def test_outputs_stay_the_callers(session):
    first = session("scale", x=np.zeros((2, 8), np.float32))["y"]
    session("scale", x=np.ones((2, 8), np.float32))
    assert np.array_equal(first, np.stack([WEIGHT, WEIGHT]))
    assert first.ctypes.data % 64 == 0
    assert first.flags.writeable


X = np.zeros((2, 8), np.float32)
WRONG_CALLS = [
    ("scale", {}, r"scale\(x\): expected all of the inputs \['x'\]"),
    ("scale", {"x": X, "z": X}, r"scale\(z\): expected one of the inputs \['x'\]"),
    ("forward", {"x": X}, r"entry: expected one of \['scale', 'prefill', 'decode'\], got 'forward'"),
    ("scale", {"x": X.astype(np.float64)}, r"scale\(x\): expected dtype float32, got dtype float64; convert"),
    ("scale", {"x": X.astype(">f4")}, r"scale\(x\): expected dtype float32, got dtype >f4"),
    ("scale", {"x": np.array([[None] * 8])}, "got dtype object"),
    ("scale", {"x": "text"}, r"expected values of dtype float32, got values of dtype <U4"),
    ("scale", {"x": [[1.0], [1.0, 2.0]]}, "nested lists of equal lengths"),
    ("scale", {"x": X[0]}, r"expected shape \[N, 8\], got shape \[8\]"),
    ("scale", {"x": X[:, :7]}, r"expected shape \[N, 8\], got shape \[2, 7\]"),
    ("scale", {"x": np.zeros((65, 8), np.float32)}, "scale, dim N: expected a size from 1 to 64, got 65; compile with"),
    ("scale", {"x": np.zeros((0, 8), np.float32)}, "scale, dim N: expected a size from 1 to 64, got 0"),
    ("decode", {"ids": [[1.5]], "start": [0]}, "expected values of dtype int64, got values of dtype float64"),
    ("decode", {"ids": [[2**70]], "start": [0]}, "expected values of dtype int64"),
    ("decode", {"ids": np.zeros((1, 1), np.int32), "start": [0]}, "expected dtype int64, got dtype int32"),
    ("decode", {"ids": [[1], [2]], "start": [0]}, r"\(start\): expected shape \[B\] with B=2, .*, got shape \[1\]"),
    ("decode", {"ids": [[1]] * 4, "start": [0] * 4}, "at most 3 sequences, the session's batch, got 4; .*batch=4"),
    ("decode", {"ids": [[VOCABULARY]], "start": [0]}, rf"decode\(ids\): expected values in 0..{VOCABULARY - 1}, got"),
    ("decode", {"ids": [[-1]], "start": [0]}, "expected values in 0..23, got values in -1..-1"),
    ("decode", {"ids": [[1]], "start": [CAPACITY]}, "positions in 0..19, the capacity of the KV states"),
    ("decode", {"ids": [[1]], "start": [-1]}, "positions in 0..19, the capacity"),
    ("prefill", {"ids": [[1, 2, 3]], "start": [18], "last": [0]}, "got positions in 18..20; shorten"),
    ("prefill", {"ids": [[1, 2, 3]], "start": [0], "last": [3]}, r"prefill\(last\): expected values in 0..2"),
    ("prefill", {"ids": [[1, 2, 3]], "start": [0], "last": [-1]}, r"prefill\(last\): expected values in 0..2"),
]


@pytest.mark.parametrize(("entry", "inputs", "message"), WRONG_CALLS)
def test_wrong_input_is_refused_before_anything_runs(program, entry, inputs, message):
    with program.session(batch=3) as session:
        with pytest.raises(InputError, match=message) as caught:
            session(entry, **inputs)
        assert session.memory == {"arena": 0, "states": 0}
    assert caught.value.expected
    assert caught.value.got


def test_program_errors_are_explained(tmp_path, monkeypatch):
    """What the checks of the runtime miss, the program reports."""
    monkeypatch.setattr("tilewright.runtime.session.check_positions", lambda *args: None)
    with load(save(tmp_path / "toy")).session(threads=1) as session:
        with pytest.raises(ProgramError, match="entry 'decode' failed with code 2: a position goes past") as caught:
            session("decode", ids=[[1]], start=[CAPACITY])
        assert caught.value.code == 2
        assert session("decode", ids=[[1]], start=[0])["logits"].shape == (1, VOCABULARY)


@pytest.mark.parametrize("batch", [0, -1, 1.0, True, 5])
def test_wrong_batch(program, batch):
    with pytest.raises(InputError, match="batch: expected"):
        program.session(batch=batch)


@pytest.mark.parametrize("threads", [0, -1, 1.5, False])
def test_wrong_threads(program, threads):
    with pytest.raises(InputError, match="threads: expected an integer >= 1"):
        program.session(threads)
    with pytest.raises(InputError, match="threads: expected an integer >= 1"):
        load(program.path, threads=threads)


def test_states_hold_what_was_fed(session):
    tokens = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    out = session("prefill", ids=np.array(tokens), start=i64(0, 0), last=i64(4, 2))["logits"]
    assert np.array_equal(out[0], logits(tokens[0]))
    assert np.array_equal(out[1], logits(tokens[1][:3]))
    out = session("decode", ids=[[7], [8]], start=[5, 3])["logits"]
    assert np.array_equal(out[0], logits([*tokens[0], 7]))
    assert np.array_equal(out[1], logits([*tokens[1][:3], 8]))


def test_sessions_of_a_program_share_nothing(program):
    with program.session() as a, program.session() as b:
        a("decode", ids=[[5]], start=[0])
        b("decode", ids=[[6]], start=[0])
        assert np.array_equal(a("decode", ids=[[1]], start=[1])["logits"][0], logits([5, 1]))
        assert np.array_equal(b("decode", ids=[[1]], start=[1])["logits"][0], logits([6, 1]))


def test_reset_forgets_the_states(session):
    session("decode", ids=[[5]], start=[0])
    assert session.memory["states"] == 3 * 2 * 4 * CAPACITY
    session.reset()
    assert session.memory == {"arena": 0, "states": 0}
    session("decode", ids=[[1]], start=[1])  # slot 0 is zeros again: K=0, V=0, and not a token
    assert session.memory["states"] == 3 * 2 * 4 * CAPACITY


def test_memory_stays_bounded(session):
    for size in (64, 1, 64, 7):
        session("scale", x=np.zeros((size, 8), np.float32))
    arena = session.memory["arena"]
    gc.collect()
    before = _resident()
    for _ in range(3000):
        session("scale", x=np.zeros((64, 8), np.float32))
    assert session.memory["arena"] == arena
    assert _resident() - before < 16 << 20


def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_untouched_pages_cost_nothing():
    before = _resident()
    block = pages(4 << 30)
    assert not block[:: 1 << 30].any()
    assert _resident() - before < 64 << 20
    with pytest.raises(MemoryError, match="smaller batch"):
        pages(1 << 60)


def test_aligned_arrays():
    for shape in [(), (0,), (3,), (5, 7), (1000,)]:
        for dtype in DTYPES.values():
            array = aligned(shape, dtype)
            assert (array.shape, array.dtype) == (shape, dtype)
            assert array.size == 0 or array.ctypes.data % 64 == 0
    kept = aligned((4, 4), np.dtype(np.float32))
    assert as_aligned(kept) is kept
    assert as_aligned(kept.T) is not kept


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_binds(name):
    entry = EntrySpec((DimSpec("N", 1, 9),), (TensorSpec("x", name, ("N",)),), (), None)
    (array,), dims = bind(entry, {"x": np.ones(3, DTYPES[name])}, "f")
    assert (array.dtype, dims) == (DTYPES[name], {"N": 3})
    (array,), _ = bind(entry, {"x": [True, False] if name == "bool" else [1, 0]}, "f")
    assert array.tolist() == [1, 0]


def test_python_integers_must_fit():
    entry = EntrySpec((), (TensorSpec("x", "i8", (1,)),), (), None)
    with pytest.raises(InputError, match="expected values from -128 to 127, got 200 to 200"):
        bind(entry, {"x": [200]}, "f")


def test_bfloat16_input_takes_numbers_and_bfloat16_only():
    entry = EntrySpec((), (TensorSpec("x", "bf16", (2,)),), (), None)
    (array,), _ = bind(entry, {"x": [1.5, 2]}, "f")
    assert array.dtype == ml_dtypes.bfloat16
    with pytest.raises(InputError, match="expected dtype bfloat16, got dtype float32"):
        bind(entry, {"x": np.zeros(2, np.float32)}, "f")


def test_calls_from_many_threads(session):
    def run(seed):
        x = np.random.default_rng(seed).random((1 + seed % 64, 8), np.float32)
        return np.array_equal(session("scale", x=x)["y"], x * 2 + WEIGHT)

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(run, range(400)))


def test_closed_session(program):
    session = program.session()
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session("scale", x=X)


def test_close_while_others_call(program):
    session = program.session()
    stopped = []

    def run():
        try:
            while True:
                session("scale", x=X)
        except SessionError:
            stopped.append(True)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    session.close()
    for thread in threads:
        thread.join()
    assert stopped == [True] * 4


def test_dropped_sessions_end_their_threads(program):
    before = len(os.listdir("/proc/self/task"))
    for _ in range(10):
        program.session(threads=4)("scale", x=X)
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= before


def test_program_describes_itself(program):
    assert program.entries == ["scale", "prefill", "decode"]
    assert "cpu{arch=x86-64}" in repr(program)
    assert program.session().threads == 2


def test_bound_calls_run_again_on_what_their_inputs_hold(session):
    x = np.ones((3, 8), np.float32)
    call = session.bind("scale", x=x)
    first = call()["y"].copy()
    call.inputs["x"][:] = 5
    second = call()["y"]
    assert np.array_equal(first, x * 0 + 2 + WEIGHT)
    assert np.array_equal(second, x * 0 + 10 + WEIGHT)
    assert second is call.outputs["y"]


def test_bound_calls_check_new_values(session):
    call = session.bind("decode", ids=[[3]], start=[0])
    call()
    for name, value, message in [("ids", VOCABULARY, "values in 0..23"), ("start", CAPACITY, "positions in 0..19")]:
        call.inputs[name][...] = value
        with pytest.raises(InputError, match=message):
            call()
        call.inputs[name][...] = 1
    session.close()
    with pytest.raises(SessionError, match="closed"):
        call()
