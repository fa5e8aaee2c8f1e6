"""Targets: parsing, canonical text, what follows from the features of CPUs."""

import pytest

from tilewright.codegen.target import ARCHS, CpuTarget, TargetError, host_target, match_host, parse_cpu, parse_target


@pytest.mark.parametrize("text", ["x86-64-v3", "cpu{arch=x86-64-v3}", "cpu{arch=znver5}", "native", "cpu{arch=native}",
                                  "cpu{arch=x86-64-v4 features=+avx512bf16+avx512vnni}", "cuda{arch=sm_80}",
                                  "cuda{arch=sm_90a}"])
def test_text_round_trips(text: str) -> None:
    target = parse_target(text)
    assert parse_target(target.text) == target
    assert parse_target(target.text).text == target.text


@pytest.mark.parametrize(("arch", "bits", "bf16", "vnni"), [
    ("x86-64-v3", 256, False, False), ("znver3", 256, False, False), ("alderlake", 256, False, True),
    ("x86-64-v4", 512, False, False), ("icelake-server", 512, False, True), ("znver4", 512, True, True),
])
def test_what_follows_from_the_architecture(arch: str, bits: int, bf16: bool, vnni: bool) -> None:
    target = parse_target(arch)
    assert (target.vector_bits, target.has_bf16_dot, target.has_vnni) == (bits, bf16, vnni)
    assert target.lanes == bits // 32


def test_a_gpu_is_no_cpu() -> None:
    with pytest.raises(TargetError, match=r"cuda\{arch=sm_80\} is no CPU"):
        parse_cpu("cuda{arch=sm_80}")
    assert parse_cpu("native") == host_target()


def test_features_are_explicit_and_sorted() -> None:
    required = parse_target("x86-64-v4").required_features
    assert list(required) == sorted(required)
    assert {"avx2", "fma", "f16c", "avx512bw"} <= set(required)


@pytest.mark.parametrize(("text", "message"), [
    ("cpu{arch=z80}", "unknown CPU architecture 'z80'; known: native, x86-64-v3"),
    ("z80", "unknown CPU architecture 'z80'"),
    ("cpu{core=2}", "unknown key 'core'.*cpu takes arch and features"),
    ("cpu{arch=x86-64-v4 features=+amx}", "unknown feature 'amx' for x86-64-v4; known: "),
    ("gpu{arch=sm_90}", "unknown target 'gpu'"),
    ("cuda{arch=sm_52}", "unknown CUDA architecture 'sm_52'; known: sm_80, "),
    ("cuda", r"cuda takes arch, as in cuda\{arch=sm_90a\}"),
    ("cuda{arch=sm_80 features=+fma}", "cuda takes arch"),
    ("cpu{arch=}", "malformed item 'arch='"),
    ("cpu{arch=znver5", "malformed text"),
    ("cpu{arch=znver5 arch=znver4}", "'arch' is given twice"),
])
def test_errors_say_what_exists(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_target(text)


def test_less_than_avx2_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r"nehalem lacks avx, avx2.*least supported is x86-64-v3"):
        match_host("nehalem", frozenset({"sse4.2"}))
    with pytest.raises(TargetError, match="lacks fma"):
        CpuTarget("haswell", ARCHS["haswell"] - {"fma"})


def test_a_host_that_hides_features_gets_a_level() -> None:
    assert match_host("znver4", ARCHS["znver4"]).text == "cpu{arch=znver4}"
    masked = match_host("znver4", ARCHS["znver4"] - {"gfni"})
    assert masked.arch == "x86-64-v4"
    assert masked.has_bf16_dot
    assert match_host("znver4", ARCHS["znver4"] - {"avx512bw"}).vector_bits == 256
    assert match_host("diamondrapids", ARCHS["sapphirerapids"]).has_bf16_dot


def test_the_host_offers_what_its_target_requires() -> None:
    from llvmlite import binding

    present = {name for name, on in binding.get_host_cpu_features().items() if on}
    assert set(host_target().required_features) <= present
