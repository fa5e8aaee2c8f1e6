"""The kernel store gives back what was put, and nothing that does not check."""

from __future__ import annotations

import os

import pytest

from tilewright.codegen.kernel import DeviceCode, KernelCode, Launch
from tilewright.codegen.store import KernelStore
from tilewright.ir import sym

B, S = sym("B"), sym("S")
CODE = KernelCode("tw_k", b"\x7fELF\n\x00code", ("B", "S"), B * ((S + 3) // 4), 2, {1: "panels{k=2}"}, (4 * B * S,), B)


LAUNCHES = (Launch("tw_k_0", (B, S // 2, 1), 128, 49152, (B * S, 1, 8)), Launch("tw_k_1", (B, 1, 1), 32))
USED = {"tw_k_0": {"registers": 40, "spills": 0, "shared": 16}, "tw_k_1": {"registers": 8, "spills": 4, "shared": 0}}
CUBIN = KernelCode("tw_k", b"\x7fELF\n", ("B", "S"), scratch=(S,), device=DeviceCode(LAUNCHES, "void k();\n", USED))


@pytest.mark.parametrize("code", [CODE, CUBIN], ids=["cpu", "cuda"])
def test_round_trip(tmp_path, code):
    store = KernelStore(tmp_path / "new")
    assert store.get("a") is None
    store.put("a", code)
    assert store.get("a") == code


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b.replace(b"ELF", b"EXE"), lambda b: b[5:], lambda b: b""])
def test_damaged_entries_are_compiled_again(tmp_path, damage):
    store = KernelStore(tmp_path)
    store.put("a", CODE)
    (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
    assert store.get("a") is None


def test_prune_keeps_those_used_last(tmp_path):
    size = 400
    store = KernelStore(tmp_path, limit=2 * (size + 300))
    for i, key in enumerate("abc"):
        store.put(key, KernelCode("k", bytes(size), (), 1))
        os.utime(tmp_path / key, (i, i))
    assert store.get("a") is not None  # used just now
    store.prune()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    store = KernelStore(tmp_path / "file")
    store.put("a", CODE)
    assert store.get("a") is None
