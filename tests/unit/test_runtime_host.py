"""CPU features in LLVM's spelling, and how many threads to start."""

from __future__ import annotations

import os

import pytest

from tilewright.runtime import UnsupportedHostError, host

CPUINFO = """processor\t: 0
flags\t\t: fpu lm pni sse4_1 sse4_2 avx avx2 fma f16c bmi1 bmi2 abm avx512f avx512bw avx512vl avx512dq {}

processor\t: 1
flags\t\t: fpu lm pni sse4_1 sse4_2 avx avx2 fma f16c bmi1 bmi2 abm avx512f avx512bw avx512vl avx512dq
"""


def test_flags_are_spelled_as_llvm_does():
    both = CPUINFO.replace("avx512dq\n", "avx512dq avx512_vnni avx512_bf16 amx_tile avx_vnni\n")
    names = host.parse_cpuinfo(both.format("avx512_vnni avx512_bf16 amx_tile avx_vnni"))
    assert names >= {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512bf16"}
    assert names >= {"sse3", "sse4.1", "sse4.2", "bmi", "bmi2", "lzcnt", "amx-tile", "avxvnni", "64bit"}


def test_only_what_every_processor_has_counts():
    names = host.parse_cpuinfo(CPUINFO.format("avx512_vnni"))
    assert "avx512vnni" not in names
    assert "avx512f" in names


def test_arm_features():
    assert {"neon", "dotprod"} <= host.parse_cpuinfo("processor : 0\nFeatures : fp asimd asimddp\n")


def test_no_features_in_unknown_text():
    assert host.parse_cpuinfo("") == frozenset()


def test_without_proc_numpy_is_asked(monkeypatch, tmp_path):
    from_proc = host.cpu_features()
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "absent")
    host.cpu_features.cache_clear()
    from_numpy = host.cpu_features()
    host.cpu_features.cache_clear()
    common = {"avx2", "fma", "avx512f", "f16c", "sse4.2"}
    assert from_numpy & common == from_proc & common


def test_subset_passes_and_the_missing_are_named(monkeypatch):
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"avx2", "fma"}))
    host.check_host((), "here", "cpu")
    host.check_host(("fma", "avx2"), "here", "cpu")
    with pytest.raises(UnsupportedHostError, match=r"here: compiled for cpu, .* lacks .* avx512f, amx-tile;"):
        host.check_host(("avx2", "avx512f", "amx-tile"), "here", "cpu")


def test_default_threads_stay_within_the_affinity(monkeypatch, tmp_path):
    assert 1 <= host.default_threads() <= len(os.sched_getaffinity(0))
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    for processor, text in siblings.items():
        (tmp_path / f"cpu{processor}").write_text(text + "\n")
    monkeypatch.setattr(host, "_TOPOLOGY", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(host, "_CGROUP_QUOTA", tmp_path / "max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert host.default_threads() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2})
    assert host.default_threads() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    (tmp_path / "max").write_text("150000 100000\n")
    assert host.default_threads() == 2
    (tmp_path / "max").write_text("50000 100000\n")
    assert host.default_threads() == 1
    (tmp_path / "max").write_text("max 100000\n")
    assert host.default_threads() == 2
